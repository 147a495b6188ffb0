"""The parity report: it stops at a row that breaks its promise, and the committed one keeps them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from composer_plugins.conformance import parity, published
from composer_plugins.conformance.expected import expected
from composer_plugins.conformance.parity_cases import cases
from composer_plugins.conformance.parity_table import AGREE, MODEL_AGREE, Row, checked, table
from composer_plugins.conformance.problem import make_problem
from composer_plugins.conformance.real_model import load_batch, save_batch
from composer_plugins.conformance.references import Reference, Tensors
from composer_plugins.errors import ComposerError, ConfigError

DOCUMENT = Path(__file__).parents[2] / "docs/parity.md"
CASE = next(case for case in cases() if case.name == "policy dapo, off-policy")
WANTED = expected(CASE.problem, CASE.composer)["total"]


def surrogate(problem):
    """The clipped surrogate in plain torch, not ours."""
    t = Tensors(problem)
    ratio = (t.logprobs - t.old).exp()
    values = -(ratio * t.advantages).minimum(ratio.clamp(0.8, 1.28) * t.advantages)
    return t.finish(values[t.mask].sum() / t.mask.sum())


def test_a_reference_that_agrees_passes():
    assert not checked(Reference(CASE.name, "plain torch", surrogate))


def test_a_reference_that_is_off_without_a_reason_ends_the_generation():
    def off(problem):
        loss, gradient = surrogate(problem)
        return loss, gradient * (1 + 3e-5)

    with pytest.raises(ComposerError, match="name the difference, or repair it"):
        checked(Reference(CASE.name, "off by 3e-5", off))


def test_another_loss_with_the_same_gradient_has_to_be_said():
    row = Row("host", WANTED.loss + 0.1, 1.0, WANTED.gradient)
    with pytest.raises(ComposerError, match="name the difference"):
        row.markdown(CASE, WANTED.gradient, WANTED.loss)
    assert "loss only" in replace(row, differs="loss only: x").markdown(CASE, WANTED.gradient, WANTED.loss)


def test_a_difference_that_is_claimed_must_be_there():
    with pytest.raises(ComposerError, match="the gradients agree"):
        checked(Reference(CASE.name, "plain torch", surrogate, "said to differ"))


def test_a_host_that_is_off_ends_the_generation(tmp_path):
    found = parity.Measurement("host")
    for case in cases():
        found.about["left_out"][case.name] = "not this one"
    found._keep(CASE.name, WANTED.loss, WANTED.gradient)
    found.write(tmp_path / "good.npz")
    assert f"| | host | {WANTED.loss:.6f}" in table([tmp_path / "good.npz"])
    found._keep(CASE.name, WANTED.loss, -WANTED.gradient)
    found.write(tmp_path / "bad.npz")
    with pytest.raises(ComposerError, match=r"dapo, off-policy, host: relative L2 2\.0"):
        table([tmp_path / "bad.npz"])


def rows() -> list[list[str]]:
    lines = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_committed_report_keeps_its_promises():
    case, seen = "", set()
    for name, who, loss, norm, cosine, distance, differs in rows():
        case = name or case
        seen.add((case, who.split(":")[0]))
        if who.startswith("oracle") or loss.startswith("not offered"):
            continue
        assert float(norm) > 0 and float(loss) == float(loss)
        agrees = float(distance) <= (MODEL_AGREE if case.startswith("smollm2") else AGREE)
        assert agrees == (not differs or differs.startswith("loss only")), (case, who)
        assert float(cosine) <= 1 + 1e-9 and (not agrees or float(cosine) > 1 - 1e-6)
    names = {case.name for case in cases()}
    assert names <= {case for case, _ in seen}
    for whose in ("trl", "verl", "prime_rl", "TRL GRPOTrainer", "TRL experimental SDPO", "lasgroup/SDPO", "OPSD"):
        assert any(who == whose for _, who in seen), whose
    assert sum(who.startswith("verl ") for _, who in seen) >= 5
    for whose in ("trl", "verl", "prime_rl"):
        assert ("smollm2-135m-instruct: all three", whose) in seen


def test_the_committed_report_has_the_numbers_of_today():
    """The oracle's rows are computed again: a changed problem, formula or section makes the document old."""
    found = {name: (float(loss), float(norm)) for name, who, loss, norm, *_ in rows() if who == "oracle (float64)"}
    for case in cases():
        part = expected(case.problem, case.composer)["total"]
        assert found[case.name] == pytest.approx((part.loss, float(np.linalg.norm(part.gradient))), abs=1.5e-6)


def test_a_batch_comes_back_from_its_file(tmp_path):
    problem = replace(make_problem(3, lengths=(3, 2), pairs=((2, 1),)), model="some-model", vocabulary=50)
    save_batch(problem, tmp_path / "batch.json")
    read = load_batch(tmp_path / "batch.json")
    assert read.model == "some-model" and read.vocabulary == 50
    for a, b in zip((*problem.rows, *problem.pairs), (*read.rows, *read.pairs), strict=True):
        for name in a.__dataclass_fields__:
            assert np.array_equal(getattr(a, name), getattr(b, name)), name


@pytest.fixture
def checkout(tmp_path):
    """A repository with one loss in a class, as a reference's."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "trainer.py").write_text(
        "import nothing_that_is_here\n\nclass Trainer:\n    @staticmethod\n    def loss(x, weight: Unknown = 2.0):\n"
        "        return torch.sum(x) * weight\n"
    )
    git = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    return folder


def test_a_function_is_read_from_a_commit_without_importing_its_module(checkout):
    import torch

    (checkout / "trainer.py").write_text("broken(")  # the commit counts, not the work tree
    loss = published.function_of(checkout, "trainer.py", "loss", {})
    assert float(loss(torch.ones(3))) == 6.0 and re.fullmatch(r"[0-9a-f]{40}", published.commit_of(checkout))


def test_what_is_no_reference_is_a_clear_error(checkout, tmp_path):
    with pytest.raises(ConfigError, match="no function gain"):
        published.function_of(checkout, "trainer.py", "gain", {})
    with pytest.raises(ConfigError, match="no git checkout"):
        published.commit_of(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "composer_plugins.conformance.parity", "measure", "published", "-o", "x.npz"],
        capture_output=True, text=True, timeout=120, cwd=tmp_path, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 1 and "--sdpo and --opsd" in done.stderr and "Traceback" not in done.stderr


def test_measured_files_hold_no_pickles(tmp_path):
    found = parity.Measurement("host")
    found._keep("a", 1.0, np.ones(2))
    found.write(tmp_path / "m.npz")
    assert json.loads(str(np.load(tmp_path / "m.npz")["about"]))["losses"] == {"a": 1.0}


@pytest.mark.skipif(
    not (os.environ.get("COMPOSER_SDPO") and os.environ.get("COMPOSER_OPSD")),
    reason="COMPOSER_SDPO and COMPOSER_OPSD name no checkouts of lasgroup/SDPO and siyan-zhao/OPSD",
)
def test_published_losses_agree_or_differ_as_the_report_says():
    sdpo, opsd = Path(os.environ["COMPOSER_SDPO"]), Path(os.environ["COMPOSER_OPSD"])
    for reference in (*published.sdpo_references(sdpo), *published.opsd_references(opsd)):
        assert checked(reference) == bool(reference.differs), reference.name
