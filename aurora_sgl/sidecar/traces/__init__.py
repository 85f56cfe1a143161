"""Traces: what a request's verify steps knew, from the server's messages to files."""
