"""Accounts: who may log in, for how long, and how fast one may guess."""

from __future__ import annotations

import sqlite3
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aurora_sgl.errors import AuroraError, Refused
from aurora_sgl.store import accounts as module
from aurora_sgl.store.accounts import Accounts

PASSWORD = "a long enough one"


@pytest.fixture
def accounts(tmp_path: Path) -> Accounts:
    return Accounts(tmp_path / "accounts.db")


def test_passwords_and_tokens_are_kept_as_hashes_in_a_file_of_the_owner(
    accounts: Accounts,
) -> None:
    setup = accounts.offer_setup()
    assert setup is not None
    accounts.set_up(setup, "Ada", PASSWORD)
    token = accounts.open_session("ada")
    assert stat.S_IMODE(accounts.path.stat().st_mode) == 0o600
    with sqlite3.connect(accounts.path) as db:
        dump = "\n".join(db.iterdump())
    assert "$argon2id$" in dump
    assert not any(secret in dump for secret in (PASSWORD, token, setup))


def test_the_first_operator_is_made_once(accounts: Accounts) -> None:
    first, second = accounts.offer_setup(), accounts.offer_setup()
    assert first and second and first != second
    with pytest.raises(Refused):
        accounts.set_up(first, "eve", PASSWORD)  # a newer link makes it void
    assert accounts.set_up(second, "ada", PASSWORD).role == "operator"
    with pytest.raises(Refused):
        accounts.set_up(second, "eve", PASSWORD)
    assert accounts.offer_setup() is None


def test_a_wrong_name_and_a_wrong_password_are_told_alike(accounts: Accounts) -> None:
    accounts.add("ada", "viewer", PASSWORD)
    said = set()
    for name, password in (("ada", "wrong"), ("nobody", PASSWORD)):
        with pytest.raises(Refused) as refused:
            accounts.log_in(name, password)
        said.add(str(refused.value))
    assert len(said) == 1
    assert accounts.log_in(" ADA ", PASSWORD).name == "ada"


def test_each_failed_login_beyond_three_doubles_the_wait(
    accounts: Accounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    accounts.add("ada", "viewer", PASSWORD)
    now = time.time()
    monkeypatch.setattr(module.time, "time", lambda: now)
    for _ in range(4):
        with pytest.raises(Refused, match="wrong"):
            accounts.log_in("ada", "guess", "10.0.0.1")
    with pytest.raises(Refused, match="try again in 2 s"):
        accounts.log_in("ada", PASSWORD, "10.0.0.1")
    with pytest.raises(Refused, match="try again in 2 s"):
        accounts.log_in("vera", PASSWORD, "10.0.0.1")  # the address waits, whatever the name
    now += 2.1
    with pytest.raises(Refused, match="wrong"):
        accounts.log_in("ada", "guess", "10.0.0.1")
    with pytest.raises(Refused, match="try again in 4 s"):
        accounts.log_in("ada", PASSWORD, "10.0.0.1")
    now += 4.1
    assert accounts.log_in("ada", PASSWORD, "10.0.0.1").name == "ada"
    with pytest.raises(Refused, match="wrong"):
        accounts.log_in("ada", "guess", "10.0.0.1")  # the count began anew


def test_a_session_ends_by_itself_and_with_every_change_of_the_account(
    accounts: Accounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    accounts.add("ada", "operator", PASSWORD)
    token = accounts.open_session("ada")
    assert accounts.of_session(token) is not None
    accounts.add("ada", "viewer", PASSWORD)
    assert accounts.of_session(token) is None
    token = accounts.open_session("ada")
    accounts.remove("ada")
    assert accounts.of_session(token) is None
    accounts.add("ada", "viewer", PASSWORD)
    token, now = accounts.open_session("ada"), time.time()
    monkeypatch.setattr(module.time, "time", lambda: now + module.SESSION_SECONDS + 1)
    assert accounts.of_session(token) is None


@pytest.mark.parametrize(
    ("name", "role", "password"),
    [("", "viewer", PASSWORD), ("ada", "king", PASSWORD), ("ada", "viewer", "short"),
     ("a\nb", "viewer", PASSWORD)],
)  # fmt: skip
def test_bad_accounts_are_refused_in_one_line(
    accounts: Accounts, name: str, role: str, password: str
) -> None:
    with pytest.raises(AuroraError) as error:
        accounts.add(name, role, password)
    assert "\n" not in str(error.value)
    assert accounts.all() == []


def test_an_openid_account_has_no_password_that_fits(accounts: Accounts) -> None:
    accounts.add("ada@example.org", "operator", None)
    for password in ("", PASSWORD):
        with pytest.raises(Refused):
            accounts.log_in("ada@example.org", password)


def test_accounts_are_made_on_the_command_line(tmp_path: Path) -> None:
    def run(*arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "aurora_sgl.cli", "dashboard", *arguments],
            input=typed, capture_output=True, text=True, check=False,
            env={"PATH": "", "AURORA_HOME": str(tmp_path),
                 "PYTHONPATH": str(Path(__file__).parents[2])},
        )  # fmt: skip

    made = run("add-user", "Ada", "--role", "operator", "--password-stdin", typed=f"{PASSWORD}\n")
    assert made.returncode == 0, made.stderr
    accounts = Accounts(tmp_path / "dashboard" / "accounts.db")
    assert accounts.log_in("ada", PASSWORD).role == "operator"
    refused = run("add-user", "eve", "--password-stdin", typed="short\n")
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1 and "at least 10 characters" in refused.stderr
    assert '"role": "operator"' in run("users", "--json").stdout
    assert run("remove-user", "ada").returncode == 0
    assert run("remove-user", "ada").returncode == 1
