"""Variables that are read before the settings are, or where pydantic has no place.

``config`` has every other one. SGLang calls our plugin in each of its processes, also in those that
have nothing of ours to do; whether it is enabled must cost them nothing. The internal ones are what
one process of ours hands to another; nobody has to set them. Not read from an ``.env`` file.
"""

from __future__ import annotations

import os

#: ``0``, ``false``, ``no`` or ``off``: the plugin does nothing. Anything else: it records, also
#: where neither a data folder nor a store was named.
ENABLED = "AURORA_ENABLED"

#: ``json``: each record of a log of ours is one JSON object; else a line for people.
LOG_FORMAT = "AURORA_LOG_FORMAT"
#: A folder of files named after settings, such as ``aurora_database_url``, that hold their values:
#: where a container has its secrets.
SECRETS = "AURORA_SECRETS"

#: From ``aurora-sgl serve`` to the server: our CPU kernels stand in before sglang is imported.
CPU = "AURORA_CPU"
#: From ``aurora-sgl serve`` to the server: ``scratch`` when the drafter is untrained.
DRAFTER_SOURCE = "AURORA_DRAFTER_SOURCE"
#: From the server to its schedulers: the folder of the sidecars' sockets.
ENDPOINT = "AURORA_ENDPOINT"
#: From the server to its processes: the secret of this start, see ``engine.labels``.
STAMP = "AURORA_STAMP"
#: From the server to its processes: ``1``: nothing of ours is asked for, leave SGLang as it is;
#: ``schedulers``: in these only, where our CPU kernels stay, and what keeps requests from ending
#: them.
IDLE = "AURORA_IDLE"
#: From the server to its schedulers: JSON, what was wrong at the start, see ``wire.Hello``.
NOTICES = "AURORA_NOTICES"
#: From the demo and from tests to what they start: end when the parent is gone.
EXIT_WITH_PARENT = "AURORA_EXIT_WITH_PARENT"

INTERNAL = (CPU, DRAFTER_SOURCE, ENDPOINT, STAMP, IDLE, NOTICES, EXIT_WITH_PARENT)

_OFF = ("0", "false", "no", "off")


def is_enabled() -> bool:
    """Whether the plugin may do anything."""
    return os.environ.get(ENABLED, "1").strip().lower() not in _OFF


def logs_as_json() -> bool:
    """Whether a record of a log is an object for machines."""
    return value(LOG_FORMAT).strip().lower() == "json"


def is_set(name: str) -> bool:
    """Whether a variable of ours says 1."""
    return os.environ.get(name) == "1"


def value(name: str) -> str:
    """What a variable of ours says; "" without it."""
    return os.environ.get(name, "")


def leave_alone() -> None:
    """Tell SGLang's processes, which are spawned later, that nothing of ours is wanted there."""
    os.environ[IDLE] = "schedulers" if is_set(CPU) else "1"
