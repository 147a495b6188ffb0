"""What the outer loop reads from a host that lets us import a module and nothing more."""

import pytest

torch = pytest.importorskip("torch", reason="the outer loop needs torch: pip install 'composer-plugins[torch]'")

from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim.lr_scheduler import ConstantLR, LambdaLR, LinearLR, SequentialLR
from torch.optim.optimizer import register_optimizer_step_pre_hook

from composer_plugins.errors import ConfigError
from composer_plugins.first_step import at_work, is_rehearsal, outer_from_environment, schedule_state


def optimizer(lr: float = 0.1) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Linear(2, 2)
    return model, torch.optim.AdamW(model.parameters(), lr=lr)


@pytest.mark.parametrize("text", ["{sync_every: 20, start_with: 2}", '{"sync_every": 20, "start_with": 2}'])
def test_the_environment_variable_is_the_section(monkeypatch, text):
    monkeypatch.setenv("COMPOSER_OUTER", text)
    config = outer_from_environment()
    assert (config.sync_every, config.start_with, config.lr) == (20, 2, 0.7)


@pytest.mark.parametrize("text", [None, "", "{sync_every: 0}"])
def test_no_outer_loop_in_the_environment(monkeypatch, text):
    monkeypatch.delenv("COMPOSER_OUTER", raising=False)
    if text is not None:
        monkeypatch.setenv("COMPOSER_OUTER", text)
    assert outer_from_environment() is None


@pytest.mark.parametrize(
    ("text", "said"),
    [("20", "mapping"), ("{sync_evry: 2}", "sync_evry"), ("{sync_every: x}", "sync_every"), ("{a: [", "no YAML")],
)
def test_a_malformed_variable_says_what_is_wrong(monkeypatch, text, said):
    monkeypatch.setenv("COMPOSER_OUTER", text)
    with pytest.raises(ConfigError, match="COMPOSER_OUTER") as error:
        outer_from_environment()
    assert said in str(error.value)


def schedules():
    yield lambda o: ConstantLR(o, factor=1.0)
    yield lambda o: LambdaLR(o, lambda step: 1 / (1 + step))
    yield lambda o: SequentialLR(
        o, [LinearLR(o, start_factor=0.1, total_iters=4), LinearLR(o, end_factor=0.1, total_iters=9)], milestones=[4]
    )


@pytest.mark.parametrize("make", list(schedules()))
def test_a_joiner_goes_on_with_the_donors_schedule(make):
    (_, donor), (_, joiner) = optimizer(), optimizer()
    theirs, mine = make(donor), make(joiner)
    for _ in range(6):
        donor.step()
        theirs.step()
    given = schedule_state(theirs).read()
    assert "<function" not in str(given)
    schedule_state(mine).write(given, 1)
    for _ in range(4):
        assert joiner.param_groups[0]["lr"] == pytest.approx(donor.param_groups[0]["lr"], rel=1e-12)
        for one, schedule in ((donor, theirs), (joiner, mine)):
            one.step()
            schedule.step()


def test_the_step_that_torchs_checkpoints_make_is_told_from_a_real_one():
    """`_init_optim_state` makes a step with rate 0 to create state; a warm-up's first step has rate 0 too."""
    model, one = optimizer()
    seen = []
    handle = register_optimizer_step_pre_hook(lambda o, *_: seen.append(is_rehearsal(o)))
    try:
        get_optimizer_state_dict(model, one)
        model(torch.ones(1, 2)).sum().backward()
        one.param_groups[0]["lr"] = 0.0
        one.step()
        one.param_groups[0]["lr"] = 0.1
        one.step()
    finally:
        handle.remove()
    assert seen == [True, False, False]


def test_the_innermost_object_at_work_is_found():
    def outermost(value):
        config = value  # noqa: F841
        return middle({"no": value})

    def middle(value):
        return [at_work(lambda v, kind=kind: isinstance(v, kind)) for kind in (int, dict, bytes)]

    assert outermost(3) == [3, {"no": 3}, None]
