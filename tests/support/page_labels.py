"""Labels of charts and legends that a reader does not see whole."""

from __future__ import annotations

from playwright.sync_api import Page

#: A desk, a tablet, a telephone: a window of 1,400 that becomes wider, and then ever narrower.
WIDTHS = (2560, 1400, 768, 390)
#: Names of labels that reach out of their picture or what it shows of them, or into another one;
#: and legends over what they are of.
CUT = """() => {
  const found = [];
  const seen = e => e.offsetParent !== null;
  const inside = (a, b) => a.left >= b.left - 1 && a.right <= b.right + 1
    && a.top >= b.top - 1 && a.bottom <= b.bottom + 1;
  const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1
    && a.top < b.bottom - 1 && b.top < a.bottom - 1;
  const lines = e => {
    const parts = [...e.querySelectorAll('tspan.line')];
    return (parts.length ? parts : [e]).map(part => part.getBoundingClientRect());
  };
  for (const plot of [...document.querySelectorAll('.js-plotly-plot')].filter(seen)) {
    const all = plot.getBoundingClientRect();
    const inner = plot.querySelector('.nsewdrag')?.getBoundingClientRect() || all;
    for (const legend of plot.querySelectorAll('.legend .bg')) {
      if (inner !== all && meet(legend.getBoundingClientRect(), inner))
        found.push('over the picture: its legend');
    }
    const texts = [...plot.querySelectorAll('.main-svg text')].filter(e => e.textContent.trim()
      && getComputedStyle(e).visibility !== 'hidden' && e.closest('.hoverlayer') === null);
    for (const e of texts) {
      const legend = e.closest('.legend')?.querySelector('.bg');
      const room = legend ? legend.getBoundingClientRect()
        : e.closest('.plot [clip-path], .plot[clip-path]') ? inner : all;
      if (!inside(e.getBoundingClientRect(), room)) found.push('cut: ' + e.textContent);
    }
    for (const kind of ['.xtick', '.ytick', '.legend', '.textpoint']) {
      const some = texts.filter(e => e.closest(kind)).map(e => [e, lines(e)]);
      some.forEach(([e, a], i) => some.slice(i + 1).forEach(([other, b]) => {
        if (a.some(one => b.some(two => meet(one, two))))
          found.push('over each other: ' + e.textContent + ', ' + other.textContent);
      }));
    }
  }
  return found;
}"""


def cut(page: Page) -> list[str]:
    found: list[str] = page.evaluate(CUT)
    return found
