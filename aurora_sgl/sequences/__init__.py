"""Served requests as data: which of the store's requests can be learned from or judged, and what
their traces hold."""
