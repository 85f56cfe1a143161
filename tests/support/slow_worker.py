"""Stands for a training run in the tests of the process around it: says that it lives, and ends
when it is asked to (or, with ``stubborn``, does not)."""

from __future__ import annotations

import json
import signal
import sys
import time

if __name__ == "__main__":
    if "stubborn" in sys.argv:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    until = time.monotonic() + float(sys.argv[1])
    count = 0
    while time.monotonic() < until:
        count += 1
        print(json.dumps({"event": "update", "update": count}), file=sys.stderr, flush=True)
        time.sleep(0.05)
    print(json.dumps({"status": "succeeded", "version_id": 7}))
