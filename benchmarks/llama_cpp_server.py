"""llama.cpp's own HTTP server, for ``peers.py``; runs in an environment that has ``xllamacpp``.

    python llama_cpp_server.py FILE.gguf PORT STREAMS THREADS

Serves until its standard input is closed. Imports nothing of this project.
"""

from __future__ import annotations

import sys

import xllamacpp


def main() -> None:
    model, port, streams, threads = sys.argv[1], *map(int, sys.argv[2:5])
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.port = port
    params.n_parallel = streams
    params.n_ctx = 1024 * streams
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    params.n_gpu_layers = 0
    server = xllamacpp.Server(params)
    print(f"listening on {server.listening_address}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
