"""Every setting, once. The environment (``AURORA_*``), an ``.env`` file and flags feed these.

``environment`` has the few variables that are read before pydantic is there, and the internal ones;
they are listed here too. docs/settings.md documents all of them, which a test holds it to.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SecretsSettingsSource,
    SettingsConfigDict,
)

from aurora_sgl import environment
from aurora_sgl.environment import ENABLED, INTERNAL, LOG_FORMAT, SECRETS
from aurora_sgl.limits import Limits

#: What has no field: see ``environment``.
NOT_FIELDS = (ENABLED, LOG_FORMAT, SECRETS, *INTERNAL)


def secret_folders() -> list[str]:
    """Folders in which a file named after a setting, such as ``aurora_database_url``, holds its
    value: the one that ``AURORA_SECRETS`` names, and systemd's of a unit's credentials."""
    names = (environment.value(SECRETS), environment.value("CREDENTIALS_DIRECTORY"))
    return [name for name in names if name and os.path.isdir(name)]


class TextSettings(BaseSettings):
    """Settings whose values are text, at any depth: bytes of an environment that are none can't be
    stored, logged or shown."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, the environment, the ``.env`` file, then files named after settings."""
        files = [SecretsSettingsSource(settings_cls, secrets_dir=one) for one in secret_folders()]
        return (init_settings, env_settings, dotenv_settings, *files)

    @field_validator("*", mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        if any("\ud800" <= letter <= "\udfff" for text in _texts(value) for letter in text):
            raise ValueError("it is no UTF-8 text")
        return value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts([*value.keys(), *value.values()])
    elif isinstance(value, Sequence):
        for one in value:
            yield from _texts(one)


class Settings(TextSettings):
    """Settings of all rooms. A field is read from ``AURORA_`` and its name in capitals."""

    model_config = SettingsConfigDict(env_prefix="AURORA_", env_file=".env", extra="ignore")

    home: Path = Path("aurora-data")
    """Data folder: the embedded database, artifacts, spool, logs, converted models."""

    database_url: str = ""
    """SQLAlchemy URL of the store; empty: a SQLite file in the data folder."""

    database_seconds: float = Field(default=20.0, ge=1.0)
    """Seconds that PostgreSQL may take for one statement of a sidecar or scheduler, which then does
    it again; three more without an answer, and the connection counts as lost."""

    artifacts: str = ""
    """fsspec URL of the root for weights and traces; empty: a folder in the data folder."""

    group: str = "default"
    """Name of the deployment group that a server joins."""

    server_name: str = ""
    """Name of this server in the store; empty: host name and port."""

    record: bool = True
    """Record verify steps."""

    capture_share: float = Field(default=1.0, ge=0.0, le=1.0)
    """Share of consenting requests whose hidden states are captured."""

    capture_bytes: int = Field(default=2 * 1024**3, ge=0)
    """Byte budget of a new group's trace files; the oldest go first. 0: this server captures
    nothing."""

    capture_format: str = Field(default="auto", pattern="^(auto|full|compact)$")
    """Rows of trace files: full, as the target computed them; compact, in 4 and 6 bits a number
    with scales for blocks of 32; auto: compact for targets with a hidden size of 2,048 or more."""

    capture_request_bytes: int = Field(default=128 * 1024**2, ge=1)
    """Bytes that the trace of one request may have; one that may become longer is not traced."""

    capture_bytes_per_second: int = Field(default=64 * 1024**2, ge=1)
    """Bytes of traces a second, on average, that requests are chosen for."""

    capture_ring_bytes: int = Field(default=64 * 1024**2, ge=1024**2)
    """Bytes of shared memory through which rows go from the engine to its sidecar."""

    capture_backlog_bytes: int = Field(default=1024**3, ge=0)
    """Bytes of forwards that the engine keeps until traced rows are copied out of them; beyond it
    traces are dropped."""

    train_by_default: bool = True
    """Whether a request without the x-aurora-train header may be used for training."""

    keep_opted_out_tokens: bool = False
    """Whether the store keeps the tokens of requests that may not be learnt from. Off: of their
    verify steps it has the counts alone."""

    most_domains: int = Field(default=200, ge=1)
    """Names of domains that clients of a group may use on one day (UTC); requests of the rest count
    as ``other``."""

    record_buffer: int = Field(default=20_000, ge=1)
    """Records that wait in the engine while the sidecar is away; more are dropped and counted."""

    spool_bytes: int = Field(default=1024**3, ge=0)
    """Bytes of the sidecar's spool while the store is away; more are dropped and counted."""

    spool_keep_minutes: float = Field(default=10.0, ge=0)
    """Minutes for which the spool keeps what the store has, for a store that fails over to a
    replica that is behind; at most a quarter of ``spool_bytes``."""

    trace_memory_bytes: int = Field(default=512 * 1024**2, ge=1)
    """Bytes of unfinished traces that the sidecar holds, and that are reserved for requests."""

    health_host: str = "127.0.0.1"
    """Address of the sidecar's /health and /metrics."""

    health_port: int = Field(default=8520, ge=-1, le=65535)
    """Their port, of the second replica the next one, and so on; the default falls to a free one
    where it is taken. 0: a free one; -1: none."""

    speculation: str = Field(default="auto", pattern="^(auto|on|off)$")
    """auto: until speculation is faster than decoding without it, ``explore_share`` of the steps
    carry drafts, then the draft shape that is fastest at each load; on: whole shapes in every
    step; off."""

    explore_share: float = Field(default=0.1, ge=0.0, le=1.0)
    """Exploration share: part of the verify steps that carry drafts until speculation is faster
    than decoding without it."""

    shapes: str = Field(default="off", pattern="^(learned|off)$")
    """On CPU, with drafts that are trees. learned: each step's tree is as large as pays, by how
    sure the drafter is and what steps take; off: one of a few shapes, by the requests at once."""

    cpu_packed_weights: bool = True
    """On CPU in bfloat16: where a library's packed copy of the weights beside them is the fastest
    on this machine, keep one (more memory)."""

    cpu_compiled: bool = True
    """On CPU: compile linear layers, attention and small operations for this machine once, which
    takes a few seconds and a C++ compiler; without one PyTorch's are used."""

    attention: str = Field(default="auto", pattern="^(auto|flashinfer|sdpa)$")
    """Attention of training and replay; auto: FlashInfer on CUDA where it works, else PyTorch."""

    show_text: bool = True
    """Whether the dashboard shows operators tokens, and their text for requests that may be used
    for training. Viewers never see either."""

    dashboard_host_names: str = ""
    """Names, with commas, under which the dashboard is reached beside those of this machine's
    loopback: that of a proxy before it. Under other names it is not answered."""

    dashboard_base_path: str = ""
    """Path under which a proxy shows the dashboard, such as /aurora; empty: at the root."""

    dashboard_trusted_proxies: str = ""
    """Addresses or networks, with commas, of proxies before the dashboard whose X-Forwarded-For and
    X-Forwarded-Proto are believed. Anybody else's are not."""

    price_server_hour: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Money that an hour of one server with its accelerators costs. None: the page and the command
    about worth show no money."""

    price_training_hour: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Money that an hour of one process of training costs."""

    price_currency: str = Field(default="", max_length=12)
    """What stands behind sums of money, such as EUR."""

    artifact_access: str = Field(default="owner", pattern="^(owner|group)$")
    """Who may read and write weights and traces on a local artifact root: owner, or its group too,
    for a trainer or a server of another user. All else in the data folder is the owner's only."""

    retention_days: int = Field(default=30, ge=1, le=36_500)
    """Days that acceptance events are kept. This and the next ones are taken when a group is first
    made; see ``limits``."""

    retention_request_days: int = Field(default=180, ge=1, le=36_500)
    """Days that requests and their traces are kept."""

    retention_minute_days: int = Field(default=30, ge=1, le=36_500)
    """Days that roll-ups are kept by minute; older ones are summed to hours."""

    retention_hour_days: int = Field(default=730, ge=1, le=36_500)
    """Days that roll-ups are kept by hour."""

    retention_versions: int = Field(default=10, ge=0, le=36_500)
    """Newest versions whose weights are kept beside those in use."""

    retention_refused_days: int = Field(default=30, ge=1, le=36_500)
    """Days that refused records are kept in a file."""

    @property
    def limits(self) -> Limits:
        """What a group that is made now keeps, made to agree with each other."""
        return Limits(
            trace_bytes=self.capture_bytes or Settings.model_fields["capture_bytes"].default,
            event_days=self.retention_days,
            request_days=max(self.retention_request_days, self.retention_days),
            minute_days=self.retention_minute_days,
            hour_days=max(self.retention_hour_days, self.retention_minute_days),
            versions=self.retention_versions,
            refused_days=self.retention_refused_days,
        )

    @field_validator("home", "artifacts", "database_url", mode="before")
    @classmethod
    def _expand(cls, value: Any) -> Any:
        return from_home(str(value)) if isinstance(value, str | Path) else value

    @property
    def store_url(self) -> str:
        return self.database_url or f"sqlite:///{self.home.resolve() / 'aurora.db'}"

    @property
    def artifact_root(self) -> str:
        return self.artifacts or str(self.home.resolve() / "artifacts")


#: What may stand before the path in a setting that is a URL.
_LOCAL = re.compile(r"(sqlite(?:\+\w+)?:///|file:/{2,3}|local:/{2,3}|)(~[^/]*)(?=/|$)")


def from_home(text: str) -> str:
    """``~/x`` as the folder that a shell would make of it: in an ``.env`` file, in quotes and
    behind ``sqlite:///`` it does not. Raises ``ValueError`` for the home of nobody."""
    match = _LOCAL.match(text)
    if match is None:
        return text
    home = os.path.expanduser(match[2])
    if home.startswith("~"):
        raise ValueError(f"{match[2]} is no user's home folder")
    prefix = "file://" if match[1].startswith("file:") else match[1]
    return prefix + home + text[match.end() :]


class GateSettings(TextSettings):
    """What a candidate has to show before it may go live. Read from ``AURORA_GATE_*``."""

    model_config = SettingsConfigDict(env_prefix="AURORA_GATE_", env_file=".env", extra="ignore")

    alpha: float = Field(default=0.05, gt=0, lt=0.5)
    """Chance that candidates no better than the live version ever pass against it, all tries
    together: one of a line passes at an e-value of 1 / alpha."""

    requests: int = Field(default=300, ge=2)
    """Newest held-out requests that are replayed."""

    domain_margin: float = Field(default=0.05, ge=0, lt=1)
    """Share of the live version's accept length that no domain may lose."""

    domain_risk: float = Field(default=0.10, gt=0, lt=1)
    """Largest chance that a domain lost more than the margin with which a candidate passes."""


class WatchSettings(TextSettings):
    """What is looked at after a promotion. Read from ``AURORA_WATCH_*``."""

    model_config = SettingsConfigDict(env_prefix="AURORA_WATCH_", env_file=".env", extra="ignore")

    windows: int = Field(default=3, ge=1)
    """Windows that end a watch well."""

    failures: int = Field(default=2, ge=1)
    """Bad or empty windows that roll back. A window that is worse beyond doubt does so alone."""

    steps: int = Field(default=300, ge=1)
    """Verify steps with drafts that end a window."""

    requests: int = Field(default=6, ge=2)
    """Finished requests that a window needs as well."""

    seconds: float = Field(default=600.0, gt=0)
    """A window ends after this time in any case, counted from the first request in it."""

    margin: float = Field(default=0.05, ge=0, lt=1)
    """Share of the accept length before the promotion that may be lost."""

    speed_margin: float = Field(default=0.25, ge=0, lt=1)
    """Share of the tokens per second of a stream, at the same batch size, that may be lost."""

    look_back_hours: float = Field(default=24.0, gt=0)
    """Hours before the promotion from which the comparison is taken."""


class TrialSettings(TextSettings):
    """The switchback trial. Read from ``AURORA_TRIAL_*``."""

    model_config = SettingsConfigDict(env_prefix="AURORA_TRIAL_", env_file=".env", extra="ignore")

    automatic: bool = False
    """Whether the scheduler runs a trial between a passed gate and the promotion."""

    pairs: int = Field(default=8, ge=3)
    """Pairs of windows, one of each version in random order."""

    window_seconds: float = Field(default=60.0, gt=0)
    """Length of one window."""

    warm_seconds: float = Field(default=10.0, ge=0)
    """Beginning of a window that is not counted: the swap, and requests from before it."""

    level: float = Field(default=0.95, gt=0.5, lt=1)
    """Level of the intervals over pairs of windows."""

    speed_margin: float = Field(default=0.03, ge=0, lt=1)
    """Share of tokens per second that a candidate may lose and still pass."""


class SchedulerSettings(TextSettings):
    """When to train. Read from ``AURORA_SCHEDULER_*``."""

    model_config = SettingsConfigDict(
        env_prefix="AURORA_SCHEDULER_", env_file=".env", extra="ignore"
    )

    minutes: float = Field(default=60.0, ge=0)
    """Train at least this often while there are new requests; 0: never by time alone."""

    requests: int = Field(default=200, ge=0)
    """Train after this many new requests that may be learnt from; 0: never by number alone."""

    min_new_requests: int = Field(default=8, ge=1)
    """New requests below which no trigger starts a run."""

    drift: bool = True
    """Train when the accept length of the live version falls, in any domain."""

    drift_threshold: float = Field(default=16.0, gt=0)
    """Threshold of the change detector (Page-Hinkley), in standard deviations of a request; larger:
    fewer false alarms, later."""

    drift_slack: float = Field(default=0.25, ge=0)
    """Fall, in the same unit, that counts as none."""

    cooldown_minutes: float = Field(default=5.0, ge=0)
    """Rest after a run, and before automatic promotions after a rollback."""

    lease_seconds: float = Field(default=15.0, gt=1)
    """A scheduler that says nothing for this long loses its place to another one."""

    pause_queue: float = Field(default=4.0, ge=0)
    """Requests waiting at one server from which training pauses; 0: never for the queue."""

    slow_queue: float = Field(default=1.0, ge=0)
    """Requests waiting at one server from which training takes every second moment only."""

    pause_step_ms: float = Field(default=0.0, ge=0)
    """Median time of a verify step from which training pauses; 0: never for latency."""

    recipe: dict[str, Any] = Field(default_factory=dict)
    """Knobs of the training recipe, such as {"passes": 3}."""

    explore: float = Field(default=0.2, ge=0, le=1)
    """Share of the runs that try one knob of the recipe another way; what past runs earned then
    decides. 0: the recipe as given."""

    stage: str = ""
    """Servers that a version goes to first: a number, or a share such as ``25%``. It goes on to the
    rest by itself once it passed there; empty: all at once. A group of one server has no stage."""

    wait_for_watch: bool = True
    """Promote nothing while the watch over the promotion before is running."""

    host: str = "127.0.0.1"
    """Address of the scheduler's /health and /metrics."""

    port: int = Field(default=8510, ge=-1, le=65535)
    """Their port; the default falls to a free one where it is taken. 0: a free one; -1: none."""

    api_port: int = Field(default=8511, ge=0, le=65535)
    """Port of the read-only API, on the same address. 0: a free one."""

    api_token: SecretStr = SecretStr("")
    """Token of the read-only API, of at least 16 letters; empty: there is no API."""


class NotifySettings(TextSettings):
    """Who is told what people must know. Read from ``AURORA_NOTIFY_*``."""

    model_config = SettingsConfigDict(env_prefix="AURORA_NOTIFY_", env_file=".env", extra="ignore")

    webhook: SecretStr = SecretStr("")
    """Address that each notification is sent to as JSON; empty: none."""

    secret: SecretStr = SecretStr("")
    """Secret by which the webhook's receiver knows that it is us: a signature of HMAC-SHA256, after
    standardwebhooks.com, in base64 behind ``whsec_``, or any text; empty: unsigned."""

    slack: SecretStr = SecretStr("")
    """Address of an incoming webhook of Slack, or of what takes Slack's format; empty: none."""

    kinds: str = ""
    """Kinds of notifications that are sent, with commas; empty: all."""

    link: str = ""
    """Address of the dashboard, for a link in each notification."""

    seconds: float = Field(default=10.0, gt=0, le=300)
    """Seconds that a receiver may take to answer."""

    give_up_hours: float = Field(default=72.0, gt=0)
    """Hours after which a notification that its receiver does not take is given up."""

    keep_days: int = Field(default=90, ge=1, le=36_500)
    """Days that notifications, and alerts that are over, are kept."""

    @field_validator("webhook", "slack", "link")
    @classmethod
    def _is_address(cls, value: SecretStr | str) -> SecretStr | str:
        address = value.get_secret_value() if isinstance(value, SecretStr) else value
        if address and urlsplit(address).scheme not in ("http", "https"):
            raise ValueError("it is no address that begins with http:// or https://")
        return value


def variable_of(error: ValidationError) -> str:
    """The variable that holds the first value that is not usable."""
    prefix = globals()[error.title].model_config["env_prefix"] if error.title in globals() else ""
    name = "_".join(str(part) for part in error.errors()[0]["loc"])
    return f"{prefix}{name}".upper()


def in_words(error: ValidationError) -> list[tuple[str, str]]:
    """(field, what is wrong with its value) of each setting that is not usable."""
    return [
        ("_".join(str(part) for part in one["loc"]), f"{_short(one['input'])}: {one['msg']}")
        for one in error.errors()
    ]


def _short(value: object) -> str:
    return repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:37]}..."


