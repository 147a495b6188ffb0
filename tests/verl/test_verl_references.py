"""verl's own losses on the same tensors as our formulas: equal where the parity report says so, and different elsewhere."""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("verl") is None:
    pytest.skip(
        "verl is not installed: it needs an environment of its own (docs/how-to/verl.md)", allow_module_level=True
    )

from composer_verl.references import OTHERS, references

from composer_plugins.conformance.parity_table import checked

REFERENCES = list(references())


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda r: f"{r.case} | {r.name}")
def test_verl_agrees_or_differs_as_the_report_says(reference):
    assert checked(reference) == bool(reference.differs)


def test_the_losses_that_are_not_in_our_menu_are_verls():
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    own = {name for name in POLICY_LOSS_REGISTRY if not name.startswith("composer_")}
    assert own == {"vanilla", "gspo", "cispo", *OTHERS}
