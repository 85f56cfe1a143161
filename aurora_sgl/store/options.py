"""Execution options of ours, by which whoever begins a transaction says what it is for."""

#: The transaction only reads. SQLite then takes no write lock at its start.
READ_ONLY = "aurora_read_only"
#: Seconds that one statement may take in PostgreSQL; None: as long as it wants.
SECONDS = "aurora_seconds"
