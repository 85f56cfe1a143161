"""What a person reads when the store can't be had."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

import pytest

from aurora_sgl import store
from aurora_sgl.errors import AuroraError
from aurora_sgl.store import queries
from aurora_sgl.store.link import StoreAway, StoreLink


def message(url: str) -> str:
    with pytest.raises(AuroraError) as caught:
        store.connect(url)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_an_unreachable_server_is_one_line_without_the_password() -> None:
    with socket.socket() as held:  # bound and not listening: nobody else takes the port
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        text = message(f"postgresql://ada:s3cret-word@127.0.0.1:{port}/aurora")
    assert "can't be reached" in text and "AURORA_DATABASE_URL" in text
    assert f"ada:***@127.0.0.1:{port}" in text
    assert "s3cret-word" not in text


def test_a_wrong_password_or_database_is_named_without_the_password(postgres_url: str) -> None:
    text = message(postgres_url.replace("postgres:@/postgres?", "postgres:s3cret@/nothere?"))
    assert "nothere" in text and "does not exist" in text
    assert "s3cret" not in text


@pytest.mark.parametrize("url", ["mysql://root:pw@host/db", "nonsense", "oracle://a:pw@b/c"])
def test_a_url_that_we_do_not_speak_says_what_we_do(url: str) -> None:
    text = message(url)
    assert "sqlite" in text and "postgresql" in text
    assert "pw" not in text


def test_a_file_that_is_no_database_is_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("dear diary " * 200)
    assert "not a database" in message(f"sqlite:///{path}")
    assert path.read_text() == "dear diary " * 200


def test_a_folder_in_the_place_of_the_file_is_refused(tmp_path: Path) -> None:
    assert "can't be reached" in message(f"sqlite:///{tmp_path}")


def test_a_parent_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    assert "can't be made" in message(f"sqlite:///{tmp_path / 'taken' / 'aurora.db'}")


def test_a_missing_folder_is_made(tmp_path: Path) -> None:
    store.connect(f"sqlite:///{tmp_path / 'new' / 'deep' / 'aurora.db'}").dispose()
    assert os.path.exists(tmp_path / "new" / "deep" / "aurora.db")


def test_writing_sessions_that_read_first_wait_for_each_other(tmp_path: Path) -> None:
    """With a deferred transaction the second one would fail with 'database is locked'."""
    import threading

    from sqlalchemy import text

    engine = store.connect(f"sqlite:///{tmp_path / 'a.db'}")
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE n (v INTEGER)"))
        connection.execute(text("INSERT INTO n VALUES (0)"))

    def count() -> None:
        for _ in range(25):
            with store.session(engine) as s:
                v = s.scalar(text("SELECT v FROM n"))
                s.execute(text("UPDATE n SET v = :v"), {"v": v + 1})

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with store.reading(engine) as connection:
        assert connection.scalar(text("SELECT v FROM n")) == 100


def test_a_session_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    from sqlalchemy import text

    engine = store.connect(f"sqlite:///{tmp_path / 'a.db'}")
    store.upgrade(engine)
    from aurora_sgl.store import queries

    with pytest.raises(RuntimeError), store.session(engine) as s:
        queries.groups.ensure_group(s, "default", "t", "", "x")
        raise RuntimeError
    with store.reading(engine) as connection:
        assert connection.scalar(text("SELECT count(*) FROM deployment_group")) == 0


def test_a_session_in_which_nothing_was_asked_is_no_sign_that_the_store_is_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aurora_sgl.store.link")
    path = tmp_path / "aurora.db"
    link = StoreLink(f"sqlite:///{path}")
    with link.session() as s:
        queries.groups.groups(s)
    answered = link.last_ok
    assert answered
    with link.session():
        pass
    assert link.last_ok == answered
    path.rename(tmp_path / "elsewhere.db")
    for _ in range(2):
        with pytest.raises(StoreAway), link.session() as s:
            queries.groups.groups(s)
    (tmp_path / "elsewhere.db").rename(path)
    with link.session():
        pass
    assert "the store is back" not in caplog.text
    with link.session() as s:
        queries.groups.groups(s)
    assert caplog.text.count("the store is away") == caplog.text.count("the store is back") == 1
    assert link.last_ok > answered
    link.close()
