"""`ComposerTrainer`: how verl finds it, what it refuses, what it leaves to verl, what it says about silent channels.

That it trains is in test_verl_trainer.py (verl's real `main_ppo`).
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("verl") is None:
    pytest.skip(
        "verl is not installed: it needs an environment of its own (docs/how-to/verl.md)", allow_module_level=True
    )

from composer_verl.checks import check, section_of
from composer_verl.host import compose
from composer_verl.monitor import StepMonitor

from composer_plugins.channels.silence import SilentChannelWarning
from composer_plugins.config import parse_section
from composer_plugins.errors import ConfigError, SilentChannelError, UnsupportedError

HERE = Path(__file__).parent
RECIPES = HERE.parents[1] / "recipes" / "verl"
VERLS_OWN = ("~actor_rollout_ref.actor.policy_loss", "+actor_rollout_ref.actor.policy_loss.loss_mode=vanilla")
ON = ("trainer.v1.trainer_mode=composer", "actor_rollout_ref.actor.loss_scale_factor=64")


def child(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


LOOK = """
import json, sys
import verl
before = sorted(m for m in ("composer_verl.trainer", "composer_verl.ema_engine", "verl.trainer.ppo.v1", "verl.workers.engine")
                if m in sys.modules)
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.workers.engine import EngineRegistry
trainer = get_trainer_cls("composer")
engines = EngineRegistry._engines["language_model"]
print(json.dumps([before, trainer.__mro__[1].__name__, sorted(engines["composer_fsdp2"]), engines["fsdp2"]["cuda"].__module__,
                  any(type(f).__module__ == "composer_verl.late" for f in sys.meta_path)]))
"""


def test_importing_verl_loads_neither_our_trainer_nor_verls_and_both_are_there_when_asked_for():
    before, base, devices, stock, hook = json.loads(child(LOOK).stdout.splitlines()[-1])
    assert before == [] and base == "PPOTrainerSync" and devices == ["cpu", "cuda", "npu"]
    assert stock == "verl.workers.engine.fsdp.transformer_impl" and not hook


@pytest.mark.parametrize("module", ["trainer", "ema_engine"])
def test_any_module_of_ours_may_come_first(module):
    found = json.loads(child(f"import composer_verl.{module}\n{LOOK}").stdout.splitlines()[-1])
    assert found[1] == "PPOTrainerSync" and found[2] == ["cpu", "cuda", "npu"]


def test_a_broken_trainer_is_logged_and_leaves_verls_own_alone(tmp_path):
    """A module of ours that cannot be imported must not take verl's trainers along."""
    code = (
        "import sys; sys.modules['composer_verl.hinted_rows'] = None\n"
        "from verl.trainer.ppo.v1 import get_trainer_cls\n"
        "print(get_trainer_cls('sync').__name__)\n"
        "try: get_trainer_cls('composer')\n"
        "except ValueError as error: print(error)"
    )
    done = child(code)
    assert "PPOTrainerSync" in done.stdout and "Unknown trainer 'composer'" in done.stdout
    assert "composer-plugins could not register composer_verl.trainer with verl" in done.stderr


def config(*overrides, recipe="composer_policy"):
    return compose(RECIPES / f"{recipe}.yaml", [*ON, *overrides])


def refused(*overrides, recipe="composer_policy"):
    found = config(*overrides, recipe=recipe)
    with pytest.raises(ConfigError) as error:
        check(found, section_of(found))
    return error.value


def test_the_recipes_pass():
    for recipe in ("composer_policy", "composer_sdpo", "composer_all"):
        found = config(recipe=recipe)
        check(found, section_of(found))


@pytest.mark.parametrize(
    ("overrides", "error", "said"),
    [
        (["+composer.sdpo.teacher.kind=trust_region"], UnsupportedError, "trust_region"),
        (["actor_rollout_ref.actor.strategy=fsdp"], UnsupportedError, "strategy: fsdp2"),
        (["+composer.sdpo.level=full"], UnsupportedError, "sdpo.level: full was asked for"),
        (["+composer.sdpo.level=sampled", "+composer.sdpo.alpha=0.5"], ConfigError, "only 1, reverse KL"),
        (["actor_rollout_ref.actor.shuffle=true"], UnsupportedError, "shuffle"),
        (["distillation.enabled=true"], UnsupportedError, "distillation"),
        (["+composer.monitor.token_view=3"], UnsupportedError, "token_view"),
        (["+composer.policy.kl.coef=0.1"], UnsupportedError, "use_kl_in_reward"),
        (["actor_rollout_ref.actor.policy_loss.composer={}", "+composer.policy.clip_low=0.1"], ConfigError, "is not composer"),
        (["+composer.policy.weight=0", "actor_rollout_ref.actor.use_kl_loss=true"], ConfigError, "left out"),
        (["+composer.sdpo.teacher.kind=reference", "actor_rollout_ref.ref.log_prob_use_dynamic_bsz=false"], ConfigError,
         "log_prob_micro_batch_size_per_gpu"),
    ],
)  # fmt: skip
def test_what_verl_cannot_give_is_refused_on_the_driver(overrides, error, said):
    found = refused("+composer.sdpo.weight=0.1", *overrides)
    assert isinstance(found, error) and said in str(found)


def test_options_of_the_section_without_effect_on_verls_own_loss_mode():
    found = refused(*VERLS_OWN, "+composer.sdpo.weight=0.1", "+composer.policy.clip_low=0.3")
    assert "reads no composer.policy" in str(found)


