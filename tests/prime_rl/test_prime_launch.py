"""prime-rl's own `rl` launcher on our recipes: `--dry-run`, and what its processes would then be started with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("verifiers.v1", reason="verifiers is not installed (make test-prime-rl)")
sys.path.insert(0, str(Path(__file__).parent))

pytestmark = pytest.mark.prime_rl

RECIPES = Path(__file__).parents[2] / "recipes" / "prime_rl"
BASE = RECIPES / "composer_base.toml"
#: recipe -> (environment id, taskset id) of every source that the launcher starts a server for.
ENVS = {
    "policy": {"harbor": ("", "harbor")},
    "sdpo": {"harbor": ("composer-prime-rl", "harbor")},
    "replay_dpo": {"harbor": ("", "harbor"), "replay_dpo": ("", "composer-prime-rl")},
    "all": {"harbor": ("composer-prime-rl", "harbor"), "replay_dpo": ("", "composer-prime-rl")},
}


@pytest.fixture(autouse=True)
def new_enough(prime_tree):
    types = prime_tree / "packages" / "prime-rl-configs" / "src" / "prime_rl" / "configs" / "orchestrator.py"
    if not types.is_file() or "class TrainSourceConfig" not in types.read_text():
        pytest.skip("the recipes are for 0.8.1.dev53 and later: earlier versions name sources otherwise")


def dry_run(folder, *arguments, module="prime_rl.entrypoints.rl"):
    """Run `rl ... --dry-run` in a process of its own; the folder with what it wrote for the processes of a run."""
    command = [sys.executable, "-m", *module.split(), "@", str(BASE), *map(str, arguments)]
    done = subprocess.run(
        [*command, "--output-dir", str(folder), "--dry-run"], capture_output=True, text=True, cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0 and "Dry run complete" in done.stdout, done.stdout + done.stderr
    (configs,) = folder.glob("**/configs")
    return configs


def read_as(kind, path):
    """Read a file as the process that it is for reads it: `trainer @ trainer.json`."""
    from prime_rl.utils.config import cli

    return cli(kind, args=["@", str(path)])


@pytest.mark.parametrize("arm", ENVS)
def test_every_process_of_the_run_reads_its_part_of_the_recipe(arm, tmp_path):
    from composer_prime_rl.recipe import read_toml
    from composer_prime_rl.section import loss_options
    from prime_rl.configs.env_server import EnvServerConfig
    from prime_rl.configs.orchestrator import OrchestratorConfig
    from prime_rl.configs.trainer import TrainerConfig

    recipe = RECIPES / f"composer_{arm}.toml"
    configs = dry_run(tmp_path, "@", recipe)
    loss = read_as(TrainerConfig, configs / "trainer.json").loss
    assert loss.import_path == "composer_prime_rl.loss.composer_loss"
    assert loss_options(loss.kwargs) == loss_options(read_toml(recipe)["trainer"]["loss"]["kwargs"])
    sources = read_as(OrchestratorConfig, configs / "orchestrator.json").train.source
    assert {s.resolved_name: (s.env.id, s.env.taskset.id) for s in sources} == ENVS[arm]
    assert {s.resolved_name: s.group_size for s in sources} == {n: 1 if n == "replay_dpo" else 8 for n in ENVS[arm]}
    servers = {path.stem: path for path in (configs / "envs" / "train").glob("*.json")}
    assert servers.keys() == ENVS[arm].keys()
    for source in sources:
        served = read_as(EnvServerConfig, servers[source.resolved_name]).env
        assert served == source.env  # what the environment worker plays is what the recipe says
        if source.env.id == "composer-prime-rl":
            assert served.section().sdpo.weight == 0.5
        if source.env.taskset.id == "composer-prime-rl":
            assert served.taskset.section().weight == 0.1 and served.taskset.route == "ce"


def test_the_outer_loop_reaches_the_trainers_environment(tmp_path):
    configs = dry_run(tmp_path, "@", RECIPES / "composer_policy.toml", "@", RECIPES / "composer_diloco.toml")
    variables = json.loads((configs / "trainer.json").read_text())["env_vars"]
    assert {"COMPOSER_OUTER", "TORCHFT_LIGHTHOUSE", "COMPOSER_ISLAND"} <= variables.keys()


def test_our_launcher_takes_the_algorithm_through_prime_rls(tmp_path):
    """`python -m composer_prime_rl.launcher rl @ ...`, the optional path."""
    overlay = tmp_path / "mine.toml"
    overlay.write_text(
        '[orchestrator.algo]\ntype = "composer"\n[orchestrator.algo.composer.sdpo]\nweight = 0.5\nteacher.kind = "live"\n'
    )
    configs = dry_run(tmp_path, "@", overlay, module="composer_prime_rl.launcher rl")
    algo = json.loads((configs / "orchestrator.json").read_text())["train"]["source"][0]["algo"]
    assert algo["type"] == "composer" and algo["composer"]["sdpo"]["weight"] == 0.5
