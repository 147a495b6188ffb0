"""docs/how-to/prime-rl.md against the code: what it has users install, its keys, its metrics and commands."""

import re
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("torch")

from composer_prime_rl.scoring import ScoringOptions
from composer_prime_rl.section import LossOptions

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "how-to" / "prime-rl.md").read_text()


def name_of(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def installed_by_hand() -> set[str]:
    return {name_of(word) for word in re.search(r"&& uv pip install (.*)", PAGE)[1].split()}


def already_there() -> set[str]:
    found = re.search(r"what else we import \((.*?)\)", PAGE, re.DOTALL)[1]
    return {name_of(word) for word in re.split(r",\s+", found)}


def keys_of(table: str) -> set[str]:
    """First column of the table whose header begins with `table`."""
    rows = PAGE[PAGE.index(f"| {table} |") :].split("\n\n")[0].splitlines()[2:]
    return {key for row in rows for key in re.findall(r"`([\w.]+)`", row.split("|")[1])}


def test_together_the_two_lists_are_our_dependencies():
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert installed_by_hand() | already_there() == set(map(name_of, wanted))
    assert not installed_by_hand() & already_there()


@pytest.mark.prime_rl
def test_prime_rls_lock_has_the_ones_that_are_not_installed_by_hand(prime_tree):
    lock = tomllib.loads((prime_tree / "uv.lock").read_text())
    packages = {package["name"]: package for package in lock["package"]}
    found, left = set(), ["prime-rl"]
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += [needed["name"] for needed in packages.get(name, {}).get("dependencies", [])]
    assert already_there() <= found
    assert not installed_by_hand() & found  # else the command says too much


def test_every_key_of_the_loss_is_in_its_table_and_no_other():
    assert keys_of("key of `[trainer.loss.kwargs]`") == set(LossOptions.model_fields)


def test_every_key_of_the_environment_and_the_taskset():
    vf = pytest.importorskip("verifiers.v1", reason="verifiers is not installed (make test-prime-rl)")
    from composer_prime_rl.environment import ComposerEnvConfig
    from composer_prime_rl.pair_taskset import PairTasksetConfig

    own = set(ComposerEnvConfig.model_fields) - set(vf.EnvConfig.model_fields) - {"agent", "scoring"}
    scoring = {"scoring.timeout", *(f".{name}" for name in ScoringOptions.model_fields if name != "timeout")}
    assert keys_of("key of `[env]`") == own | scoring
    assert keys_of("key of `[env.taskset]`") == set(PairTasksetConfig.model_fields) - set(vf.TasksetConfig.model_fields)


def test_the_make_targets_and_files_that_it_names_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", PAGE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for file in re.findall(r"`(tests/prime_rl/[\w/.]+)`", PAGE):
        assert (ROOT / file).exists(), file
