"""Keyword arguments of the loss: what TOML and the command line hand over, what is refused, and silent channels."""

import json
import re
import types
import warnings

import pytest

torch = pytest.importorskip("torch")

from composer_prime_rl.activity import stop
from composer_prime_rl.loss import composer_loss
from composer_prime_rl.section import loss_options
from composer_prime_rl.versions import LossOutputs

from composer_plugins.channels.silence import SilentChannelWarning
from composer_plugins.errors import ConfigError, SilentChannelError, UnsupportedError

LIVE = {"weight": 1.0, "teacher": {"kind": "live"}}


def inputs(advantage=1.0, reference=None, seq=4, leaf=None):
    logprobs = torch.full((seq,), -1.0, requires_grad=True) if leaf is None else leaf
    return types.SimpleNamespace(
        trainer_logprobs=logprobs,
        inference_logprobs=torch.full((seq,), -1.2),
        ref_logprobs=None if reference is None else torch.full((seq,), reference),
        advantages=torch.full((seq,), advantage),
        loss_mask=torch.tensor([False] + [True] * (seq - 1)),
        loss_weights=None,
    )


def test_no_arguments_are_the_defaults_of_every_host():
    options = loss_options({})
    assert options.composer.policy.objective == "dr_grpo"
    assert (options.sdpo_route, options.aggregation) == ("ref_kl", "objective")


def test_strings_of_the_command_line_become_what_they_say():
    kwargs = {
        "composer": {
            "policy": {"objective": "gspo", "weight": "0.5", "clip_low": "None", "clip_high": "1e-3"},
            "sdpo": {
                "weight": "1",
                "level": "sampled",
                "is_clip": "None",
                "teacher": {"kind": "live"},
                "tail": "false",
            },
            "monitor": {"silent_after": "7"},
        },
        "tokens_per_sample": "512",
        "sdpo_route": "loss",
    }
    options = loss_options(kwargs)
    assert options.composer.policy.weight == 0.5 and options.composer.policy.clip_low is None
    assert options.composer.policy.clip_high == 1e-3 and options.tokens_per_sample == 512.0
    assert options.composer.sdpo.is_clip is None and options.composer.sdpo.tail is False
    assert options.composer.monitor.silent_after == 7
    assert loss_options({**kwargs, "composer": json.dumps(kwargs["composer"])}) == options
    assert loss_options(dict(kwargs)) is options  # parsed once


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"composer": {"policy": {"objectiv": "grpo"}}}, "Unknown key `trainer.loss.kwargs.composer.policy.objectiv`"),
        ({"sdpo_rout": "loss"}, "Unknown key `trainer.loss.kwargs.sdpo_rout`"),
        ({"composer": {"policy": {"objective": "nope"}}}, "Unknown objective 'nope'"),
        ({"composer": {"policy": {"clip_low": "wide"}}}, "found 'wide'"),
        ({"composer": {"policy": {"objective": "grpo"}}}, "tokens_per_sample"),
        ({"composer": {"policy": {"objective": "gspo"}}}, "aggregation: host"),
        ({"tokens_per_sample": 5}, "length_constant and tokens_per_sample"),
        ({"composer": {"policy": {"length_constant": 5}}}, "length_constant and tokens_per_sample"),
        ({"composer": {"policy": {"objective": "dapo"}}, "tokens_per_sample": 5}, "no effect on a mean over tokens"),
        (
            {"composer": {"policy": {"objective": "dppo"}}, "tokens_per_sample": 5},
            "no effect on a mean over tokens (dppo)",
        ),
        (
            {"composer": {"policy": {"objective": "host"}}, "tokens_per_sample": 5, "aggregation": "host"},
            "no effect on a mean over tokens (host)",
        ),
        ({"composer": {"policy": {"objective": "dapo", "length_constant": 5}}}, "length_constant has no effect"),
        ({"composer": {"policy": {"objective": "ipo", "length_constant": 5}}}, "length_constant has no effect"),
        ({"composer": {"policy": {"kl": {"coef": 0.1}}}}, "kl_tau"),
        ({"composer": {"policy": {"advantage": {"scale": "group"}}}}, "orchestrator.algo"),
        ({"composer": {"policy": {"objective": "host", "clip_low": 0.1}}}, "clip_low has no effect"),
        ({"composer": {"policy": {"objective": "dppo", "dual_clip": 3}}}, "dual_clip has no effect"),
        ({"composer": {"policy": {"objective": "ipo", "clip_low": 0.1, "clip_high": 0.2}}}, "one threshold"),
        ({"kl_tau": 0.1}, "kl_tau has no effect"),
        ({"host": {"type": "ipo"}}, "objective: host"),
        ({"composer": {"sdpo": {"weight": 1}}}, "teacher.kind: ema needs weights"),
        ({"composer": {"sdpo": {**LIVE, "alpha": 0.5}}}, "only 1, reverse KL"),
        ({"composer": {"sdpo": {**LIVE, "entry_clip": 0.05}}}, "entry_clip"),
        ({"composer": {"sdpo": {**LIVE, "temperature": 1.1}}}, "temperature"),
        ({"composer": {"sdpo": {**LIVE, "level": "topk"}}}, "best that this host offers is sampled"),
        ({"composer": {"sdpo": {**LIVE, "denominator_floor": 10}}}, "denominator_floor"),
        ({"composer": {"channels": {"drift": {"weight": 0.1}}}}, "plugins' channels do not run on prime-rl"),
        ({"composer": {"sdpo": {**LIVE, "is_clip": 2.0}}}, "uncapped ratio"),
        ({"composer": {"outer": {"sync_every": 10}}}, "COMPOSER_OUTER"),
        ({"composer": {"monitor": {"grad_norms_every": 5}}}, "monitor.grad_norms_every is not available"),
        ({"composer": {"monitor": {"token_view": 4}}}, "monitor.token_view is not available"),
        ({"sdpo_route": "both"}, "sdpo_route"),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_fix(kwargs, says):
    with pytest.raises(ConfigError, match="(?s)" + re.escape(says)):
        composer_loss(inputs(), **kwargs)


