"""Figures of a demo as its screen and its JSON give them."""

from __future__ import annotations

from typing import Any


def rounded(value: float | None) -> float | None:
    """For JSON: four places, and nothing for what is not a number."""
    return None if value is None or value != value else round(value, 4)


def number(value: float | None) -> str:
    """For the screen: three places, or a dash."""
    return "-" if value is None else f"{value:.3f}"


def speed(value: float | None) -> str:
    """Tokens per second for the screen: one place, or a dash."""
    return "-" if value is None else f"{value:.1f}"


def sentence(summary: dict[str, Any]) -> str:
    """The last line of a demo, from what ``--json`` prints."""
    length, speeds = summary["accept_length"], summary["tokens_per_second"]
    depth, nodes = length["shape"]["depth"], length["shape"]["nodes"]
    return (
        f"{summary['requests']} requests, {summary['failed_requests']} failed; accept length with "
        f"whole drafts (depth {depth}, {nodes} nodes) {number(length['first'])} -> "
        f"{number(length['last'])} (95% of the difference: {signed(length['ci_low'])} to "
        f"{signed(length['ci_high'])}); tokens/s as served {speed(speeds['first'])}, without "
        f"speculation {speed(speeds['no_speculation'])}; at the end {speed(speeds['last'])}, "
        f"without {speed(speeds['no_speculation_last'])}; live version {summary['live_version']}"
    )


def signed(value: float | None) -> str:
    """A difference for the screen."""
    return "-" if value is None else f"{value:+.3f}"
