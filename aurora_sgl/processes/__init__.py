"""Processes of ours: how one is started, bound to its parent, stepped back and listened to."""
