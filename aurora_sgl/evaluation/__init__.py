"""What a drafter version would have had accepted: replay over held-out requests, and the gate."""
