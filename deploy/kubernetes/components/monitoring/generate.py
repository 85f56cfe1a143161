"""Makes prometheus-rule.yaml beside this file out of deploy/monitoring/rules.

python deploy/kubernetes/components/monitoring/generate.py
"""

from __future__ import annotations

from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
RULES = HERE.parents[2] / "monitoring" / "rules"
MADE = HERE / "prometheus-rule.yaml"
HEAD = "# Made by generate.py out of deploy/monitoring/rules. Change it there.\n"


class _Readable(yaml.SafeDumper):
    """Expressions of several lines stay what they are."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Readable.add_representer(str, _text)


def made() -> str:
    """The rules of all files but those of their tests, as the Prometheus Operator takes them."""
    files = (path for path in sorted(RULES.glob("*.yml")) if not path.stem.endswith("_test"))
    groups = [group for path in files for group in yaml.safe_load(path.read_text())["groups"]]
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "aurora-sgl", "labels": {"app.kubernetes.io/name": "aurora-sgl"}},
        "spec": {"groups": groups},
    }
    return HEAD + yaml.dump(rule, Dumper=_Readable, sort_keys=False, width=90, allow_unicode=True)


if __name__ == "__main__":
    MADE.write_text(made())
    print(f"{MADE.name} is made")
