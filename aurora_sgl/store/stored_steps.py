"""Which steps of a batch the store has already."""

from __future__ import annotations

import json
from collections.abc import Sequence

from sqlalchemy import Connection, text

from aurora_sgl import wire
from aurora_sgl.clock import from_us
from aurora_sgl.store.connection import is_sqlite

#: Keys between the first and the last step of each request, so that a request that has thousands
#: already is not read from its start because another one begins.
_STORED_IN_SQLITE = text(
    "SELECT e.request_id, e.step FROM json_each(:requests) AS r CROSS JOIN acceptance_event AS e "
    "WHERE e.request_id = json_extract(r.value, '$[0]') "
    "AND e.step BETWEEN json_extract(r.value, '$[1]') AND json_extract(r.value, '$[2]')"
)
_STORED_IN_POSTGRESQL = text(
    "SELECT e.request_id, e.step FROM unnest(CAST(:ids AS bigint[]), CAST(:firsts AS bigint[]), "
    "CAST(:lasts AS bigint[])) AS r (id, first_step, last_step) "
    "JOIN acceptance_event AS e ON e.request_id = r.id "
    "AND e.step BETWEEN r.first_step AND r.last_step "
    # Leaves out the partitions of other days.
    "AND e.at BETWEEN CAST(:begin AS timestamptz) AND CAST(:end AS timestamptz)"
)


def without_stored(
    connection: Connection, steps: Sequence[wire.VerifyStep]
) -> list[wire.VerifyStep]:
    """The steps that are not in the store, each once."""
    unique = {(step.request_id, step.step): step for step in steps}
    if not unique:
        return []
    bounds: dict[int, tuple[int, int]] = {}
    for request_id, step in unique:
        low, high = bounds.get(request_id, (step, step))
        bounds[request_id] = (min(low, step), max(high, step))
    if is_sqlite(connection):
        requests = [(request_id, *ends) for request_id, ends in bounds.items()]
        stored = connection.execute(_STORED_IN_SQLITE, {"requests": json.dumps(requests)})
    else:
        times = [step.at_us for step in steps]
        values = {
            "ids": list(bounds),
            "firsts": [low for low, _ in bounds.values()],
            "lasts": [high for _, high in bounds.values()],
            "begin": from_us(min(times)),
            "end": from_us(max(times)),
        }
        stored = connection.execute(_STORED_IN_POSTGRESQL, values)
    for key in stored:
        unique.pop((key[0], key[1]), None)
    return list(unique.values())
