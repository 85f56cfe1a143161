"""Swaps: a version's weights from the store to the server."""
