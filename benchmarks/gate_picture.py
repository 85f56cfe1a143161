"""The picture of docs/operations.md: a try's way through the gate, and one simulated day."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

WIDTH, HEIGHT = 860, 520
LEFT, RIGHT, TOP, BOTTOM = 70, 840, 250, 470
COLOURS = {"pass": "#2a9d55", "fail": "#c0392b", "inconclusive": "#8a8f98"}
#: The way of a try: what is asked, and what becomes of it that answers no.
STEPS = (
    ("replay", "live and candidate, same held-out requests"),
    ("enough?", "4 requests; else inconclusive"),
    ("harm?", "a domain or all worse beyond doubt: fail"),
    ("better?", "own interval above 0; evidence of the line 20"),
    ("domains?", "risk to have lost 5% at most 10%; high-water mark"),
    ("pass", "promoted; a new line begins"),
)


@dataclass(frozen=True)
class Hour:
    """One try of a day: live's and the candidate's true accept lengths, live's being 1 at first,
    the line's e-value in natural logarithms, and the verdict."""

    live: float
    candidate: float
    log_e: float
    verdict: str


def draw_picture(day: Sequence[Hour], path: Path) -> None:
    """Write an SVG; ``day``: the hours of ``benchmarks.gate.day``."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        *_way(),
        *_day(day),
        "</svg>",
    ]
    path.write_text("\n".join(parts) + "\n")


def _text(x: float, y: float, text: str, **more: str) -> str:
    attributes = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
    return f'<text x="{x:.1f}" y="{y:.1f}"{attributes}>{text}</text>'


def _way() -> list[str]:
    parts = [_text(10, 24, "A try's way from replay to verdict", font_weight="bold")]
    box, gap = 126, 16
    for number, (name, about) in enumerate(STEPS):
        x = 10 + number * (box + gap)
        parts.append(
            f'<rect x="{x}" y="40" width="{box}" height="120" rx="8" fill="#f3f5f8" '
            'stroke="#5b6572"/>'
        )
        parts.append(_text(x + 10, 64, name, font_weight="bold"))
        parts += [_text(x + 10, 86 + 17 * i, line) for i, line in enumerate(_wrapped(about))]
        if number:
            parts.append(
                f'<path d="M{x - gap + 1} 100 h{gap - 5} m-5 -4 l5 4 l-5 4" fill="none" '
                'stroke="#5b6572"/>'
            )
    return parts


def _wrapped(text: str, width: int = 18) -> list[str]:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def _day(day: Sequence[Hour]) -> list[str]:
    highest = max(hour.candidate for hour in day)
    step = (RIGHT - LEFT) / len(day)

    def y(level: float) -> float:
        return BOTTOM - (level - 1) / max(highest - 1, 0.01) * (BOTTOM - TOP)

    parts = [
        _text(10, 200, "A candidate line: one simulated day, training adds 1% an hour",
              font_weight="bold"),
        _text(10, 218, "line: the live version's true accept length; dots: candidates by verdict "
              "(green: pass), each with the evidence of its line"),
        f'<path d="M{LEFT} {TOP - 10} V{BOTTOM} H{RIGHT}" fill="none" stroke="#5b6572"/>',
        _text(LEFT, BOTTOM + 36, "hours"),
    ]  # fmt: skip
    for percent in range(0, int(100 * (highest - 1)) + 1, 5):
        parts.append(_text(LEFT - 44, y(1 + percent / 100) + 4, f"+{percent}%"))
    path = []
    for number, hour in enumerate(day):
        x = LEFT + (number + 0.5) * step
        path.append(f"{'L' if path else 'M'}{x - step / 2:.1f} {y(hour.live):.1f} h{step:.1f}")
        at_y = y(hour.candidate)
        parts.append(f'<circle cx="{x:.1f}" cy="{at_y:.1f}" r="5" fill="{COLOURS[hour.verdict]}"/>')
        e = math.exp(min(hour.log_e, 9.9))
        parts.append(_text(x - 9, at_y - 9, f"{e:.2g}" if e < 100 else f"{e:.0f}", font_size="9"))
        if number % 3 == 0:
            parts.append(_text(x - 4, BOTTOM + 18, str(number)))
    parts.append(f'<path d="{" ".join(path)}" fill="none" stroke="#1f77b4" stroke-width="2"/>')
    return parts
