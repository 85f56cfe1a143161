"""Starts the dashboard: Streamlit's own server, and one route that keeps a login in a cookie."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import NoReturn
from urllib.parse import urlsplit

from sqlalchemy.exc import SQLAlchemyError
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from aurora_sgl import environment, logs
from aurora_sgl.config import get_settings
from aurora_sgl.errors import AuroraError
from aurora_sgl.private import settle
from aurora_sgl.processes.ending import Ending
from aurora_sgl.store.accounts import SESSION_SECONDS, Accounts

from .guard import Guard
from .reach import Site, read, shown

#: Slow to import; better before the first page is asked for than while somebody waits.
HEAVY = ("pandas", "pyarrow", "plotly.graph_objects", "plotly.io", "sqlalchemy.dialects.sqlite")
SIGNALS = (signal.SIGTERM, signal.SIGINT)
#: Seconds that a dashboard that was asked to end spends on what it was asked before.
GRACE_SECONDS = 15.0

log = logging.getLogger(__name__)


def serve(
    host: str,
    port: int,
    *,
    names: list[str] | None = None,
    base: str | None = None,
    proxies: list[str] | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C; what is not given, the settings say. Says the address, and, to
    people, a one-time link while nobody has an account: a log for machines is read by many.

    Raises ``AuroraError`` when the accounts can't be opened, the port is taken, or a name, path or
    address of a proxy is none.
    """
    for number in SIGNALS:
        signal.signal(number, _leave)
    import streamlit
    from streamlit import logger

    for_machines = _begin_log()
    logger.set_log_level("error")  # caches warn that no page runs yet
    settings = get_settings()
    site = read(host, port, settings, names=names, base=base, proxies=proxies)
    site = replace(site, port=_free(host, port))
    if line := settle(settings.home, settings.artifact_root, settings.artifact_access):
        log.warning("%s", line)
    accounts = Accounts(accounts_path())
    for module in (*HEAVY, f"{__package__}.shell"):
        importlib.import_module(module)
    _say_address(site, accounts, for_machines)
    Thread(target=_warm, name="warm", daemon=True).start()
    # Uvicorn believes X-Forwarded-* of these; without the variable, of anybody on this machine.
    os.environ["FORWARDED_ALLOW_IPS"] = site.proxies
    # A login through OpenID Connect has cookies as long as its claims; a socket with more than 8 KB
    # of them would stay without an answer.
    os.environ.setdefault("WEBSOCKETS_MAX_LINE_LENGTH", "65536")
    app = streamlit.App(
        str(Path(__file__).with_name("app.py")),
        routes=[Route(f"{site.base}/session", keep_session, methods=["POST", "DELETE"])],
        middleware=[_guard(site)],
        lifespan=_life,
    )
    app.run(config=options(site))


def _leave(*_: object) -> NoReturn:
    for number in SIGNALS:  # a second one would meet the interpreter while it clears up
        signal.signal(number, signal.SIG_IGN)
    sys.exit(0)


def _begin_log() -> bool:
    """Facts of ours, and what others warn of. Whether they are written for machines."""
    for_machines = environment.logs_as_json()
    logs.begin(for_machines)
    logging.getLogger().setLevel(logging.WARNING)
    log.setLevel(logging.INFO)
    logging.captureWarnings(for_machines)
    return for_machines


def _say_address(site: Site, accounts: Accounts, for_machines: bool) -> None:
    lines = [site.address]
    if site.public != site.address:
        lines.append(f"for a proxy that shows it as {site.public}")
    if for_machines:
        if not accounts.all():
            lines.append(
                "nobody has an account yet; make the first with "
                "`aurora-sgl dashboard add-user NAME --role operator`"
            )
    elif (token := accounts.offer_setup()) is not None:
        lines.append(
            "nobody has an account yet; make the first operator, once, at "
            f"{site.public}/?setup={token}"
        )
    for line in lines:
        if for_machines:
            log.info("dashboard: %s", line)
        else:
            print(f"dashboard: {line}", flush=True)


def _guard(site: Site) -> Middleware:
    from streamlit.web.server.starlette.starlette_websocket import is_host_allowed

    from .asker import asker
    from .shell import PAGES

    pages = [title.lower() for _, title, _ in PAGES]
    return Middleware(Guard, base=site.base, pages=pages, asker=asker, is_host=is_host_allowed)


def _warm() -> None:
    """A store that is away or empty is told of on the pages."""
    with suppress(AuroraError, SQLAlchemyError):
        importlib.import_module(f"{__package__}.warming").warm()
    # Streamlit collects garbage after each run of a page, parts that refresh themselves included,
    # and looks at everything that was imported each time: a sixth of a second on a slow machine.
    gc.collect()
    gc.freeze()


