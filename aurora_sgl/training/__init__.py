"""Learning from served requests: sequences, objectives, the trainer, exact replay."""
