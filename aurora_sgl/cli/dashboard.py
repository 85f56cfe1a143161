"""dashboard: the web page, its accounts, and its roles in PostgreSQL."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

from aurora_sgl import environment
from aurora_sgl.cli.shared import AsJson, open_store, print_rows
from aurora_sgl.errors import AuroraError

if TYPE_CHECKING:
    from aurora_sgl.store.accounts import Accounts

dashboard_app = typer.Typer(help="The web page for operators, and who may open it.")

Name = Annotated[str, typer.Argument(help="Name of the account.")]


def _pages(module: str) -> ModuleType:
    """A module of the dashboard: inside the installed package, or at the repository's top."""
    package = Path(__file__).resolve().parents[1]
    name = "aurora_sgl._dashboard" if (package / "_dashboard").is_dir() else "dashboard"
    return importlib.import_module(f"{name}.{module}")


@dashboard_app.callback(invoke_without_command=True)
def dashboard(
    context: typer.Context,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free port.")] = 8501,
    host_name: Annotated[
        list[str] | None,
        typer.Option(help="Name under which a proxy before it shows it; may be repeated."),
    ] = None,
    base_path: Annotated[
        str | None, typer.Option(help="Path under which a proxy shows it, such as /aurora.")
    ] = None,
    trusted_proxy: Annotated[
        list[str] | None,
        typer.Option(help="Address or network of a proxy whose X-Forwarded-For is believed."),
    ] = None,
    nice: Annotated[int, typer.Option(min=0, max=19, help="Niceness of the process.")] = 0,
) -> None:
    """Start the web page for operators. The first start prints a link that makes an account."""
    if context.invoked_subcommand is not None:
        return
    from aurora_sgl.processes.priority import step_back

    if nice:
        step_back(nice)
    if environment.is_set(environment.EXIT_WITH_PARENT):
        from aurora_sgl.processes.bound_to_parent import exit_with_parent

        exit_with_parent()
    _pages("server").serve(host, port, names=host_name, base=base_path, proxies=trusted_proxy)


@dashboard_app.command("add-user")
def add_user(
    name: Name,
    role: Annotated[str, typer.Option(help="viewer: may look; operator: may act.")] = "viewer",
    openid: Annotated[
        bool, typer.Option("--openid", help="Logs in through OpenID Connect; NAME is its email.")
    ] = False,
    password_stdin: Annotated[
        bool, typer.Option("--password-stdin", help="Read the password from standard input.")
    ] = False,
) -> None:
    """Add an account, or change the role and password of an existing one."""
    import getpass

    password: str | None = None
    if password_stdin:
        password = sys.stdin.readline().rstrip("\r\n")
    elif not openid:
        if not sys.stdin.isatty():
            raise AuroraError("no terminal to ask for a password; use --password-stdin")
        password = getpass.getpass("password: ")
        if getpass.getpass("again: ") != password:
            raise AuroraError("the two passwords differ")
    account = _accounts().add(name, role, None if openid else password)
    print(f"{account.role} {account.name!r} may log in{' with OpenID Connect' if openid else ''}")


@dashboard_app.command("remove-user")
def remove_user(name: Name) -> None:
    """Remove an account; it is logged out at once."""
    _accounts().remove(name)
    print(f"account {name!r} is removed")


@dashboard_app.command("users")
def users(as_json: AsJson = False) -> None:
    """List the accounts."""
    rows = [
        {"name": one.name, "role": one.role, "login": "password" if one.has_password else "openid"}
        for one in _accounts().all()
    ]
    columns = {"name": "name", "role": "role", "logs in with": "login"}
    print_rows("accounts", columns, rows, as_json)


@dashboard_app.command("sql-role")
def sql_role() -> None:
    """PostgreSQL: make the two roles with which the SQL page reads, and nothing else."""
    from aurora_sgl.store.queries.sql_console import keep_roles, make_sql_roles

    path = _pages("server").sql_roles_path()
    keep_roles(path, make_sql_roles(open_store()))
    print(f"the SQL page's roles are made; their passwords are kept in {path}")


def _accounts() -> Accounts:
    from aurora_sgl.store.accounts import Accounts

    return Accounts(_pages("server").accounts_path())