@asynccontextmanager
async def _life(_: object) -> AsyncIterator[None]:
    """What was started from the page ends with it. By now Uvicorn and Streamlit have their
    loggers, and Uvicorn takes the signals."""
    if environment.logs_as_json():
        _write_json()
    ending = Ending()
    Thread(target=_cut_off, args=(ending,), name="end", daemon=True).start()
    for number in SIGNALS:
        _end_in_time(number, ending)
    yield
    _stop_processes()


def _stop_processes() -> None:
    for name in ("trainings", "replays"):
        importlib.import_module(f"{__package__}.{name}").stop_all()


def _write_json() -> None:
    """Loggers of others that have handlers of their own write as ours does."""
    for name in list(logging.root.manager.loggerDict):
        for handler in logging.getLogger(name).handlers:
            handler.setFormatter(logs.JsonLines())


def _end_in_time(number: signal.Signals, ending: Ending) -> None:
    """Uvicorn ends when all was answered, however slowly its reader takes it: not later than
    ``GRACE_SECONDS`` from now on."""
    taken = signal.getsignal(number)

    def end(number: int, frame: FrameType | None) -> None:
        again = ending.wait(0)  # of a second one Uvicorn would leave in the middle of everything
        ending.ask()
        if callable(taken) and not again:
            taken(number, frame)

    signal.signal(number, end)


def _cut_off(ending: Ending) -> None:
    ending.wait()
    time.sleep(GRACE_SECONDS)
    _stop_processes()
    log.warning("what is not answered %.0f s after the end was asked for is cut off", GRACE_SECONDS)
    os._exit(0)


def _free(host: str, port: int) -> int:
    """``port``, or one that is free for 0. Raises ``AuroraError`` when it can't be listened on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise AuroraError(
                f"the dashboard can't listen on {shown(host)}:{port} ({error.strerror}); "
                "choose another --port, or 0 for a free one"
            ) from None
        return int(probe.getsockname()[1])


def options(site: Site) -> dict[str, object]:
    """Streamlit's settings: nothing is asked of other machines, other names are refused."""
    return {
        "global.developmentMode": False,  # it thinks so where packages lie in an unusual folder
        "server.address": site.host,
        "server.port": site.port,
        "server.baseUrlPath": site.base.strip("/"),
        "server.headless": True,
        "server.fileWatcherType": "none",
        "server.runOnSave": False,
        "server.allowedHosts": site.allowed_hosts,
        "browser.gatherUsageStats": False,
        "secrets.files": [str(accounts_path().with_name("secrets.toml"))],
        "browser.serverAddress": shown(site.host),
        "client.toolbarMode": "viewer",
        "client.showErrorDetails": "none",
        "theme.primaryColor": "#0072B2",
        "theme.dark.primaryColor": "#3B96D1",
        "logger.level": "error",
        "logger.hideWelcomeMessage": True,
    }


def accounts_path() -> Path:
    """Outside of the store, so that nobody who may ask the store sees it."""
    return get_settings().home.resolve() / "dashboard" / "accounts.db"


def sql_roles_path() -> Path:
    """The passwords of the SQL page's roles in PostgreSQL."""
    return accounts_path().with_name("sql-roles.json")


def cookie_name(port: int | None) -> str:
    """Cookies are shared by all ports of a machine; the name keeps two dashboards apart."""
    return f"aurora_session_{port or 80}"


async def keep_session(request: Request) -> Response:
    """POST a session's token to keep it in a cookie that no script can read; DELETE forgets it.

    Other sites can't send the header without asking first, and are not answered when they ask.
    """
    origin = urlsplit(request.headers.get("origin") or "")
    elsewhere = origin.netloc and origin.netloc != request.headers.get("host")
    if request.headers.get("x-aurora-dashboard") != "1" or elsewhere:
        return PlainTextResponse("not from the dashboard's page", 403)
    name, answer = cookie_name(request.url.port), PlainTextResponse("ok")
    path = request.url.path.removesuffix("/session") or "/"
    if request.method == "DELETE":
        answer.delete_cookie(name, path=path)
        return answer
    token = (await request.body())[:200].decode("ascii", "replace")
    if Accounts(accounts_path()).of_session(token) is None:
        return PlainTextResponse("no such session", 403)
    answer.set_cookie(
        name,
        token,
        max_age=int(SESSION_SECONDS),
        path=path,
        httponly=True,
        samesite="strict",
        secure="https" in (request.url.scheme, origin.scheme),
    )
    return answer
