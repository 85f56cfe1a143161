"""``python -m tests.support.gateway PORT METRICS URL...``: SGLang's gateway before these servers.

Its own launcher imports a balancer for debugging first, and with it all of SGLang, which takes
half a minute and which the gateway has no use for.
"""

from __future__ import annotations

import sys

from sglang_router.router import Router
from sglang_router.router_args import RouterArgs


def main(port: int, metrics: int, urls: list[str]) -> None:
    """Until it is killed."""
    arguments = RouterArgs(
        worker_urls=urls,
        host="127.0.0.1",
        port=port,
        policy="round_robin",
        prometheus_host="127.0.0.1",
        prometheus_port=metrics,
        worker_startup_timeout_secs=600,
        health_check_interval_secs=3,
    )
    Router.from_args(arguments).start()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
