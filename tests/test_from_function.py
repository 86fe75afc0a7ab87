"""`components.from_function` against `programs.TABLE`, and what it raises."""

import programs
import pytest

from orthax import components


@pytest.mark.parametrize("row", programs.TABLE, ids=lambda row: row.name)
def test_table(row):
    apply, params, *inputs = row.build()
    rule = components.from_function(apply, params, *inputs, **row.options)
    found = {}
    for decided in components.decide_all(params, rule):
        if decided.error is not None:
            found[decided.path] = f"{programs.RAISES}: {decided.error}"
        elif len(decided.value.shape) > 1 or decided.decision.cut is not None:
            found[decided.path] = decided.decision.cut
    found = {
        path: programs.RAISES
        if str(cut).startswith(programs.RAISES)
        and row.leaves.get(path) == programs.RAISES
        else cut
        for path, cut in found.items()
    }
    assert found == dict(row.leaves)
