"""A real Prometheus with the files of deploy/monitoring, and what its API answers."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.support.pgbouncer import free_port
from tests.support.sidecar_engine import wait_until

MONITORING = Path(__file__).resolve().parents[2] / "deploy" / "monitoring"
#: What a panel's variables stand for here: all of them, over windows that hold what was scraped.
VARIABLES = {
    "$__rate_interval": "10s", "$__range": "5m", "$__interval": "2s",
    "$group": ".*", "$server": ".*", "$version": ".*", "$domain": ".*",
}  # fmt: skip


def tool(name: str) -> str:
    """Raises ``RuntimeError`` where it is not installed."""
    path = shutil.which(name)
    if path is None:
        raise RuntimeError(f"{name} is missing; on Debian: apt-get install prometheus")
    return path


def promtool(*arguments: str | Path) -> tuple[int, str]:
    """Its exit code, and what it says."""
    run = subprocess.run(
        [tool("promtool"), *map(str, arguments)], capture_output=True, text=True, timeout=60
    )
    return run.returncode, run.stdout + run.stderr


def filled_in(expression: str) -> str:
    """An expression of the board with its variables replaced."""
    for name in sorted(VARIABLES, key=len, reverse=True):
        expression = expression.replace(name, VARIABLES[name])
    return expression


class Prometheus:
    """Scrapes each second, and looks at its rules as often. Close it."""

    def __init__(self, folder: Path, targets: dict[str, str]) -> None:
        """``targets``: the address of a process by its job, in the place of targets.yml's."""
        shutil.copytree(MONITORING / "rules", folder / "rules")
        configuration = (MONITORING / "prometheus.yml").read_text()
        for name in ("scrape_interval", "evaluation_interval", "scrape_timeout"):
            configuration = re.sub(rf"{name}: \d+s", f"{name}: 1s", configuration)
        (folder / "prometheus.yml").write_text(configuration)
        entries = yaml.safe_load((MONITORING / "targets.yml").read_text())
        for entry in entries:
            entry["targets"] = [targets[entry["labels"]["job"]]]
        (folder / "targets.yml").write_text(yaml.safe_dump(entries))
        self.url = f"http://127.0.0.1:{free_port()}"
        self._client = httpx.Client(base_url=self.url, timeout=10, trust_env=False)
        self._log = folder / "prometheus.log"
        self._process = subprocess.Popen(
            [tool("prometheus"), f"--config.file={folder / 'prometheus.yml'}",
             f"--storage.tsdb.path={folder / 'data'}",
             f"--web.listen-address={self.url.removeprefix('http://')}"],
            stdout=subprocess.DEVNULL, stderr=self._log.open("wb"),
        )  # fmt: skip
        wait_until(self._is_ready, 30, "a ready Prometheus")

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        try:
            return self._client.get("/-/ready").status_code == 200
        except httpx.HTTPError:
            return False

    def close(self) -> None:
        self._client.close()
        self._process.terminate()
        self._process.wait(20)

    def ask(self, path: str, **parameters: str) -> Any:
        answer = self._client.get(f"/api/v1/{path}", params=parameters).json()
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]

    def values(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """What it is now: labels and value of each series whose value is a number."""
        rows = self.ask("query", query=filled_in(expression))["result"]
        values = [(row["metric"], float(row["value"][1])) for row in rows]
        return [(labels, value) for labels, value in values if math.isfinite(value)]

    def course(self, expression: str) -> list[dict[str, str]]:
        """Labels of what it was in the last two minutes, second by second."""
        now = time.time()
        rows = self.ask("query_range", query=filled_in(expression), start=f"{now - 120:.0f}",
                        end=f"{now:.0f}", step="1")["result"]  # fmt: skip
        return [row["metric"] for row in rows]


def expressions(panels: Iterable[dict[str, Any]]) -> list[tuple[str, str]]:
    """(title, expression) of each query."""
    return [(panel["title"], one["expr"]) for panel in panels for one in panel.get("targets", ())]
