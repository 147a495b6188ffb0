"""What docs/how-to/prime-rl.md says each version of prime-rl can do, against the recorded trees and the one at hand."""

import dataclasses
import json
import tomllib
import types
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from composer_prime_rl.versions import LossOutputs, host_loss, outputs_class, reference_logprobs

from composer_plugins.errors import ConfigError

DATA = Path(__file__).parent / "data"
RECORDS = [json.loads(path.read_text()) for path in sorted(DATA.glob("loss_inputs_*.json"))]
#: version prefix -> (name of the reference, per-token weights, prime-rl's own ipo, environments may stamp)
TABLE = {
    "0.4.": ("teacher_logprobs", False, False, False),
    "0.5.": ("teacher_logprobs", False, False, False),
    "0.6.": ("teacher_logprobs", False, True, False),
    "0.7.": ("ref_logprobs", True, True, False),
    "0.8.0": ("ref_logprobs", True, True, None),  # the main branch still calls itself 0.8.0
    "0.8.1": ("ref_logprobs", True, True, True),
    "main": ("ref_logprobs", True, True, True),
}


def row(version):
    return next(values for prefix, values in TABLE.items() if version.startswith(prefix))


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: r["prime_rl"]["version"])
def test_the_recorded_trees(record):
    name, weights, ipo, _ = row(record["prime_rl"]["version"])
    assert name in record["fields"]
    assert ("loss_weights" in record["fields"]) == weights
    assert all(("ipo" in step["results"]) == ipo for step in record["steps"])


@pytest.mark.prime_rl
def test_the_tree_at_hand(prime_tree, prime_loss):
    fields = {field.name for field in dataclasses.fields(prime_loss.LossInputs)}
    project = tomllib.loads((prime_tree / "pyproject.toml").read_text())["project"]
    version = project["version"]
    if version == "0.1.0":  # 0.4 and 0.5 call themselves that
        assert "teacher_logprobs" in fields and not hasattr(prime_loss, "ipo_loss_fn")
        return
    name, weights, ipo, stamping = row(version)
    assert name in fields and ("loss_weights" in fields) == weights and hasattr(prime_loss, "ipo_loss_fn") == ipo
    source = (prime_tree / "src" / "prime_rl" / "orchestrator" / "trajectories.py").read_text()
    assert stamping is None or ("loss_weights" in source) == stamping


def test_either_name_of_the_reference_is_read():
    there = torch.ones(1)
    assert reference_logprobs(types.SimpleNamespace(ref_logprobs=there)) is there
    assert reference_logprobs(types.SimpleNamespace(teacher_logprobs=there)) is there
    assert reference_logprobs(types.SimpleNamespace(ref_logprobs=None)) is None
    assert reference_logprobs(types.SimpleNamespace()) is None


def test_outputs_are_of_the_module_that_made_the_inputs():
    assert outputs_class(types.SimpleNamespace()) is LossOutputs


@pytest.mark.prime_rl
def test_options_that_are_not_prime_rls_are_named(prime_loss):
    """Its own configuration classes judge the options of `objective: host`."""
    name = "ref_logprobs" if "ref_logprobs" in prime_loss.LossInputs.__dataclass_fields__ else "teacher_logprobs"
    ones = torch.ones(2)
    tensors = {"trainer_logprobs": -ones, "inference_logprobs": -ones, name: None, "advantages": ones}
    inputs = prime_loss.LossInputs(**tensors, loss_mask=torch.tensor([True, False]))
    with pytest.raises(ConfigError, match=r"prime-rl's \w*Config has no kl_taw; it has .*kl_tau"):
        host_loss(inputs, {"kl_taw": 1.0}, reference=True)
    with pytest.raises(ConfigError, match=r"prime-rl's \w*Config refuses it: `host\.kl_tau`"):
        host_loss(inputs, {"kl_tau": "much"}, reference=True)
    with pytest.raises(ConfigError, match=r"host\.type must be default or ipo"):
        host_loss(inputs, {"type": "best"}, reference=True)
    if not hasattr(prime_loss, "ipo_loss_fn"):
        with pytest.raises(ConfigError, match="ipo_loss_fn"):
            host_loss(inputs, {"type": "ipo"}, reference=True)
