"""Accounts: who may log in, for how long, and how fast one may guess."""

from __future__ import annotations

import sqlite3
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from argon2 import PasswordHasher

from aurora_sgl.errors import AuroraError, Refused
from aurora_sgl.store import accounts as accounts_module
from aurora_sgl.store import throttle
from aurora_sgl.store.accounts import Accounts

PASSWORD = "a long enough one"


@pytest.fixture
def accounts(tmp_path: Path) -> Accounts:
    """With argon2 at its least cost: what is tried here is not how long a hash takes."""
    accounts = Accounts(tmp_path / "accounts.db")
    accounts._hasher = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
    return accounts


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


class Clock:
    """The time that the accounts see."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = time.time()
        for module in (accounts_module, throttle):
            monkeypatch.setattr(module.time, "time", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def fails(accounts: Accounts, name: str, address: str, message: str = "wrong") -> None:
    with pytest.raises(Refused, match=message):
        accounts.log_in(name, "guess", address)


def test_each_failed_login_beyond_three_doubles_the_wait_of_this_name_at_this_address(
    accounts: Accounts, clock: Clock
) -> None:
    for name in ("ada", "vera"):
        accounts.add(name, "viewer", PASSWORD)
    for _ in range(4):
        fails(accounts, "ada", "10.0.0.1")
    for seconds in (2, 4, 8):
        with pytest.raises(Refused, match=f"try again in {seconds} s"):
            accounts.log_in("ADA", PASSWORD, "10.0.0.1")  # not looked at
        assert accounts.log_in("vera", PASSWORD, "10.0.0.1").name == "vera"
        assert accounts.log_in("ada", PASSWORD, "10.0.0.2").name == "ada"
        clock.now += seconds + 0.1
        if seconds < 8:
            fails(accounts, "ada", "10.0.0.1")
    assert accounts.log_in("ada", PASSWORD, "10.0.0.1").name == "ada"
    fails(accounts, "ada", "10.0.0.1")  # the count began anew


@pytest.mark.parametrize("address", ["10.0.0.1", "local"])
def test_one_wrong_login_every_five_minutes_keeps_nobody_out(
    accounts: Accounts, clock: Clock, address: str
) -> None:
    """Neither of the name that is guessed, nor of those who come from the same address."""
    for name in ("ada", "vera"):
        accounts.add(name, "operator", PASSWORD)
    for _ in range(9):
        fails(accounts, "ada", address)
        clock.now += 1
        assert accounts.log_in("vera", PASSWORD, address).name == "vera"
        clock.now += 299
    fails(accounts, "ada", address)
    assert accounts.log_in("ada", PASSWORD, address).name == "ada"


def test_who_guesses_one_name_from_everywhere_keeps_its_owner_out_nowhere_else(
    accounts: Accounts, clock: Clock
) -> None:
    accounts.add("ada", "operator", PASSWORD)
    for number in range(20):
        fails(accounts, "ada", f"203.0.113.{number}")
    assert accounts.log_in("ada", PASSWORD, "10.0.0.1").name == "ada"


@pytest.mark.parametrize(
    "addresses",
    [["10.0.0.9"], ["::ffff:10.0.0.9", "10.0.0.9"],
     [f"2001:db8::{number:x}:1" for number in range(1, 40)]],
    ids=["one address", "one in two spellings", "a network of IPv6"],
)  # fmt: skip
def test_who_guesses_many_names_waits_too_and_a_login_that_fits_does_not_clear_it(
    accounts: Accounts, clock: Clock, addresses: list[str]
) -> None:
    accounts.add("eve", "viewer", PASSWORD)
    for number in range(31):
        fails(accounts, f"name {number}", addresses[number % len(addresses)])
        if number in (0, 29):
            assert accounts.log_in("eve", PASSWORD, addresses[0]).name == "eve"
    fails(accounts, "another", addresses[0], "try again in 2 s")
    clock.now += 40 * throttle.FADE_SECONDS
    fails(accounts, "another", addresses[0])


def test_a_clock_that_is_set_back_keeps_nobody_out(accounts: Accounts, clock: Clock) -> None:
    accounts.add("ada", "operator", PASSWORD)
    for _ in range(4):
        fails(accounts, "ada", "10.0.0.1")
    clock.now -= 86_400
    assert accounts.log_in("ada", PASSWORD, "10.0.0.1").name == "ada"


def test_what_was_typed_is_not_kept_and_what_has_faded_goes(
    accounts: Accounts, clock: Clock
) -> None:
    for number in range(20):
        fails(accounts, f"{PASSWORD} {number}", "10.0.0.1" * 400)
    with sqlite3.connect(accounts.path) as db:
        assert PASSWORD not in "\n".join(db.iterdump())
    clock.now += 86_400
    fails(accounts, "x", "y")
    with sqlite3.connect(accounts.path) as db:
        assert db.execute("SELECT count(*) FROM failed_login").fetchone() == (2,)


def test_accounts_of_an_earlier_release_are_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "accounts.db"
    Accounts(path).add("ada", "operator", PASSWORD)
    with sqlite3.connect(path) as db:
        db.execute("DROP TABLE failed_login")
        db.execute("CREATE TABLE failure (key TEXT PRIMARY KEY, count INTEGER, free_at REAL)")
        db.execute("INSERT INTO failure VALUES ('name:ada', 99, 1e12)")
    assert Accounts(path).log_in("ada", PASSWORD, "10.0.0.1").name == "ada"


def test_a_session_ends_by_itself_and_with_every_change_of_the_account(
    accounts: Accounts, clock: Clock
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
    token = accounts.open_session("ada")
    clock.now += accounts_module.SESSION_SECONDS + 1
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
