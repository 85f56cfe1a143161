"""A real nginx with TLS before the dashboard, as docs/operations.md describes it."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which

#: A name that browsers look up on this machine by themselves, and that is none of loopback's own.
NAME = "aurora.localhost"
CONFIGURATION = """
pid {folder}/nginx.pid;
error_log stderr warn;
daemon off;
master_process off;
events {{}}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  server {{
    listen 127.0.0.1:{port} ssl;
    server_name {name};
    ssl_certificate {folder}/cert.pem;
    ssl_certificate_key {folder}/key.pem;
{location}
  }}
}}
"""


@contextmanager
def before(upstream: str, base: str, folder: Path, location: str) -> Iterator[str]:
    """The URL under which it shows ``upstream``; ``location`` is its block of the docs."""
    path = which("nginx") or which("nginx", path="/usr/sbin")
    if path is None:
        raise RuntimeError("nginx is missing; on Debian: apt-get install nginx")
    _certificate(folder)
    port = _free_port()
    file = folder / "nginx.conf"
    file.write_text(CONFIGURATION.format(
        folder=folder, port=port, name=NAME, location=location.replace("127.0.0.1:8501", upstream)
    ))  # fmt: skip
    process = subprocess.Popen(
        [path, "-p", str(folder), "-c", str(file), "-e", "stderr"],
        stderr=(folder / "nginx.err").open("wb"),
    )
    try:
        _wait(port, process, folder)
        yield f"https://{NAME}:{port}{base}"
    finally:
        process.terminate()
        process.wait(20)


def _certificate(folder: Path) -> None:
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}",
         "-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")],
        check=True, capture_output=True,
    )  # fmt: skip


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(port: int, process: subprocess.Popen[bytes], folder: Path) -> None:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", port)):
                return
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise RuntimeError(f"nginx did not start: {(folder / 'nginx.err').read_text()}")
