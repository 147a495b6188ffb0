"""TRL's own losses on the same tensors as our formulas: equal where the parity report says so, and different elsewhere."""

from __future__ import annotations

import pytest

pytest.importorskip("trl")

from composer_trl.references import references

from composer_plugins.conformance.parity_table import checked

REFERENCES = list(references())


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda r: f"{r.case} | {r.name}")
def test_trl_agrees_or_differs_as_the_report_says(reference):
    assert checked(reference) == bool(reference.differs)
