"""Which stored version a server was started with; made from its folder when nobody knows it."""

from __future__ import annotations

import contextlib
import logging

from aurora_sgl import wire
from aurora_sgl.artifacts import ArtifactRoot
from aurora_sgl.errors import AuroraError, Refused, Unusable
from aurora_sgl.sidecar.servers import Registration, drafter_path
from aurora_sgl.sidecar.swap.staging import target_info
from aurora_sgl.store import queries
from aurora_sgl.store.link import StoreLink

log = logging.getLogger(__name__)


def identify(
    link: StoreLink, artifacts: ArtifactRoot, registration: Registration, hello: wire.Hello
) -> int:
    """The version id, after which ``server.boot_version_id`` is set.

    A drafter that is new to the group is imported, and goes live when the group has no live
    version yet. Raises ``StoreAway``, ``Unusable`` for what can't become a version, ``AuroraError``
    or ``OSError`` for what may go well another time.
    """
    from aurora_sgl.drafter import hub
    from aurora_sgl.rollout.promote import NONE_LIVE, promote
    from aurora_sgl.rollout.versions import import_version

    if reason := str(hello.server.get("unknown_drafter") or ""):
        raise Unusable(reason)
    try:
        target = target_info(hello)
    except AuroraError as error:
        raise Unusable(str(error)) from error
    source = "scratch" if hello.server.get("drafter_source") == "scratch" else "import"
    with link.guard() as engine:
        version = import_version(
            engine,
            artifacts,
            hub.local(drafter_path(hello)),
            registration.group_id,
            source=source,
            note=f"the drafter that {hello.server.get('name', 'a server')} was started with",
            target=target,
        )
    with link.session() as s:
        first = queries.aliases.desired_version(s, registration.group_id) is None
        queries.servers.touch_server(s, registration.server_id, boot_version_id=version.id)
    if first:
        with link.guard() as engine, contextlib.suppress(Refused):  # another server was first
            promote(
                engine,
                version.id,
                actor="system",
                reason="first version of the group",
                expected_live=NONE_LIVE,
            )
            log.info("version %d is the first of its group, and live", version.id)
    registration.boot_version_id = version.id
    return int(version.id)
