"""What ``benchmarks.fuzz`` feeds odd inputs to: the readers that a server and its operators have.

A kind is made once in a process of its own, with a folder, and given one random generator an
input. It answers whether the input was taken or refused in words; whatever else it raises is a
finding.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from aurora_sgl.errors import AuroraError
from benchmarks.fuzz_mutations import (
    ODD_TEXTS,
    ODD_VALUES,
    REFUSED,
    TAKEN,
    odd_bytes,
    odd_json,
    odd_text,
)
from benchmarks.samplers import probabilities, verified

VOCABULARY = 100
#: What the front reads of SGLang's tokenizer manager.
_MANAGER = SimpleNamespace(
    model_config=SimpleNamespace(vocab_size=VOCABULARY), server_status=None, enable_metrics=False
)


class Broken(Exception):
    """What should hold after any input does not."""


def one_line(error: Exception) -> str:
    """The answer ``REFUSED``; raises :class:`Broken` for a refusal that is no line."""
    text = str(error)
    if not text.strip() or "\n" in text:
        raise Broken(f"a refusal that is not one line: {text[:200]!r}")
    text.encode()
    return REFUSED


class Requests:
    """Headers and bodies, through the middleware, the front's checks and SGLang's, its samplers,
    labels, and the records."""

    def __init__(self, folder: Path) -> None:
        import aurora_sgl.compat  # noqa: F401  (before transformers asks for torchvision)
        from aurora_sgl import environment
        from aurora_sgl.engine import cpu, labels

        cpu.install()
        from aurora_sgl.engine.recorder import Recorder

        if not environment.value(environment.STAMP):
            labels.new_stamp()
        self.recorder = Recorder(9, train_by_default=True, capture_share=1.0, dp_rank=0)
        # SGLang's samplers take half a minute to import, which is no input's fault.
        probabilities(verified({}, 8), 8)

    def __call__(self, rng: random.Random) -> str:
        return asyncio.run(self._serve(rng))

    async def _serve(self, rng: random.Random) -> str:
        from aurora_sgl.engine.labels import HeaderMiddleware

        answer = ""

        async def app(scope: Any, receive: Any, send: Any) -> None:
            nonlocal answer
            answer = self._request(rng, dict(scope["headers"]))

        scope = {"type": "http", "headers": self._headers(rng)}
        await HeaderMiddleware(app)(scope, _nothing, _nothing)
        return answer

    def _headers(self, rng: random.Random) -> list[tuple[bytes, bytes]]:
        names = (b"x-aurora-domain", b"X-Aurora-Train", b"x-aurora-speculate", b"x-aurora-warmup",
                 b"x-aurora-conversation", b"x-aurora-", b"content-type")  # fmt: skip
        values = (b"support", b"yes", b"no", b"whole", "客服".encode(), b"")
        pairs = []
        for _ in range(rng.randrange(5)):
            value = rng.choice((*values, rng.choice(ODD_TEXTS).encode("utf-8", "surrogatepass")))
            value = odd_bytes(value, rng) if rng.random() < 0.5 else value
            pairs.append((rng.choice(names), value))
        return pairs

    def _request(self, rng: random.Random, headers: Mapping[bytes, bytes]) -> str:
        from sglang.srt.managers.io_struct import GenerateReqInput

        from aurora_sgl import wire
        from aurora_sgl.engine import front, labels
        from aurora_sgl.engine.plan import RequestPlan

        sampling = dict.fromkeys(
            ("logit_bias", "json_schema", "regex", "ebnf", "structural_tag", "custom_params")
        )
        body: dict[str, Any] = {
            "rid": "mine",
            "session_id": None,
            "input_ids": [1, 2, 3],
            "cached_tokens": 0,
            "sampling": {
                **sampling, "temperature": 0.7, "top_p": 1.0, "top_k": -1, "min_p": 0.0,
                "max_new_tokens": 16, "min_new_tokens": 0, "frequency_penalty": 0.0,
                "presence_penalty": 0.0, "repetition_penalty": 1.0,
            },
        }  # fmt: skip
        body = _filled(odd_json(body, rng), body)
        ids = body["input_ids"] if isinstance(body["input_ids"], list) else [body["input_ids"]]
        obj = GenerateReqInput(rid="mine", input_ids=[1, 2, 3], sampling_params=body["sampling"])
        try:
            front.check_ids(ids, VOCABULARY)
            front.normalize(GenerateReqInput.normalize_batch_and_arguments, obj)
            one = obj if obj.is_single else obj[0]
            params = front.create_tokenized_object(_tokenized, _MANAGER, one).sampling_params
        except ValueError as error:
            return one_line(error)
        if not probabilities(params, VOCABULARY).isfinite().all():
            raise Broken(f"no sampler takes {body['sampling']!r}")
        labels.take(params)
        own = params.custom_params
        labels.attach(params, warmup=False)
        said = labels.take(params)
        if not said.stamped or len(said.domain) > labels.MAX_LABEL:
            raise Broken(f"the headers {dict(headers)!r} became {said!r}")
        if isinstance(own, dict | None) and params.custom_params != own:
            raise Broken(f"a client's custom_params {own!r} became {params.custom_params!r}")
        request = SimpleNamespace(
            rid=body["rid"], session_id=body["session_id"], origin_input_ids=ids,
            sampling_params=params, cached_tokens=body["cached_tokens"],
        )  # fmt: skip
        state = self.recorder.begin(request, RequestPlan(True, labels=said), follow=False)
        if state is None:
            return TAKEN
        started = self.recorder.started(request, state)
        (again,) = wire.decode_envelope(wire.encode(wire.Envelope(9, 1, [started]))).records
        assert isinstance(again, wire.RequestStarted)
        json.dumps(again.sampling, allow_nan=False).encode()
        for text in (again.rid, again.domain):
            if set(text.encode().decode()) & set("\x00\n\x1b\u2028"):
                raise Broken(f"a record holds {text!r}")
        return TAKEN


async def _nothing(*_: Any) -> None:
    return None


def _tokenized(manager: Any, obj: Any) -> Any:
    return SimpleNamespace(sampling_params=verified(obj.sampling_params, VOCABULARY))


def _filled(value: Any, whole: dict[str, Any]) -> dict[str, Any]:
    return {**whole, **value} if isinstance(value, dict) else dict(whole)


_PLACES = ("~/x", "sqlite:///~/x.db", "file://~/y", "[1]", "{}", "sqlite:///", "postgresql://")


class SettingsOfAll:
    """Environment and ``.env``, for commands (one line or all is well) and for SGLang's processes
    (which start whatever they say)."""

    def __init__(self, folder: Path) -> None:
        from aurora_sgl import config

        self.folder = folder
        self.classes: list[Any] = [
            config.Settings, config.GateSettings, config.WatchSettings, config.TrialSettings,
            config.SchedulerSettings,
        ]  # fmt: skip
        self.names = [
            f"{one.model_config['env_prefix']}{field.upper()}"
            for one in self.classes
            for field in one.model_fields
        ]

    def __call__(self, rng: random.Random) -> str:
        before, place = dict(os.environ), os.getcwd()
        lines = []
        for name in rng.sample(self.names, rng.randint(1, 4)):
            text = str(rng.choice((*ODD_VALUES[:16], *ODD_TEXTS, *_PLACES)))
            raw = text.replace("\x00", "").encode("utf-8", "surrogatepass")
            value = raw.decode("utf-8", "surrogateescape")  # as Python reads an environment
            if rng.random() < 0.5:
                os.environ[name] = value
            else:
                lines.append(f"{name}={value}\n".encode("utf-8", "surrogateescape"))
        try:
            os.chdir(self.folder)
            content = b"".join(lines)
            (self.folder / ".env").write_bytes(odd_bytes(content, rng) if lines else b"")
            return self._read()
        finally:
            os.chdir(place)
            os.environ.clear()
            os.environ.update(before)

    def _read(self) -> str:
        from pydantic import ValidationError
        from pydantic_settings import SettingsError

        from aurora_sgl import config

        answer = TAKEN
        for each in self.classes:
            try:
                each().model_dump_json()
            except ValidationError as error:
                answer = one_line(AuroraError(error.errors()[0]["msg"]))
            except (SettingsError, UnicodeDecodeError):  # the command line has words for these
                answer = REFUSED
        settings, lines = config.read_forgiving()
        for text in (*lines, settings.group, settings.server_name, settings.store_url):
            text.encode()
        return answer


class PromptFiles:
    def __init__(self, folder: Path) -> None:
        self.path = folder / "prompts.jsonl"
        self.rows = [
            {"prompt": f"What is {n}?", "domain": "chat", "max_tokens": 9, "held_out": n % 3 == 0,
             "temperature": 0.5}
            for n in range(6)
        ]  # fmt: skip

    def __call__(self, rng: random.Random) -> str:
        from aurora_sgl.demo.prompts import load_prompts, to_measure, to_serve

        rows = odd_json(self.rows, rng) if rng.random() < 0.7 else self.rows
        lines = [json.dumps(row) for row in (rows if isinstance(rows, list) else [rows])]
        encoding = rng.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"))
        content = "\n".join(lines).encode(encoding, "replace")
        self.path.write_bytes(odd_bytes(content, rng) if rng.random() < 0.5 else content)
        try:
            prompts = load_prompts(self.path)
        except AuroraError as error:
            return one_line(error)
        for prompt in (*to_serve(prompts), *to_measure(prompts)):
            json.dumps([prompt.prompt, prompt.domain], allow_nan=False).encode()
            prompt.prompt.encode()
        return TAKEN


class Statements:
    """Typed on the SQL page, as a viewer, in SQLite."""

    own_statements: tuple[str, ...] = (
        "WITH n ( x ) AS ( VALUES ( 1 ) ) SELECT x , 'a' || x FROM n",
        "SELECT json_extract ( sampling , '$.top_k' ) FROM request WHERE id > 1",
        "SELECT hex ( randomblob ( 9 ) ) , 1 / 0 , CAST ( 'x' AS INTEGER )",
    )
    own_words: tuple[str, ...] = (
        "ATTACH 'x' AS y", "PRAGMA", "sqlite_master", "GLOB", "load_extension('x')", "char(0)",
    )  # fmt: skip

    def __init__(self, folder: Path) -> None:
        from aurora_sgl import store
        from aurora_sgl.store.queries.sql_console import TABLES, VIEWS

        self.engine = store.connect(self.store_url(folder))
        store.upgrade(self.engine)
        names = (*TABLES, *VIEWS)
        self.statements = [
            *(f"SELECT * FROM {name} LIMIT 3" for name in names),
            "SELECT version_id , count(*) FROM request GROUP BY version_id ORDER BY 2 DESC",
            "SELECT conversation_hash , rid FROM request UNION SELECT name , '' FROM server",
            *self.own_statements,
        ]
        self.words = (
            "SELECT", "FROM", "WHERE", "JOIN", "DELETE FROM request", "UPDATE", "--", "/*", "*/",
            ";", "'", '"', "(", ")", "NULL", "OVER ()", "LIKE '%'", "EXPLAIN",
            *self.own_words, *names,
        )  # fmt: skip
        self.role_url = self.viewer_url()

    def store_url(self, folder: Path) -> str:
        return f"sqlite:///{folder / 'aurora.db'}"

    def viewer_url(self) -> str:
        return ""

    def __call__(self, rng: random.Random) -> str:
        from aurora_sgl.store.queries.sql_console import run_sql

        typed = rng.choice(self.statements)
        words = (odd_text(typed, rng) if rng.random() < 0.7 else typed).split(" ")
        if rng.random() < 0.5:
            words.insert(rng.randrange(len(words) + 1), rng.choice(self.words))
        typed = " ".join(words).encode("utf-8", "replace").decode()  # as a socket carries it
        try:
            answer = run_sql(
                self.engine, typed, with_tokens=False, role_url=self.role_url, seconds=2.0
            )
        except AuroraError as error:
            return one_line(error)
        if any(b for row in answer.rows for b in row if isinstance(b, bytes)):
            raise Broken("an answer holds bytes")
        return TAKEN


class PostgresStatements(Statements):
    """The same in PostgreSQL, with the viewer's role, in a database of its own of the cluster at
    the URL in ``FUZZ_POSTGRES``."""

    own_statements = (
        "WITH n ( x ) AS ( VALUES ( 1 ) ) SELECT x , 'a' || x FROM n",
        "SELECT sampling ->> 'top_k' FROM request WHERE id > 1",
        "SELECT generate_series ( 1 , 5 ) , now ( ) , 1 / 2 , CAST ( '7' AS integer )",
        "SELECT current_user , version ( ) , array [ 1 , 2 ] , '{}' :: jsonb , 'a' :: bytea",
    )
    own_words = (
        "SET ROLE postgres", "RESET ALL", "COPY request TO PROGRAM 'x'", "DO $$ $$", "$$", "::",
        "pg_sleep(60)", "pg_read_file('x')", "pg_advisory_lock(1)", "set_config('a.b','c',false)",
        "pg_catalog", "repeat('x',1000000000)", "generate_series(1,1000000000)", "FOR UPDATE",
        "LISTEN x", "LOCK request", "chr(0)", "E'\\000'", "U&'\\D83D'", "'NaN'::float8",
        "'infinity'::timestamptz", "'1000000 years'::interval", "xmlparse(document '<a/>')",
    )  # fmt: skip

    def store_url(self, folder: Path) -> str:
        from sqlalchemy import make_url

        from aurora_sgl import store

        cluster, name = os.environ["FUZZ_POSTGRES"], f"fuzz_{os.getpid()}"
        admin = store.connect(cluster).execution_options(isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
        admin.dispose()
        return make_url(cluster).set(database=name).render_as_string(hide_password=False)

    def viewer_url(self) -> str:
        from aurora_sgl.store.queries.sql_console import make_sql_roles

        return make_sql_roles(self.engine)["viewer"]


def copied(source: Path, place: Path) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(source, place)
    return place
