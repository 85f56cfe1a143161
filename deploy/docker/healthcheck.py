#!/usr/bin/env python3
"""Asks the process of this container whether it is well: exit status 0 or 1, one line why.

    aurora-healthcheck [URL]

Without a URL it asks what the container's own command serves: ``scheduler`` its ``/health``,
``dashboard`` Streamlit's, anything else SGLang's. The standard library is enough: the image needs
no curl.
"""

from __future__ import annotations

import http.client
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

#: Less than the timeout of HEALTHCHECK, so that the reason is printed. SGLang generates a token
#: before it says that it is well, and does so behind the requests that it is at.
SECONDS = 18.0
PATHS = {
    "scheduler": (8510, "/health"),
    "dashboard": (8501, "/_stcore/health"),
    "serve": (30000, "/health"),
}


def address(command: Sequence[str]) -> str:
    """What a container with this command line serves. ``serve`` becomes SGLang with its flags."""
    kind = next((word for word in command if word in PATHS), "serve")
    port, path = PATHS[kind]
    for word, after in zip(command, [*command[1:], ""], strict=False):
        name, _, value = word.partition("=")
        if name == "--port":
            port = int(value or after)
    return f"http://127.0.0.1:{port}{path}"


def main() -> int:
    try:
        words = Path("/proc/1/cmdline").read_bytes().decode(errors="replace").split("\0")
        url = sys.argv[1] if len(sys.argv) > 1 else address(words)
        with urllib.request.urlopen(url, timeout=SECONDS) as answer:
            print(f"{url}: {answer.status}")
    except urllib.error.HTTPError as error:  # our own say why in the body
        print(f"{url}: {error.code} {error.read(500).decode(errors='replace').strip()}")
        return 1
    except (OSError, ValueError, http.client.HTTPException) as error:
        print(f"not well: {error}")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
