"""The dialogs of one version: promote, roll back, pin, unpin, export."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import streamlit as st

from aurora_sgl import rollout
from aurora_sgl.errors import AuroraError, Refused
from aurora_sgl.rollout import status
from aurora_sgl.store.models import Evaluation

from . import actions, data, downloads, staging, verdicts, words
from .context import Group, now
from .dialogs import Question

#: Evidence older than this is said to be old.
OLD = timedelta(hours=24)


@dataclass(frozen=True)
class Questions:
    """``live``: what the page showed as live when it was drawn; 0: nothing."""

    here: Group
    version_id: int
    live: int

    def promote(self) -> Question:
        return Question(
            f"Promote version {self.version_id}", "Promote", self._tell_promote, self._promote,
            "better on code",
        )  # fmt: skip

    def rollback(self) -> Question:
        return Question(
            f"Roll back version {self.version_id}", "Roll back", self._tell_rollback,
            self._rollback, "slower at night",
        )  # fmt: skip

    def pin(self) -> Question:
        return Question(
            f"Pin version {self.version_id}", "Pin", self._tell_pin, self._pin, "known good"
        )

    def unpin(self) -> Question:
        return Question(
            f"Unpin version {self.version_id}", "Unpin", self._tell_unpin, self._unpin,
            "no longer needed",
        )  # fmt: skip

    def export(self) -> Question:
        return Question(
            f"Export version {self.version_id}", "Prepare the archive", self._tell_export,
            self._export, "a copy for the lab",
        )  # fmt: skip

    # -- promote ----------------------------------------------------------------------------

    def _tell_promote(self) -> dict[str, Any]:
        try_it = partial(
            actions.promote, self.here, self.version_id, self.live, reason="dry run", dry_run=True
        )
        change, doubts = try_it(force=True), []
        where = self._where()
        if where.names:
            doubts += [_without_flag(where.doubt)] if where.doubt else []
        else:
            try:
                try_it()
            except Refused as doubt:
                doubts.append(_without_flag(str(doubt)))
            self._say_change(change)
        evaluation = data.newest_evaluation(self.here, self.version_id)
        warnings = doubts + self._evidence(evaluation)
        evidence = _kept(evaluation)
        passed = evaluation is not None and evaluation.verdict == "pass"
        force = False
        if warnings:
            for warning in warnings:
                st.warning(words.literal(warning), icon=":material/warning:")
            force = st.checkbox("Promote it all the same")
        return {
            "where": where,
            "force": force,
            "must_force": bool(warnings),
            "evaluation_id": evaluation.id if evaluation is not None and passed else None,
            "evidence": evidence,
        }

    def _where(self) -> staging.FirstServers:
        """Asked for until it can be."""
        try:
            return staging.choose(self.here, self.version_id, self.live)
        except AuroraError as error:
            st.error(words.literal(str(error)), icon=":material/block:")
            st.stop()

    def _promote(
        self,
        reason: str,
        *,
        where: staging.FirstServers,
        force: bool,
        must_force: bool,
        evaluation_id: int | None,
        evidence: Mapping[str, Any],
    ) -> str:
        if must_force and not force:
            raise Refused("the evidence does not speak for it; tick the box if you are sure")
        if where.names:
            plan = actions.stage(
                self.here, self.version_id, self.live, where.names, reason=reason,
                goes_on=where.goes_on, force=force,
            )  # fmt: skip
            return (
                f"Version {plan.version_id} goes to {', '.join(plan.servers)} first, within "
                "seconds, and is judged there against the others."
            )
        change = actions.promote(
            self.here, self.version_id, self.live, reason=reason, force=force,
            evaluation_id=evaluation_id, evidence=evidence,
        )  # fmt: skip
        return (
            f"Version {change.version_id} is live (generation {change.generation}). "
            "Servers follow within seconds; a watch over it has begun."
        )

    def _evidence(self, evaluation: Evaluation | None) -> list[str]:
        """Shows it; returns what speaks against a promotion."""
        st.markdown("**The evidence**")
        if evaluation is None:
            return ["This version was never compared with another one."]
        against = []
        words.facts(
            "evidence",
            {
                "compared by": f"{evaluation.kind} with {words.version(evaluation.baseline_id)}, "
                f"{evaluation.requests:,} requests",
                "accept length": f"{words.number(evaluation.baseline_accept_length, 3)} → "
                f"{words.number(evaluation.candidate_accept_length, 3)}",
                f"difference ({verdicts.level(evaluation)})": words.difference(
                    evaluation.difference, evaluation.ci_low, evaluation.ci_high
                ),
                "verdict": evaluation.verdict,
                "age": words.since(evaluation.created_at),
            },
        )
        rows = by_domain(evaluation)
        if rows:
            words.table("by domain", rows, numbers=("requests",), empty="", whole=False)
        if evaluation.verdict != "pass":
            against.append(f"The newest comparison says {evaluation.verdict}.")
        if self.live and evaluation.baseline_id != self.live:
            against.append(
                f"It was compared with {words.version(evaluation.baseline_id)}, not with "
                f"version {self.live}, which is live."
            )
        if now() - evaluation.created_at > OLD:
            against.append(
                f"The comparison was made {words.ago(evaluation.created_at)}; traffic may have "
                "changed."
            )
        return against

    # -- roll back --------------------------------------------------------------------------

    def _tell_rollback(self) -> dict[str, Any]:
        change = actions.rollback(self.here, self.live, reason="dry run", dry_run=True)
        if not change.changed:
            raise Refused(
                f"version {self.live} was rolled back meanwhile; version {change.version_id} "
                "is live"
            )
        self._say_change(change)
        served = data.served_by_version(self.here.url, (self.live, change.version_id))
        st.markdown("**What both reached on the requests that they served**")
        rows = [
            {
                "version": words.version(version_id),
                "accept length": words.length(sums.accept_length, sums.interval),
                "requests": f"{sums.requests:,}",
            }
            for version_id, sums in served.items()
        ]
        words.table("served", rows, numbers=("requests",), empty="Neither served any yet.")
        evidence = {row["version"]: row["accept length"] for row in rows}
        return {"evidence": {"served": evidence}}

    def _rollback(self, reason: str, *, evidence: Mapping[str, Any]) -> str:
        change = actions.rollback(self.here, self.live, reason=reason, evidence=evidence)
        return (
            f"Version {change.version_id} is live again (generation {change.generation}). "
            "Servers follow within seconds."
        )

    # -- pin, unpin, export -----------------------------------------------------------------

    def _tell_pin(self) -> dict[str, Any]:
        st.write(
            f"The weights of version {self.version_id} will be kept, whatever is pruned. What is "
            "live does not change."
        )
        return {}

    def _pin(self, reason: str) -> str:
        actions.pin(self.here, self.version_id, True, reason=reason)
        return f"Version {self.version_id} is pinned."

    def _tell_unpin(self) -> dict[str, Any]:
        st.write(
            f"Pruning may delete the weights of version {self.version_id} again, once nothing "
            "points to it. What is live does not change."
        )
        return {}

    def _unpin(self, reason: str) -> str:
        actions.pin(self.here, self.version_id, False, reason=reason)
        return f"Version {self.version_id} is not pinned any more."

    def _tell_export(self) -> dict[str, Any]:
        st.write(
            "Nothing changes. The folder is checked by its hash and packed; any SGLang loads it. "
            "Large drafters go faster on the server's machine:"
        )
        st.code(f"aurora-sgl versions export {self.version_id} FOLDER", language="sh")
        return {}

    def _export(self, reason: str) -> str:
        packed = actions.export(self.here, self.version_id, reason=reason)
        st.success(f"Checked and packed: {len(packed) / 1e6:,.1f} MB.")
        name = f"aurora-version-{self.version_id}.zip"
        downloads.offer("Download", packed, name, "application/zip")
        return ""

    def _say_change(self, change: rollout.Change) -> None:
        st.markdown("**What will change**")
        names = sorted(change.before.keys() | change.after.keys())
        rows = [
            {
                "name": name,
                "now": words.version(change.before.get(name)),
                "then": words.version(change.after.get(name)),
            }
            for name in names
            if change.before.get(name) != change.after.get(name)
        ]
        words.table("change", rows, empty="Nothing.")
        servers = status.servers(self.here.engine, self.here.name)
        listed = ", ".join(words.literal(server.name) for server in servers)
        st.caption(
            f"Servers that follow, between two steps and without a pause: {listed}."
            if servers else "No server runs now; servers follow when they start."
        )  # fmt: skip


def by_domain(evaluation: Evaluation) -> list[dict[str, object]]:
    """Rows for a table; empty when the comparison was not split."""
    rows = []
    strata = dict(evaluation.details.get("by_stratum") or {})
    domains = dict(evaluation.details.get("by_domain") or {})
    for domain, comparison in verdicts.worst_first(domains, words.MOST_ROWS):
        rows.append(
            {
                "domain": domain,
                "requests": comparison.get("requests"),
                "accept length": f"{words.number(comparison.get('baseline'))} → "
                f"{words.number(comparison.get('candidate'))}",
                "difference (90%)": words.difference(
                    comparison.get("difference"),
                    comparison.get("ci_low"),
                    comparison.get("ci_high"),
                ),
                "risk": _percent(dict(strata.get(f"all/{domain}") or {}).get("risk")),
                "verdict": comparison.get("verdict"),
            }
        )
    return rows


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _without_flag(refusal: str) -> str:
    """Without the advice to type a flag, which is a box here."""
    text = re.split(r"[;,][^;,]*--force", refusal)[0]
    return text[:1].upper() + text[1:] + "."


def _kept(evaluation: Evaluation | None) -> dict[str, Any]:
    """What was shown as evidence, to be kept with the deployment."""
    if evaluation is None:
        return {}
    names = ("id", "kind", "baseline_id", "requests", "baseline_accept_length",
             "candidate_accept_length", "difference", "ci_low", "ci_high", "verdict")  # fmt: skip
    evidence: dict[str, Any] = {name: getattr(evaluation, name) for name in names}
    evidence["age_seconds"] = round((now() - evaluation.created_at).total_seconds())
    return evidence
