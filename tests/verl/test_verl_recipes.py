"""The recipes under recipes/verl, composed by verl's own configuration system; what `composer-rl validate` says."""

import importlib.util
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from composer_verl.host import HOST, compose, main_ppo, problems

from composer_plugins.cli.validate import examine
from composer_plugins.errors import ConfigError

if importlib.util.find_spec("verl") is None:
    pytest.skip(
        "verl is not installed: it needs an environment of its own (docs/how-to/verl.md)", allow_module_level=True
    )

RECIPES = Path(__file__).parents[2] / "recipes" / "verl"
POLICY = RECIPES / "composer_policy.yaml"


def merged(old, new):
    return {**old, **{k: merged(old.get(k, {}), v) if isinstance(v, dict) else v for k, v in new.items()}}


def recipe(tmp_path, **changes):
    """A recipe of a user on our base: the policy recipe with keys changed."""
    for file in RECIPES.glob("*.yaml"):
        (tmp_path / file.name).write_text(file.read_text())
    data = merged(yaml.safe_load(POLICY.read_text()), changes)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


ARMS = {  # recipe: (trainer_mode, channels with weight above 0)
    "composer_policy": ("sync", {"policy"}),
    "composer_sdpo": ("composer", {"policy", "sdpo"}),
    "composer_replay_dpo": ("composer", {"policy", "replay_dpo"}),
    "composer_all": ("composer", {"policy", "sdpo", "replay_dpo"}),
}


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    """A pairs stage file with one pair."""
    from composer_plugins.traces.schema import Message, Pair, Provenance, SourceRef
    from composer_plugins.traces.store import Manifest, write_stage

    pair = Pair(
        id="p", state_id="s", messages=[Message(role="user", content="say red")],
        chosen=Message(role="assistant", content="red"), rejected=Message(role="assistant", content="blue"),
        provenance=Provenance(rule="agreement", chosen_by=["t"], rejected_by=["recorded"],
                              source_ref=SourceRef(file="f", line=1)),
    )  # fmt: skip
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    write_stage(path, [pair], Manifest(stage="pairs", record="Pair", written=0))
    return path


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_composes_and_names_its_command(path, pairs_file):
    config = compose(path)
    assert config.host == "verl" and yaml.safe_load(path.read_text())["host"] == "verl"
    assert config.actor_rollout_ref.actor.policy_loss.loss_mode == "composer_dr_grpo"
    assert config.algorithm.adv_estimator == "composer_dr_grpo"
    if path != RECIPES / "composer_base.yaml":
        command = f"python -m verl.trainer.main_ppo --config-dir recipes/verl --config-name {path.stem}"
        assert command in path.read_text()
        overrides = [f"composer.replay_dpo.pairs={pairs_file}"] if config.composer.get("replay_dpo") else []
        assert problems(path, overrides) == []


@pytest.mark.parametrize("name", ARMS)
def test_each_arm_trains_its_channels_and_no_other(name):
    from composer_verl.checks import section_of

    config = compose(RECIPES / f"{name}.yaml")
    section, (mode, channels) = section_of(config), ARMS[name]
    assert config.trainer.v1.trainer_mode == mode
    assert {c for c in ("policy", "sdpo", "replay_dpo") if getattr(section, c).weight > 0} == channels
    assert config.trainer.experiment_name == name.removeprefix("composer_")


def test_an_arm_without_its_pairs_says_which_stage_writes_them():
    found = problems(RECIPES / "composer_replay_dpo.yaml", [])
    assert found == ["composer.replay_dpo.pairs: pairs.jsonl does not exist: run `composer-rl pairs`."]


def shortest_changes():
    """The two YAML blocks that docs/how-to/verl.md tells an existing user to add."""
    text = (RECIPES.parents[1] / "docs" / "how-to" / "verl.md").read_text()
    part = text.split("## The shortest change")[1].split("\n## ")[0]
    return [yaml.safe_load(block.split("```")[0]) for block in part.split("```yaml")[1:]]


@pytest.mark.parametrize("blocks", [(0,), (1,), (0, 1)], ids=["menu", "recipe", "both"])
def test_the_documented_change_of_a_users_own_configuration(blocks, tmp_path, pairs_file):
    """On verl's ppo_trainer.yaml with what any run sets; nothing of ours but the documented lines."""
    own = {
        "defaults": ["ppo_trainer", "_self_"], "host": "verl", "critic": {"enable": False},
        "algorithm": {"adv_estimator": "grpo"}, "actor_rollout_ref": {
            "actor": {"ppo_micro_batch_size_per_gpu": 1, "strategy": "fsdp2"}, "model": {"path": "m"},
            "rollout": {"name": "vllm", "log_prob_micro_batch_size_per_gpu": 1}},
    }  # fmt: skip
    for block in blocks:
        own = merged(own, shortest_changes()[block])
    if 1 in blocks:
        own = merged(own, {"composer": {"replay_dpo": {"pairs": str(pairs_file)}}})
    if blocks == (0, 1):  # the comment beside the key
        own["composer"]["policy"]["objective"] = "dr_grpo"
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(own, sort_keys=False))
    assert problems(path, []) == []
    config = compose(path)
    assert config.trainer.v1.trainer_mode == ("composer" if 1 in blocks else "sync")
    assert config.actor_rollout_ref.actor.policy_loss.loss_mode == ("composer_dr_grpo" if 0 in blocks else "vanilla")


