"""A page as axe-core judges it, by the rules of WCAG 2.1 A and AA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import axe_playwright_python
from playwright.sync_api import Page

AXE = Path(axe_playwright_python.__file__).parent / "axe.min.js"
#: But for Streamlit's sign that a part is being drawn, which is there for a moment.
RUN = """async () => (await axe.run({exclude: [['[data-testid=stStatusWidget]']]}, {
    runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa'], resultTypes: ['violations'],
})).violations.map(one => ({rule: one.id, impact: one.impact, nodes: one.nodes.map(node => ({
    target: node.target.join(' '), html: node.html.slice(0, 200), why: node.failureSummary}))}))"""
SERIOUS = ("serious", "critical")


def serious(page: Page) -> list[dict[str, Any]]:
    """What axe-core calls serious or critical."""
    if not page.evaluate("typeof axe === 'object'"):
        page.evaluate(AXE.read_text())
    return [one for one in page.evaluate(RUN) if one["impact"] in SERIOUS]
