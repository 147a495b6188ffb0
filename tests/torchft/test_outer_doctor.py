"""The doctor names every bad combination of time limits; the commands start and end islands."""

from __future__ import annotations

import sys

import pytest
from composer_torchft import rounds
from composer_torchft.doctor import LighthouseLimits, problems, reach
from composer_torchft.rounds import Round, RoundLog
from typer.testing import CliRunner

from composer_plugins.cli import build_app
from composer_plugins.config import OuterConfig
from composer_plugins.errors import ConfigError, OuterLoopError

GOOD = {"sync_every": 4, "min_islands": 2, "start_with": 2}
HOUSE = LighthouseLimits(30, 5, 2)


def test_the_defaults_fit_together():
    assert problems(OuterConfig(**GOOD), HOUSE, round_seconds=900) == []


@pytest.mark.parametrize(
    ("options", "house", "seconds", "said"),
    [
        ({"timeouts": {"quorum": 20}}, HOUSE, None, "gives up before the lighthouse stops waiting"),
        ({"timeouts": {"quorum": 100}}, HOUSE, 500, "not above a round of 500 s"),
        ({"timeouts": {"allreduce": 3}}, HOUSE, None, "still counted as alive"),
        ({"timeouts": {"quorum_retries": 0}}, HOUSE, None, "restart of the lighthouse ends every island"),
        ({"timeouts": {"quorum_retries": 60}}, HOUSE, None, "back up to 59 s late"),
        ({"min_islands": 1}, HOUSE, None, "cut off from the others"),
        ({"start_with": 1}, HOUSE, None, "begin anew"),
        ({"min_islands": 3}, HOUSE, None, "Start it with --min-islands 3"),
        ({"lighthouse": "http://10.0.0.1:29510"}, HOUSE, None, "other islands cannot reach this one"),
        ({}, LighthouseLimits(30, 0.5, 2), None, "taken for dead"),
        ({}, LighthouseLimits(0.05, 5, 2), None, "left out of the sync"),
    ],
)
def test_a_bad_combination_is_explained(options, house, seconds, said):
    found = problems(OuterConfig(**{**GOOD, **options}), house, round_seconds=seconds)
    assert len(found) == 1 and said in found[0], found


def test_an_address_that_is_none():
    assert "expected http://HOST:PORT" in reach("10.0.0.1:29510")
    assert "does not answer" in reach("http://127.0.0.1:9", timeout=1)


def test_the_command_reads_a_recipe(tmp_path, lighthouse):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"composer: {{outer: {{sync_every: 4, start_with: 2, lighthouse: '{lighthouse().address}'}}}}\n")
    result = CliRunner().invoke(build_app(), ["islands", "doctor", str(recipe), "--round-seconds", "7200"])
    assert result.exit_code == 0 and "not above a round of 7200 s" in result.output
    assert "does not answer" not in result.output


@pytest.mark.parametrize(
    ("options", "steps", "said"),
    [
        ({}, 48, ["12 rounds with outer momentum 0.9", "7 times as far"]),
        ({}, 50, ["12 rounds with outer momentum 0.9", "no multiple of sync_every 4: the last 2"]),
        ({}, 4 * 400, []),
        ({"momentum": 0.5}, 48, []),
        ({"momentum": 0, "lr": 1, "nesterov": False}, 49, ["the last 1 of every island will be given up"]),
    ],
)
def test_short_runs_and_uneven_ends_are_pointed_out(options, steps, said):
    found = problems(OuterConfig(**{**GOOD, **options}), HOUSE, steps=steps)
    assert len(found) == bool(said) + (len(said) > 1 and "multiple" in said[1])
    assert all(text in "".join(found) for text in said)


def doctor(*arguments: object) -> str:
    result = CliRunner().invoke(build_app(), ["islands", "doctor", *map(str, arguments)])
    assert result.exit_code == 0, result.exception
    return result.output


def test_the_command_reads_a_prime_rl_toml(tmp_path):
    recipe = tmp_path / "rl.toml"
    recipe.write_text(
        "max_steps = 40\n[trainer.env_vars]\nTORCHFT_LIGHTHOUSE = 'http://127.0.0.1:9'\n"
        "COMPOSER_OUTER = '{sync_every: 4, min_islands: 3, timeouts: {allreduce: 3}}'\n"
    )
    found = doctor(recipe)
    for text in ("still counted as alive", "--min-islands 3", "10 rounds", "http://127.0.0.1:9 does not answer"):
        assert text in found
    found = doctor(recipe, "--set", "composer.outer.timeouts.allreduce=60", "--set", "composer.outer.momentum=0.5")
    assert "still counted" not in found and "10 rounds" not in found