def test_the_constant_length_is_the_longest_response():
    assert compose(POLICY, ["data.max_response_length=77"]).actor_rollout_ref.actor.loss_scale_factor == 77


@pytest.mark.parametrize("name", ["composer_policy", "composer_all"])
def test_the_documented_command_composes_the_same_configuration(name):
    """`--cfg job` prints what main_ppo would run with, and starts nothing."""
    from omegaconf import OmegaConf

    path = RECIPES / f"{name}.yaml"
    line = next(x for x in path.read_text().splitlines() if "python -m verl" in x).lstrip("# ")
    command = [sys.executable, *shlex.split(line)[1:], "--cfg", "job"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=RECIPES.parents[1])
    assert done.returncode == 0, done.stderr[-2000:]
    printed = OmegaConf.create(done.stdout[done.stdout.index("model_engine:") :])
    assert OmegaConf.to_container(printed) == OmegaConf.to_container(compose(path))
    assert main_ppo(Path(f"recipes/verl/{name}.yaml"), [])[1:] == command[1:-2]


def test_any_objective_of_the_menu_by_one_key():
    for name in ("grpo", "bnpo", "dapo", "gspo", "cispo"):
        overrides = [f"composer.policy.objective={name}"]
        assert problems(POLICY, overrides) == []
        assert compose(POLICY, overrides).actor_rollout_ref.actor.policy_loss.loss_mode == f"composer_{name}"


def test_the_section_reaches_the_loss_and_the_estimator(tmp_path):
    from composer_verl.section import advantage_options, policy_options
    from verl.utils.config import omega_conf_to_dataclass

    path = recipe(tmp_path, composer={"policy": {"objective": "grpo", "clip_low": 0.1, "advantage": {"eps": 1e-6}}})
    assert problems(path, []) == []
    config = compose(path)
    with pytest.warns(UserWarning, match="set it there too"):
        actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert policy_options(actor, "grpo")[0].clip_low == 0.1
    assert advantage_options(config.algorithm).eps == 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"composer": {"policy": {"objective": "gpro"}}}, "Unknown objective 'gpro'"),
        ({"composer": {"policy": {"clip_hihg": 0.3}}}, "Unknown key `composer.policy.clip_hihg`"),
        ({"composer": {"sdpo": {"weight": 1.0}}}, "verl's own trainers do not know this channel"),
        ({"algorithm": {"adv_estimator": "composer_drgrpo"}}, "adv_estimator: verl has no 'composer_drgrpo'"),
        ({"trainer": {"v1": {"trainer_mode": "compsoer"}}}, "trainer_mode: verl has no 'compsoer'"),
        ({"trainer": {"use_v1": False}}, "trainer.use_v1 must be true"),
        (
            {"composer": {"policy": {"advantage": {"eps": 1e-6}}}, "algorithm": {"adv_estimator": "grpo"}},
            "composer.policy.advantage has no effect on verl's own algorithm.adv_estimator=grpo",
        ),
        ({"actor_rollout_ref": {"actor": {"ppo_mini_batch_size": 256, "use_dynamic_bsz": False}}}, "verl's own check"),
        ({"defaults": ["composer_bsae", "_self_"]}, "cannot be composed"),
        ({"actor_rollout_ref": {"actor": {"loss_scale_factor": None}}}, "divides by a constant length"),
    ],
    ids=lambda x: str(x)[:48],
)
def test_what_is_wrong_with_a_recipe_is_said_before_ray_starts(changes, message, tmp_path):
    found = examine(recipe(tmp_path, **changes)).problems
    assert any(message in line for line in found), found


def test_an_estimator_that_does_not_read_the_sections_advantage_is_a_problem(tmp_path):
    path = recipe(tmp_path, composer={"policy": {"advantage": {"singleton": "reward"}}}, algorithm={"composer": {}})
    assert "is not what the advantage estimator reads" in "".join(problems(path, ["algorithm.composer=null"]))


def test_train_refuses_a_wrong_recipe_without_starting_verl(tmp_path):
    with pytest.raises(ConfigError, match="clip_hihg"):
        HOST.train(recipe(tmp_path, composer={"policy": {"clip_hihg": 0.3}}), output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_trl_that_breaks_verls_workers_is_said(tmp_path, monkeypatch):
    """As verl's `apply_monkey_patch` finds it: a TRL 1.16 without the class that verl imports."""
    package = tmp_path / "trl"
    package.mkdir()
    (package / "__init__.py").write_text("")
    info = tmp_path / "trl-1.16.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: trl\nVersion: 1.16.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trl", raising=False)
    assert "give verl an environment of its own" in HOST.validate(POLICY)[0]
    (package / "experimental" / "ppo").mkdir(parents=True)
    assert HOST.validate(POLICY) == []


def test_a_missing_recipe_is_said(tmp_path):
    with pytest.raises(ConfigError, match="there is no such file"):
        compose(tmp_path / "none.yaml")
