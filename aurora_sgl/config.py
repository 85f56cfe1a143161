"""Every knob, once. The environment (``AURORA_*``), an ``.env`` file and flags feed this model."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Settings of all rooms. A field ``x`` is read from the variable ``AURORA_X``."""

    model_config = SettingsConfigDict(env_prefix="AURORA_", env_file=".env", extra="ignore")

    home: Path = Path("aurora-data")
    """Data folder: the embedded database, artifacts, spool, logs, converted models."""

    database_url: str = ""
    """SQLAlchemy URL of the store; empty: a SQLite file in the data folder."""

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
    """Byte budget of the trace files; the oldest go first."""

    train_by_default: bool = True
    """Whether a request without the x-aurora-train header may be used for training."""

    record_buffer: int = Field(default=20_000, ge=1)
    """Records that wait in the engine while the sidecar is away; more are dropped and counted."""

    spool_bytes: int = Field(default=1024**3, ge=0)
    """Bytes of the sidecar's spool while the store is away; more are dropped and counted."""

    trace_memory_bytes: int = Field(default=512 * 1024**2, ge=1)
    """Bytes of unfinished traces that the sidecar holds; the oldest request is dropped first."""

    health_port: int = Field(default=0, ge=-1, le=65535)
    """Loopback port of the sidecar's /healthz and /metrics; 0: a free one; -1: none."""

    speculation: str = Field(default="auto", pattern="^(auto|on|off)$")
    """auto: a bounded share of the steps until replay says that drafts pay; on; off."""

    explore_share: float = Field(default=0.1, ge=0.0, le=1.0)
    """Share of verify steps that carry drafts while they do not pay yet."""

    cpu_packed_weights: bool = True
    """On CPU in bfloat16: keep oneDNN's packed copy of the weights beside them (more memory)."""

    retention_days: int = Field(default=30, ge=1)
    """Days that acceptance events are kept."""

    @property
    def store_url(self) -> str:
        return self.database_url or f"sqlite:///{self.home.resolve() / 'aurora.db'}"

    @property
    def artifact_root(self) -> str:
        return self.artifacts or str(self.home.resolve() / "artifacts")


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The settings of this process, read once."""
    return Settings()
