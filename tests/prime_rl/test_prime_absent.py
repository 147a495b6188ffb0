"""A missing prime-rl is said in so many words, and is never a pass. None of this needs prime-rl."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run(*command, **env):
    clean = {k: v for k, v in os.environ.items() if k not in ("PRIME_RL", "COMPOSER_REQUIRE_PRIME_RL", "MAKEFLAGS")}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT, env={**clean, **env})
    return done.returncode, done.stdout + done.stderr


def outcome(**env):
    """Exit code and words of one file of tests."""
    return run(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", HERE / "test_prime_versions.py", **env)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["test-prime-rl", "test-prime-rl-slow"])
@pytest.mark.parametrize("tree", ["", "/no/such/folder", str(ROOT)])
def test_make_without_a_tree_fails_before_it_sets_anything_up(target, tree, tmp_path):
    code, said = run("make", target, f"PRIME_RL={tree}", f"PRIME_VENV={tmp_path / 'venv'}")
    assert code == 2 and f"PRIME_RL={tree} is no prime-rl source tree" in said and "nothing was tested" in said
    assert not (tmp_path / "venv").exists()


def test_required_and_absent_ends_the_run():
    code, said = outcome(COMPOSER_REQUIRE_PRIME_RL="1")
    assert code != 0 and "no prime-rl here" in said and " passed" not in said


def test_a_path_that_is_no_tree_is_named():
    code, said = outcome(COMPOSER_REQUIRE_PRIME_RL="1", PRIME_RL="/no/such/folder")
    assert code != 0 and "PRIME_RL=/no/such/folder is no prime-rl source tree" in said and " passed" not in said


def test_elsewhere_its_tests_are_skipped_with_the_command_that_runs_them():
    code, said = outcome()
    assert code == 0 and "test_prime_versions.py" in said
    assert "SKIPPED [2]" in said and "make test-prime-rl PRIME_RL=/path/to/prime-rl" in said


def test_prime_rls_own_suite_without_a_tree_is_an_error():
    code, said = run(sys.executable, HERE / "own_suite.py", "/no/such/folder")
    assert code == 2 and said.startswith("usage:")