def test_refusals_are_of_the_type_for_unsupported_options():
    with pytest.raises(UnsupportedError):
        loss_options({"composer": {"sdpo": {"weight": 1}}})


def test_what_is_said_twice_is_said_once():
    with pytest.raises(UnsupportedError) as error:
        loss_options({"composer": {"policy": {"objective": "ipo", "length_constant": 5}}})
    assert str(error.value).count("length_constant") == 1


def test_options_of_a_channel_that_is_off_are_nobodys_business():
    loss_options({"composer": {"sdpo": {"weight": 0, "entry_clip": 0.05}, "policy": {"weight": 1}}})
    loss_options({"composer": {"policy": {"weight": 0, "objective": "grpo"}, "sdpo": LIVE}})


def test_objective_host_without_prime_rl_says_so():
    with pytest.raises(ConfigError, match="default_loss_fn"):
        composer_loss(inputs(), composer={"policy": {"objective": "host"}})


def test_outputs_are_ours_where_the_inputs_are_not_prime_rls():
    assert type(composer_loss(inputs())) is LossOutputs


def test_tensors_that_do_not_fit_are_named():
    wrong = inputs()
    wrong.inference_logprobs = wrong.inference_logprobs[:2]
    with pytest.raises(ValueError, match=r"inference|old_logprobs"):
        composer_loss(wrong)


def test_half_precision_is_computed_in_float32():
    sample = inputs()
    sample.trainer_logprobs = torch.full((4,), -1.0, dtype=torch.bfloat16, requires_grad=True)
    outputs = composer_loss(sample, composer={"policy": {"objective": "dapo"}, "sdpo": LIVE}, sdpo_route="loss")
    outputs.loss.backward()
    assert outputs.loss.dtype == torch.float32 and sample.trainer_logprobs.grad.dtype == torch.bfloat16


def train(steps, per_step, *, advantage=0.0, reference=None, optimizers=1, **kwargs):
    """Optimizer steps around the loss as a trainer makes them."""
    leaf = torch.full((4,), -1.0, requires_grad=True)
    others = [torch.zeros(1, requires_grad=True) for _ in range(optimizers - 1)]
    made = [torch.optim.SGD([p], lr=0.0) for p in [leaf, *others]]
    for _ in range(steps):
        for _ in range(per_step):
            composer_loss(inputs(advantage, reference, leaf=leaf), **kwargs).loss.backward()
        for optimizer in made:
            optimizer.step()


@pytest.mark.parametrize("optimizers", [1, 2])
def test_a_silent_channel_speaks_up_after_the_steps_it_was_told(optimizers):
    kwargs = {"composer": {"policy": {"objective": "dapo"}, "monitor": {"silent_after": 3}}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(2, 4, optimizers=optimizers, **kwargs)  # two steps are not three, however many samples
    stop()
    with pytest.warns(SilentChannelWarning, match="no token with an advantage other than 0"):
        train(3, 1, optimizers=optimizers, **kwargs)
    stop()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(6, 1, advantage=1.0, optimizers=optimizers, **kwargs)


def test_sdpo_without_reference_logprobs_speaks_up_and_can_stop_the_run():
    composer = {"policy": {"weight": 0}, "sdpo": LIVE, "monitor": {"silent_after": 2, "on_silence": "error"}}
    train(4, 1, reference=-2.0, composer=composer, sdpo_route="loss")
    stop()
    with pytest.raises(SilentChannelError, match=r"'sdpo'.*2 optimizer steps.*no token with a reference"):
        train(4, 1, composer=composer, sdpo_route="loss")
    stop()
    train(4, 1, composer=composer, sdpo_route="ref_kl")  # not ours to watch


def test_no_hook_stays_behind():
    from torch.optim import optimizer as module

    composer_loss(inputs())
    before = len(module._global_optimizer_pre_hooks)
    stop()
    assert len(module._global_optimizer_pre_hooks) == before - 1
