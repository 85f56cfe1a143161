"""One request as coloured text, step by step. Each kind has a sign of its own beside its colour."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

from .steps import ACCEPTED, BONUS, CORRECTION, PLAIN, StepTold, Token

#: What a token of each kind is, in words.
MEANINGS = {
    ACCEPTED: "accepted draft: proposed by the drafter, and the target agreed",
    CORRECTION: "correction: the target's own token where it rejected the draft",
    BONUS: "bonus: the target's own token after a draft that it accepted whole",
    PLAIN: "plain: a step without a draft",
}
SIGNS = {ACCEPTED: "■", CORRECTION: "◆", BONUS: "●", PLAIN: "·"}

#: Put into the page by the shell, once. Marks beside the colours: underline, box, double underline,
#: nothing. Colours of both themes come from mixing with the colour of the text.
STYLE = """<style>
.aurora-text {font-family:"Source Code Pro",monospace; font-size:.95rem; line-height:2.1;
  overflow-wrap:anywhere; white-space:pre-wrap; border-radius:.5rem; padding:.6rem 1rem;
  border:1px solid color-mix(in srgb, currentColor 18%, transparent)}
.aurora-step {border-radius:.2rem; cursor:help; outline-offset:2px}
.aurora-step:hover, .aurora-step:focus {outline:2px solid #56B4E9}
.aurora-token {padding:.1rem .1rem; margin:0 1px; border-radius:.2rem}
.aurora-token.accepted {background:color-mix(in srgb, #009E73 30%, transparent);
  border-bottom:2px solid #009E73}
.aurora-token.correction {background:color-mix(in srgb, #D55E00 28%, transparent);
  border:1px dashed #D55E00}
.aurora-token.bonus {background:color-mix(in srgb, #0072B2 28%, transparent);
  border-bottom:4px double #0072B2}
.aurora-token.plain {border-bottom:1px dotted}
.aurora-token.cut {text-decoration:line-through; opacity:.6}
.aurora-tip {display:none; position:fixed; right:1.5rem; bottom:1.5rem; z-index:1000000;
  max-width:min(34rem, 90vw); max-height:60vh; overflow:auto; pointer-events:none;
  padding:.7rem 1rem; border-radius:.5rem; font-size:.85rem; line-height:1.5; white-space:normal;
  background:#ffffff; color:#1a1a1a; border:1px solid #888; box-shadow:0 4px 18px #0006}
.aurora-step:hover > .aurora-tip, .aurora-step:focus > .aurora-tip {display:block}
.aurora-step:hover ~ .aurora-step:focus > .aurora-tip {display:none}
.aurora-tip table {border-collapse:collapse; margin-top:.3rem}
.aurora-tip td {padding:0 .7rem 0 0; vertical-align:top; white-space:pre-wrap}
.aurora-legend {display:flex; flex-wrap:wrap; gap:.3rem 1.2rem; font-size:.85rem; line-height:2}
.aurora-legend .aurora-token {font-family:"Source Code Pro",monospace}
</style>"""

Decode = Callable[[int], str]


def legend() -> str:
    parts = "".join(
        f'<span><span class="aurora-token {kind}">{SIGNS[kind]}</span> {escape(meaning)}</span>'
        for kind, meaning in MEANINGS.items()
    )
    return f'<div class="aurora-legend">{parts}</div>'


def text(steps: Sequence[StepTold], decode: Decode | None) -> str:
    """The steps as markup. ``decode`` turns an id into text; ``None``: only marks are shown, not
    which tokens they were."""
    body = "".join(_step(step, decode) for step in steps)
    return f'<div class="aurora-text" role="group" aria-label="tokens">{body}</div>'


def _step(step: StepTold, decode: Decode | None) -> str:
    shown = "".join(_token(token, decode) for token in step.tokens)
    label = f"step {step.number}: {summary(step)}"
    return (
        f'<span class="aurora-step" tabindex="0" role="note" aria-label="{escape(label)}">{shown}'
        f'<span class="aurora-tip">{_tip(step, decode)}</span></span>'
    )


def _token(token: Token, decode: Decode | None) -> str:
    cut = " cut" if token.cut else ""
    shown = SIGNS[token.kind] if decode is None else visible(decode(token.id))
    return f'<span class="aurora-token {token.kind}{cut}">{shown}</span>'


def visible(piece: str) -> str:
    """Markup of a piece of text in which line ends and lone blanks are seen."""
    marked = escape(piece).replace("\t", "→").replace("\r", "")
    if not marked.strip(" \n"):
        marked = marked.replace(" ", "␣")
    return marked.replace("\n", "↵\n") or "∅"


def summary(step: StepTold) -> str:
    event = step.event
    if not event["depth"]:
        return "no draft"
    line = f"{event['accepted']} of depth {event['depth']} accepted"
    if step.rejected_at:
        line += f", rejected at depth {step.rejected_at}"
    cut = sum(token.cut for token in step.tokens)
    return line + (f", {cut} not kept" if cut else "")


def _tip(step: StepTold, decode: Decode | None) -> str:
    event: Any = step.event
    version = event["drafter_version_id"]
    head = f"<b>Step {step.number}</b>: {escape(summary(step))}<br>"
    head += f"version {version or 'unknown'}, {event['proposed']} proposals, "
    head += f"{escape(event['accept_rule'].replace('_', ' '))}, batch of {event['batch_size']}"
    if decode is None or not step.proposals:
        return head
    rows = []
    for depth in range(1, 1 + max(p.depth for p in step.proposals)):
        here = [p for p in step.proposals if p.depth == depth]
        pieces = " &nbsp; ".join(
            f"{'✔' if p.accepted else '✖'} {_quoted(decode(p.token))}" for p in here
        )
        rows.append(f"<tr><td>depth {depth}</td><td>{pieces}</td></tr>")
    last = [token for token in step.tokens if token.kind != ACCEPTED]
    if last:
        name = {CORRECTION: "target instead", BONUS: "bonus"}.get(last[0].kind, "target")
        rows.append(f"<tr><td>{name}</td><td>{_quoted(decode(last[0].id))}</td></tr>")
    return f"{head}<table>{''.join(rows)}</table>"


def _quoted(piece: str) -> str:
    return f"“{visible(piece).replace(chr(10), '')}”"


# -- text ---------------------------------------------------------------------------------------


def as_number(id: int) -> str:
    return f" {id}"


def decoder(target_model: str, revision: str = "") -> Decode | None:
    """Turns ids into text with the tokenizer of the target; ``None``: it is not on this machine."""
    file = _tokenizer_file(target_model, revision)
    if file is None:
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))

    @lru_cache(maxsize=100_000)
    def decode(id: int) -> str:
        piece = str(tokenizer.decode([id], skip_special_tokens=False))
        if not piece or "\ufffd" in piece:  # part of a character, or not in the vocabulary
            return str(tokenizer.id_to_token(id) or f"<{id}>")
        return piece

    return decode


def _tokenizer_file(target_model: str, revision: str) -> Path | None:
    beside = Path(target_model) / "tokenizer.json"
    if beside.is_file():
        return beside
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(target_model, "tokenizer.json", revision=revision or None)
    except HFValidationError:
        return None
    return Path(path) if isinstance(path, str) else None
