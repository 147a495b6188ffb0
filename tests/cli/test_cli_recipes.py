"""Recipes at the command line, and in an installed wheel: someone who has only the package has them too."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from composer_plugins.cli import build_app
from composer_plugins.errors import ConfigError

ROOT = Path(__file__).parents[2]
RECIPES = sorted(p.relative_to(ROOT / "recipes") for p in (ROOT / "recipes").rglob("*.*"))


def run(*arguments):
    return CliRunner().invoke(build_app(), ["recipes", *map(str, arguments)], env={"COLUMNS": "200"})


def test_all_recipes_are_listed_with_what_they_are():
    shown = run().output
    for recipe in RECIPES:
        assert str(recipe) in shown
    assert "Two islands on one machine: the quickstart" in " ".join(shown.split())


def test_copies_are_the_recipes(tmp_path):
    assert run("-o", tmp_path / "mine").exit_code == 0
    copied = sorted(p.relative_to(tmp_path / "mine") for p in (tmp_path / "mine").rglob("*.*"))
    assert copied == RECIPES
    assert all((tmp_path / "mine" / p).read_bytes() == (ROOT / "recipes" / p).read_bytes() for p in RECIPES)


@pytest.mark.parametrize("host", ["prime_rl", "prime-rl"])
def test_one_hosts_recipes(tmp_path, host):
    run(host, "-o", tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"prime_rl"}


def test_a_changed_copy_is_never_overwritten(tmp_path):
    run("-o", tmp_path)
    mine, other = tmp_path / "verl/composer_all.yaml", tmp_path / "trl/composer.yaml"
    mine.write_text("host: verl  # mine\n")
    other.unlink()
    result = run("-o", tmp_path)
    assert isinstance(result.exception, ConfigError) and str(mine) in str(result.exception)
    assert mine.read_text() == "host: verl  # mine\n" and not other.exists()


def test_unknown_host_and_unwritable_folder(tmp_path):
    assert "expected one of prime_rl, trl, verl" in str(run("nemo").exception)
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "x", tmp_path / ("x" * 300)):
        result = run("-o", folder)
        assert isinstance(result.exception, ConfigError) and "cannot write recipes" in str(result.exception)


def test_a_wheel_holds_the_recipes(tmp_path):
    pytest.importorskip("setuptools", reason="building a wheel needs setuptools, which this environment lacks")
    source = tmp_path / "source"
    # Links are kept, as in a clone.
    for name in ("composer_plugins", "recipes", "pyproject.toml", "README.md", "LICENSE", "adapters"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        extra = {"symlinks": True, "ignore": shutil.ignore_patterns("__pycache__")} if (ROOT / name).is_dir() else {}
        source.mkdir(exist_ok=True)
        copy(ROOT / name, source / name, **extra)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "--target", tmp_path / "site", source], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    show = subprocess.run(
        [sys.executable, "-m", "composer_plugins.cli", "recipes", "--path"],
        capture_output=True, text=True, timeout=120, cwd=tmp_path / "site",
    )  # fmt: skip
    installed = Path(show.stdout.strip())
    assert installed == tmp_path / "site/composer_plugins/recipes", show.stderr
    assert sorted(p.relative_to(installed) for p in installed.rglob("*.*")) == RECIPES