def read_forgiving() -> tuple[Settings, tuple[str, ...]]:
    """Settings with the default for each value that is not usable, and a line for each of those."""
    defaults: dict[str, Any] = {}
    lines: list[str] = []
    while True:
        try:
            return Settings(**defaults), tuple(lines)
        except ValidationError as error:
            for name, why in in_words(error):
                if name in defaults or name not in Settings.model_fields:
                    return Settings.model_construct(), (
                        *lines,
                        f"the settings are not usable: {why}",
                    )
                defaults[name] = Settings.model_fields[name].default
                variable = f"AURORA_{name.upper()}"
                lines.append(f"{variable} is {why}; the default {defaults[name]!r} is used")
        except Exception as error:  # such as an .env file that is no text
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            line = f"the settings can't be read ({why}); the defaults are used"
            return Settings.model_construct(), (*lines, line)


_forgives = False
_mistakes: tuple[str, ...] = ()


def forgive_mistakes() -> None:
    """In this process from now on a value that is not usable counts as not given: it is one of
    SGLang's, which must start whatever our settings say."""
    global _forgives
    if not _forgives:
        _forgives = True
        get_settings.cache_clear()


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The settings of this process, read once. Raises ``ValidationError`` for a value that is not
    usable, unless mistakes are forgiven here."""
    global _mistakes
    if not _forgives:
        return Settings()
    settings, _mistakes = read_forgiving()
    return settings


def mistakes() -> tuple[str, ...]:
    """Where they are forgiven: a line for each value that is not usable."""
    get_settings()
    return _mistakes
