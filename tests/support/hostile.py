"""Texts that something on the way could take for more than text."""

from __future__ import annotations

from aurora_sgl.engine import clean

HOST = "evil.example"
#: What some reader of ours would interpret: HTML, Markdown, plotly, spreadsheets, SQL, Prometheus,
#: a terminal, a log, a path, a template.
PAYLOADS = (
    f'<a href="https://{HOST}">chat</a>', f"<img src=https://{HOST}/x.png onerror=alert(1)>",
    f"<script src=//{HOST}></script>", '"><svg onload=alert(1)>', "</td></tr></table><h1>x</h1>",
    f'<iframe src="//{HOST}">', "<b>bold</b>", "<br>", "<!-- ", "&lt;b&gt;", "' onfocus=alert(1) '",
    "<extra></extra>", "%{x}", "%{customdata}", "$x^2$", "$$", f"![x](https://{HOST}/x.png)",
    "[x](javascript:alert(1))", f"[x]: https://{HOST}", f"<https://{HOST}>", f"https://{HOST}/y",
    f"www.{HOST}", f"eve@{HOST}", f"mailto:eve@{HOST}", "`code`", "**bold**", "__bold__",
    "~~gone~~", "# heading", "- item", "1. item", "> quote", "---", "| a | b |", ":smile:",
    ":material/home:", ":red[x]", ":red-background[x]", "->", "<-", "=1+1", f'=HYPERLINK("https://{HOST}")',
    "+1+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1", "\uff1d1+1", '"=1"', "'=1",
    "=cmd|' /C calc'!A0", "'; DROP TABLE request; --", '" OR 1=1 --', "') UNION SELECT 1 --",
    "%s%n%d", "{0}{x!r}", "{{7*7}}", "${x}", "\\", "\\n", 'x="1"} 1\naurora_ready 0\n#', 'a"b\\',
    "a\nb", "a\r\nINFO forged: line", "\x1b[31mred\x1b]0;title\x07", "\x00", "a\x00b", "\u2028",
    "\u202egpj.exe", "\ud83d", "\U0001f3f3\ufe0f\u200d\U0001f308", "\u5ba2\u670d", "e\u0301",
    "NULL", "nan", "1e999", "true", "", " ", "../../../etc/passwd", "/etc/passwd", "C:\\x", "a/b",
    "x" * 500,
)  # fmt: skip
#: (page, parameters) of saved views that lead elsewhere, or would if they were believed.
ADDRESSES = (
    (f"https://{HOST}/", ""), (f"//{HOST}", ""), ("javascript:alert(1)", ""), ("../audit", ""),
    ("nowhere", ""), ("", ""), ("versions?x", "=1"), ("Versions", ""), ("versions/4", ""),
    ("versions", f"x\"><script src=//{HOST}></script>=1"), ("versions", "a b=1"),
    ("versions", "a=%ff"), ("versions", "a;b"), ("sql", "statement=" + "x" * 7000),
    ("versions", "&".join(f"a{n}=1" for n in range(600))), (f"\\\\{HOST}", ""),
)  # fmt: skip
FRAMES = ("{}", "a {}", "{} b", "'{}", "{0}{0}")


def texts() -> list[str]:
    """Several hundred, as a client sends them."""
    return list(dict.fromkeys(frame.replace("{0}", "{}").replace("{}", payload)
                              for payload in PAYLOADS for frame in FRAMES))  # fmt: skip


def cleaned(most: int = 64) -> list[str]:
    """As the engine lets them in: what a store, a page and a log have to bear."""
    return list(dict.fromkeys(clean.text(text, most) for text in texts()))