class Batch:
    """What the overrides of the trainer touch of a batch."""

    tags = ()


@pytest.fixture
def trainer(monkeypatch):
    """The trainer without verl's own constructor and set-up (they need Ray): `trainer("composer.sdpo.weight=1")`."""
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    monkeypatch.setattr(PPOTrainerSync, "__init__", lambda self, config: setattr(self, "config", config))
    monkeypatch.setattr(PPOTrainerSync, "use_reference_policy", False, raising=False)

    def build(*overrides, recipe="composer_policy"):
        from composer_verl.trainer import ComposerTrainer

        made = ComposerTrainer(config(*overrides, recipe=recipe))
        made.timing_raw = {}
        return made

    return build


class Group:
    """A worker group that keeps what it is told."""

    def __init__(self):
        self.calls = []

    def set_loss_fn(self, function):
        self.calls.append(function)


def test_without_channels_it_is_verls_trainer(trainer, monkeypatch):
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    handed = []
    for name in ("_setup", "_update_actor", "_compute_metrics"):
        monkeypatch.setattr(PPOTrainerSync, name, lambda self, *a, _name=name: handed.append((_name, a)) or "verl's")
    made = trainer()
    made.actor_rollout_wg = group = Group()
    made._setup()
    batch, metrics = Batch(), {}
    assert made._update_actor(batch, metrics) == "verl's" and metrics == {}
    made._compute_metrics(batch, metrics, {}, 1, 0)
    assert [name for name, _ in handed] == ["_setup", "_update_actor", "_compute_metrics"]
    assert handed[1][1] == (batch, metrics) and group.calls == [] and made.actor_rollout_wg is group
    assert made.monitor.silence.summary() == {}
    assert made.trainer_mode == "sync"


def test_the_policys_weight_counts_for_verls_own_loss_modes_too(trainer, monkeypatch):
    """Nothing but the weight is ours there: without our loss function the run would train with weight 1."""
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    monkeypatch.setattr(PPOTrainerSync, "_setup", lambda self: None)
    own = [*VERLS_OWN, "composer.policy.objective=host", "algorithm.adv_estimator=grpo"]
    for weight, calls in ((1, 0), (0.25, 1)):
        made = trainer(*own, f"+composer.policy.weight={weight}")
        made.actor_rollout_wg = Group()
        made._setup()
        assert len(made.actor_rollout_wg.calls) == calls
        if calls:
            assert made.actor_rollout_wg.calls[0].args[1].policy.weight == weight
    said = refused(*own, "+composer.policy.weight=0.25", "distillation.enabled=true")
    assert "distillation.enabled has a loss function of its own" in str(said)


def test_the_reference_worker_is_built_for_the_teacher_and_not_used_for_a_kl(trainer, monkeypatch):
    from verl.trainer.ppo.utils import Role
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    def pools(self):
        self.role_worker_mapping, self.mapping = {Role.ActorRollout: "worker"}, {Role.ActorRollout: "pool"}

    monkeypatch.setattr(PPOTrainerSync, "_init_resource_pool_mgr", pools)
    for kind, role in (("reference", Role.ActorRolloutRef), ("live", Role.ActorRollout)):
        micro = "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=4"
        made = trainer(f"composer.sdpo.teacher.kind={kind}", micro, recipe="composer_sdpo")
        assert made.use_reference_policy == (kind == "reference")
        made._init_resource_pool_mgr()
        assert made.role_worker_mapping == {role: "worker"} and made.mapping == {role: "pool"}
    batch = Batch()
    assert made._compute_ref_log_prob(batch, {}) is batch


def step(**metrics):
    return {"actor/grad_norm": 1.0, "critic/advantages/max": 0.5, "critic/advantages/min": -0.5, **metrics}


def test_a_silent_channel_says_why():
    monitor = StepMonitor(parse_section({"sdpo": {"weight": 1}, "monitor": {"silent_after": 2}}))
    active = {"actor/sdpo/active_tokens": 0.0}
    monitor.close(step(**active), {"sdpo": "no turn of the rollouts had a hint"})
    monitor.close({"training/global_step": 2}, {})  # no update: says nothing about the channels
    with pytest.warns(SilentChannelWarning, match=r"'sdpo'.*no turn of the rollouts had a hint"):
        monitor.close(step(**active), {"sdpo": "no turn of the rollouts had a hint"})
    strict = StepMonitor(parse_section({"sdpo": {"weight": 1}, "monitor": {"silent_after": 1, "on_silence": "error"}}))
    strict.close(step(**{"actor/sdpo/active_tokens": 3.0}), {})
    with pytest.raises(SilentChannelError):
        strict.close(step(**active), {"sdpo": "x"})
    with pytest.raises(SilentChannelError, match=r"'policy'.*equal rewards"):
        strict.close(
            {**step(**{"actor/sdpo/active_tokens": 3.0}), "critic/advantages/max": 0, "critic/advantages/min": 0}, {}
        )


def test_silence_is_counted_across_a_resume(tmp_path):
    section = parse_section({"sdpo": {"weight": 1}, "monitor": {"silent_after": 2, "on_silence": "error"}})
    first = StepMonitor(section)
    first.close(step(), {"sdpo": "x"})
    first.save(tmp_path)
    second = StepMonitor(section)
    second.load(tmp_path)
    with pytest.raises(SilentChannelError):
        second.close(step(), {"sdpo": "x"})
    StepMonitor(section).load(tmp_path / "nowhere")