@pytest.mark.parametrize("variable", ["{sync_every: [", "20", "{sync_evry: 4}"])
def test_a_malformed_variable_in_a_toml(tmp_path, variable):
    (tmp_path / "rl.toml").write_text(f"[trainer.env_vars]\nCOMPOSER_OUTER = '{variable}'\n")
    result = CliRunner().invoke(build_app(), ["islands", "doctor", str(tmp_path / "rl.toml")])
    assert isinstance(result.exception, ConfigError)


def test_a_recipe_without_an_outer_loop(tmp_path):
    for name, text in (("rl.toml", "[trainer]\n"), ("recipe.yaml", "composer: {}\n")):
        (tmp_path / name).write_text(text)
        result = CliRunner().invoke(build_app(), ["islands", "doctor", str(tmp_path / name)])
        assert isinstance(result.exception, OuterLoopError) and "has no outer loop" in str(result.exception)


def test_the_lighthouse_of_the_environment_is_tried_too(tmp_path, monkeypatch):
    (tmp_path / "recipe.yaml").write_text("composer: {outer: {sync_every: 4}}\ntrainer: {max_steps: 4}\n")
    monkeypatch.setenv("TORCHFT_LIGHTHOUSE", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 does not answer" in doctor(tmp_path / "recipe.yaml")


def test_the_table_of_a_run_that_was_killed(tmp_path):
    log = RoundLog(tmp_path / "outer.jsonl")
    for step in (1, 2):
        log.add(Round(step, 0, 3, step == 1, False, 2, 5 * step, 4_200_000, 1.25, 0.5, "0123456789abcdef"))
    with (tmp_path / "outer.jsonl").open("a") as file:
        file.write('{"outer_step": 3, "frag')  # killed while it wrote
    assert rounds.read(tmp_path / "outer.jsonl") == log.rounds
    result = CliRunner().invoke(build_app(), ["islands", "table", str(tmp_path / "outer.jsonl")])
    assert result.exit_code == 0
    for text in ("4.20", "1.25", "0123456789", "2 (given up)", "10"):
        assert text in result.output
    (tmp_path / "other").write_text("{}\n{}\n")
    result = CliRunner().invoke(build_app(), ["islands", "table", str(tmp_path / "other")])
    assert isinstance(result.exception, OuterLoopError) and "other:1 is no record" in str(result.exception)


def test_islands_are_started_with_names_numbers_and_one_lighthouse(tmp_path):
    code = (
        "import os, sys; open(sys.argv[1], 'w').write('|'.join(os.environ[n] for n in "
        "('TORCHFT_LIGHTHOUSE', 'COMPOSER_ISLAND', 'COMPOSER_ISLAND_INDEX')))"
    )
    command = ["islands", "run", "-n", "2", "--", sys.executable, "-c", code, str(tmp_path / "{i}")]
    assert CliRunner().invoke(build_app(), command).exit_code == 0
    first, second = ((tmp_path / str(i)).read_text().split("|") for i in range(2))
    assert first[0] == second[0] and first[0].startswith("http://127.0.0.1:")
    assert [first[1:], second[1:]] == [["island-0", "0"], ["island-1", "1"]]


def test_the_exit_code_of_an_island_is_told():
    result = CliRunner().invoke(
        build_app(), ["islands", "run", "-n", "2", "--", sys.executable, "-c", "raise SystemExit({i})"]
    )
    assert isinstance(result.exception, OuterLoopError) and "island 1: exit code 1" in str(result.exception)


def test_an_island_that_writes_its_last_checkpoint_is_left_in_peace(monkeypatch):
    """Island 1 fails; island 0 ends well a little later, which it is given more time for than to end when told to."""
    monkeypatch.setattr("composer_torchft.islands.GRACE", 0.2)
    last = "import time; time.sleep(0 if {i} else 2); raise SystemExit({i} * 3)"
    error = CliRunner().invoke(build_app(), ["islands", "run", "-n", "2", "--", sys.executable, "-c", last]).exception
    assert isinstance(error, OuterLoopError) and "island 1: exit code 3" in str(error) and "island 0" not in str(error)


@pytest.mark.parametrize(
    ("fewest", "outcome"), [([], "island 0: ended, since too few were left"), (["--min-islands", "1"], "")]
)
def test_islands_that_are_left_alone_do_not_wait_for_their_time_limit(tmp_path, monkeypatch, fewest, outcome):
    """Island 1 fails. Island 0 can go on alone, when one is enough; else it would wait for an hour."""
    monkeypatch.setattr("composer_torchft.islands.LAST_WORDS", 1.0)
    wait = "import time; time.sleep(0 if {i} else " + ("2" if fewest else "40") + "); raise SystemExit({i} * 3)"
    command = ["islands", "run", "-n", "2", *fewest, "--", sys.executable, "-c", wait]
    error = CliRunner().invoke(build_app(), command).exception
    assert isinstance(error, OuterLoopError) and "island 1: exit code 3" in str(error)
    assert outcome in str(error) and ("island 0" in str(error)) == bool(outcome)
