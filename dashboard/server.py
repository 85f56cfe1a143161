"""Starts the dashboard: Streamlit's own server, and one route that keeps a login in a cookie."""

from __future__ import annotations

import importlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from threading import Thread

from sqlalchemy.exc import SQLAlchemyError
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from aurora_sgl.config import get_settings
from aurora_sgl.errors import AuroraError
from aurora_sgl.store.accounts import SESSION_SECONDS, Accounts

LOOPBACK_NAMES = ["localhost", "127.0.0.1", "[::1]", "::1"]
#: Slow to import; better before the first page is asked for than while somebody waits.
HEAVY = ("pandas", "pyarrow", "plotly.graph_objects", "plotly.io", "sqlalchemy.dialects.sqlite")


def serve(host: str, port: int) -> None:
    """Serve until interrupted. Prints the address, and a one-time link while nobody has an
    account. Raises ``AuroraError`` when the accounts can't be opened or the port is taken."""
    import streamlit
    from streamlit import logger

    logger.set_log_level("error")  # caches warn that no page runs yet
    port = _free(host, port)
    accounts = Accounts(accounts_path())
    for module in (*HEAVY, f"{__package__}.shell"):
        importlib.import_module(module)
    address = f"http://{shown(host)}:{port}"
    token = accounts.offer_setup()
    print(f"dashboard: {address}", flush=True)
    if token is not None:
        print(
            f"dashboard: nobody has an account yet; make the first operator, once, at "
            f"{address}/?setup={token}",
            flush=True,
        )
    Thread(target=_warm, name="warm", daemon=True).start()
    app = streamlit.App(
        str(Path(__file__).with_name("app.py")),
        routes=[Route("/session", keep_session, methods=["POST", "DELETE"])],
        lifespan=_life,
    )
    app.run(config=options(host, port))


def _warm() -> None:
    """A store that is away or empty is told of on the pages."""
    with suppress(AuroraError, SQLAlchemyError):
        importlib.import_module(f"{__package__}.data").warm()


@asynccontextmanager
async def _life(_: object) -> AsyncIterator[None]:
    """Training that was started from the page ends with it."""
    yield
    importlib.import_module(f"{__package__}.trainings").stop_all()


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


def options(host: str, port: int) -> dict[str, object]:
    """Streamlit's settings: nothing is asked of other machines, other names are refused."""
    return {
        "server.address": host,
        "server.port": port,
        "server.headless": True,
        "server.fileWatcherType": "none",
        "server.runOnSave": False,
        "server.allowedHosts": LOOPBACK_NAMES if is_loopback(host) else [],
        "browser.gatherUsageStats": False,
        "secrets.files": [str(accounts_path().with_name("secrets.toml"))],
        "browser.serverAddress": shown(host),
        "client.toolbarMode": "viewer",
        "client.showErrorDetails": "none",
        "theme.primaryColor": "#0072B2",
        "theme.dark.primaryColor": "#2A86C2",
        "logger.level": "error",
        "logger.hideWelcomeMessage": True,
    }


def accounts_path() -> Path:
    """Outside of the store, so that nobody who may ask the store sees it."""
    return get_settings().home.resolve() / "dashboard" / "accounts.db"


def sql_roles_path() -> Path:
    """The passwords of the SQL page's roles in PostgreSQL."""
    return accounts_path().with_name("sql-roles.json")


def is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def shown(host: str) -> str:
    return "127.0.0.1" if host in ("", "0.0.0.0") else f"[{host}]" if ":" in host else host


def cookie_name(port: int | None) -> str:
    """Cookies are shared by all ports of a machine; the name keeps two dashboards apart."""
    return f"aurora_session_{port or 80}"


async def keep_session(request: Request) -> Response:
    """POST a session's token to keep it in a cookie that no script can read; DELETE forgets it.

    Other sites can't send the header without asking first, and are not answered when they ask.
    """
    if request.headers.get("x-aurora-dashboard") != "1":
        return PlainTextResponse("not from the dashboard's page", 403)
    name, answer = cookie_name(request.url.port), PlainTextResponse("ok")
    if request.method == "DELETE":
        answer.delete_cookie(name)
        return answer
    token = (await request.body())[:200].decode("ascii", "replace")
    if Accounts(accounts_path()).of_session(token) is None:
        return PlainTextResponse("no such session", 403)
    answer.set_cookie(
        name,
        token,
        max_age=int(SESSION_SECONDS),
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
    return answer
