"""The small model and the sample traffic of the first run."""
