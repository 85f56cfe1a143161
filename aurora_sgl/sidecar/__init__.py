"""The sidecar: records and traces in, desired version out. A process beside the engine."""
