"""What a recipe asks for and nothing in it would give; and `composer-rl train`, which checks what runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

from composer_prime_rl.host import HOST
from composer_prime_rl.recipe import read_toml, section_problems

from composer_plugins.errors import ConfigError

RECIPES = Path(__file__).parents[2] / "recipes" / "prime_rl"
HARBOR = {"name": "harbor", "env": {"taskset": {"id": "harbor"}}}
SDPO = {"sdpo": {"weight": 0.5, "teacher": {"kind": "live"}}}
PAIRS = {"replay_dpo": {"weight": 0.1, "pairs": "pairs.jsonl"}}
WRAPPED = {"env": {"id": "composer-prime-rl", "taskset": {"id": "harbor"}, "composer": SDPO}}
ALGO = {"type": "composer", "composer": SDPO}
PAIR_SOURCE = {"env": {"taskset": {"id": "composer-prime-rl", "composer": PAIRS}}}


def recipe_of(*sources, algo=None, **kwargs):
    loss = {"type": "custom", "import_path": "composer_prime_rl.loss.composer_loss", "kwargs": kwargs}
    orchestrator = {"train": {"source": list(sources)}} if sources else {}
    return {"trainer": {"loss": loss}, "orchestrator": orchestrator | ({"algo": algo} if algo else {})}


@pytest.mark.parametrize(
    ("sources", "kwargs", "says"),
    [
        ([HARBOR], {"composer": SDPO}, "kwargs.composer.sdpo.weight is above 0, but no source is wrapped"),
        ([HARBOR], {"composer": SDPO, "sdpo_route": "loss"}, "no source is wrapped"),
        ([{**HARBOR, "env": {"id": "mine"}}], {"composer": SDPO}, "no source is wrapped"),
        ([PAIR_SOURCE], {"composer": SDPO}, "no source is wrapped"),
        # an environment that plays pairs stamps nothing, whatever its own section says
        ([{"env": {**PAIR_SOURCE["env"], "id": "composer-prime-rl", "composer": SDPO}}], {}, "no source is wrapped"),
        ([{**HARBOR, "algo": {"type": "grpo"}}], {"composer": SDPO, "algo": ALGO}, "no source is wrapped"),
        ([HARBOR], {"composer": PAIRS}, "kwargs.composer.replay_dpo.weight is above 0, but no source plays pairs"),
        ([HARBOR], {"composer": {**PAIRS, "policy": {"weight": 0}}}, "no source plays pairs"),
        ([WRAPPED], {"composer": {**SDPO, **PAIRS}}, "no source plays pairs"),
        (
            [{"env": {**WRAPPED["env"], "composer": {**SDPO, **PAIRS}}}],
            {},
            "source.0.env.composer.replay_dpo.weight is above 0",
        ),
        ([PAIR_SOURCE], {"composer": {"replay_dpo": {**PAIRS["replay_dpo"], "weight": 0.3}}}, "weight is 0.1 and"),
        ([HARBOR], {"composer": {"monitor": {"token_view": 4, "grad_norms_every": 5}}}, "token_view is not available"),
        (
            [HARBOR],
            {"composer": {"policy": {"objective": "dppo"}}, "tokens_per_sample": 500, "aggregation": "host"},
            "tokens_per_sample has no effect",
        ),
    ],
)
def test_a_channel_or_key_that_would_do_nothing_is_a_finding(sources, kwargs, says):
    problems = section_problems(recipe_of(*sources, **kwargs))
    assert any(says in problem for problem in problems), problems


EVERYWHERE = {**SDPO, **PAIRS}


@pytest.mark.parametrize(
    ("sources", "kwargs"),
    [
        ([], {"composer": EVERYWHERE}),  # an overlay, or a trainer on recorded pairs
        ([HARBOR], {}),
        ([HARBOR, WRAPPED], {"composer": SDPO}),
        ([WRAPPED, PAIR_SOURCE], {"composer": EVERYWHERE}),
        ([WRAPPED, PAIR_SOURCE], {"sdpo_route": "ref_kl"}),  # the loss needs to know of neither
        ([HARBOR], {"composer": SDPO, "algo": ALGO}),
        # references of the user's own: the loss counts them, and says so when none come
        ([{"env": {"id": "mine"}}], {"composer": SDPO, "sdpo_route": "loss"}),
        # the same table in every place
        (
            [
                {"env": {**WRAPPED["env"], "composer": EVERYWHERE, "sdpo_route": "loss"}},
                {"env": {"taskset": {"id": "composer-prime-rl", "composer": EVERYWHERE}}},
            ],
            {"composer": EVERYWHERE, "sdpo_route": "loss"},
        ),
    ],
)
def test_a_channel_that_gets_its_tokens_is_no_finding(sources, kwargs):
    assert section_problems(recipe_of(*sources, **kwargs)) == []


@pytest.fixture
def new_enough(prime_tree):
    types = prime_tree / "packages" / "prime-rl-configs" / "src" / "prime_rl" / "configs" / "orchestrator.py"
    if not types.is_file() or "class TrainSourceConfig" not in types.read_text():
        pytest.skip("the recipes are for 0.8.1.dev53 and later: earlier versions name sources otherwise")


@pytest.fixture
def ran(monkeypatch, tmp_path, new_enough):
    """The arguments that each launch got; nothing is launched."""
    import composer_prime_rl.host as module

    log = tmp_path / "ran.txt"
    log.write_text("")
    code = f"import sys; open({str(log)!r}, 'a').write(sys.argv[1] + chr(10))"
    monkeypatch.setattr(
        module, "_launcher", lambda ours: [sys.executable, "-c", code, "ours" if ours else "prime-rl's"]
    )
    return lambda: log.read_text().splitlines()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("trainer.loss.kwargs.sdpo_route=loss", "channel 2 would count twice"),
        ("trainer.loss.kwargs.composer.sdpo.weight=0.25", "set both to the same"),
        ("trainer.loss.kwargs.composer.monitor.token_view=4", "token_view is not available"),
        ("trainer.loss.import_path=composer_prime_rl.loss.other", "import_path 'composer_prime_rl.loss.other'"),
    ],
)
@pytest.mark.prime_rl
def test_train_checks_what_runs_and_not_the_file_alone(ran, tmp_path, override, says):
    overrides = [f"@={RECIPES / 'composer_base.toml'}", override]
    with pytest.raises(ConfigError, match=re.escape(says)):
        HOST.train(RECIPES / "composer_sdpo.toml", output_dir=tmp_path / "out", overrides=overrides)
    assert ran() == []


@pytest.mark.prime_rl
def test_train_checks_the_recipe_on_its_base(ran, tmp_path):
    """The base's source is not wrapped, and the recipe's loss has a weight for channel 2."""
    base, recipe = tmp_path / "base.toml", tmp_path / "mine.toml"
    base.write_text((RECIPES / "composer_base.toml").read_text())
    recipe.write_text(
        '[trainer.loss]\ntype = "custom"\nimport_path = "composer_prime_rl.loss.composer_loss"\n'
        '[trainer.loss.kwargs.composer.sdpo]\nweight = 0.5\nteacher.kind = "live"\n'
    )
    assert section_problems(read_toml(recipe)) == []
    options = {"output_dir": tmp_path / "out", "overrides": [f"@={base}"]}
    with pytest.raises(ConfigError, match="no source is wrapped"):
        HOST.train(recipe, **options)
    assert ran() == []


LAUNCHES = """
import sys
from pathlib import Path
import composer_prime_rl.host as module
module._launcher = lambda ours: [sys.executable, "-c", f"print('ours' if {ours} else 'theirs')"]
recipe, base, out = sys.argv[1:]
module.HOST.train(Path(recipe), output_dir=Path(out), overrides=["@=" + base])
"""


@pytest.mark.prime_rl
@pytest.mark.parametrize(("ours", "launcher"), [(True, "ours"), (False, "theirs")])
def test_the_bases_algorithm_chooses_the_launcher(new_enough, tmp_path, ours, launcher):
    """In a process of its own: prime-rl takes a new algorithm only before its classes are imported."""
    base = tmp_path / "base.toml"
    algo = '[orchestrator.algo]\ntype = "composer"\ncomposer.sdpo = { weight = 0.5, teacher.kind = "live" }\n'
    base.write_text((RECIPES / "composer_base.toml").read_text() + (algo if ours else ""))
    recipe = str(RECIPES / "composer_policy.toml")
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHES, recipe, str(base), str(tmp_path / "out")], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.split() == [launcher], done.stdout + done.stderr


@pytest.mark.prime_rl
@pytest.mark.parametrize("arm", ["policy", "sdpo", "replay_dpo", "all"])
def test_the_shipped_arms_run_on_the_base(ran, tmp_path, arm):
    overrides = [f"@={RECIPES / 'composer_base.toml'}"]
    HOST.train(RECIPES / f"composer_{arm}.toml", output_dir=tmp_path / "out", overrides=overrides)
    assert ran() == ["prime-rl's"]


@pytest.mark.prime_rl
def test_an_override_may_mend_a_recipe(ran, tmp_path):
    recipe = tmp_path / "mine.toml"
    text = (RECIPES / "composer_sdpo.toml").read_text()
    recipe.write_text(text.replace('sdpo_route = "ref_kl"           # prime', 'sdpo_route = "loss" # prime'))
    assert section_problems(read_toml(recipe))
    base = f"@={RECIPES / 'composer_base.toml'}"
    HOST.train(recipe, output_dir=tmp_path / "out", overrides=[base, "trainer.loss.kwargs.sdpo_route=ref_kl"])
    assert ran() == ["prime-rl's"]
