"""The names of the migration scripts, which a process that starts reads in place of Alembic's."""

from __future__ import annotations

from alembic.script import ScriptDirectory

from aurora_sgl.store import schema


def test_the_names_of_the_scripts_are_alembics_revisions_in_its_order() -> None:
    scripts = ScriptDirectory(str(schema.scripts_folder()))
    newest_first = [script.revision for script in scripts.walk_revisions()]
    assert schema.revisions() == newest_first[::-1]
    assert schema.head() == scripts.get_current_head()
