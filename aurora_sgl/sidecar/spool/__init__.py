"""The spool: what a server said, on disk until the store has it."""
