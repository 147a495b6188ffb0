"""What cannot be synced is refused when it is attached, with the reason."""

from __future__ import annotations

import pytest
import torch
from composer_torchft.checks import _REFUSED, inner_optimizer
from composer_torchft.fragments import parameters_of, split_by_depth
from composer_torchft.loop import attach
from harness_torchft import in_threads, outer

from composer_plugins.config import OuterConfig
from composer_plugins.errors import ConfigError, OuterLoopError


def named(*shapes):
    return [(f"layers.{i}.weight", torch.nn.Parameter(torch.ones(shape))) for i, shape in enumerate(shapes)]


def sgd(parameters):
    return torch.optim.SGD([p for _, p in parameters], lr=0.1)


def test_the_wrapper_of_accelerate_is_unwrapped():
    accelerate = pytest.importorskip("accelerate")
    parameters = named((2,))
    plain = sgd(parameters)
    wrapped = accelerate.Accelerator(cpu=True).prepare_optimizer(plain)
    assert type(wrapped).__name__ == "AcceleratedOptimizer" and inner_optimizer(wrapped) is plain


class Unknown:
    def step(self): ...


@pytest.mark.parametrize("name", sorted(_REFUSED))
def test_every_kind_that_offloads_partitions_or_steps_in_parts(name):
    """By the name of the class, also of a class built on it: the packages need not be installed."""
    kind = type(name, (torch.optim.SGD,), {})
    for one in (kind, type("Own", (kind,), {})):
        with pytest.raises(OuterLoopError, match=f"cannot wrap {one.__name__}: ") as error:
            inner_optimizer(one([p for _, p in named((2,))], lr=0.1))
        assert _REFUSED[name] in str(error.value)


class Unhooked(torch.optim.SGD):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        type(self).step.hooked = False

    def step(self, closure=None): ...


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: Unknown(), "does not know"),
        (lambda p: Unhooked(p, lr=0.1), "does not run torch's step hooks"),
    ],
)
def test_optimizers_that_would_miscount(make, reason):
    with pytest.raises(OuterLoopError, match=reason):
        inner_optimizer(make([p for _, p in named((2,))]))


def test_a_parameter_without_a_name():
    parameters = named((2,), (3,))
    with pytest.raises(OuterLoopError, match="never be synced"):
        parameters_of(sgd(parameters), parameters[:1])


def test_a_parameter_without_a_dimension():
    parameters = named((2,), ())
    with pytest.raises(OuterLoopError, match="no dimension"):
        parameters_of(sgd(parameters), parameters)


def test_a_parameter_that_is_held_twice():
    parameters = named((2,))
    optimizer = sgd(parameters)
    optimizer.param_groups.append({**optimizer.param_groups[0]})
    with pytest.raises(OuterLoopError, match="twice"):
        parameters_of(optimizer, parameters)


def test_a_parameter_of_complex_numbers():
    parameters = [("weight", torch.nn.Parameter(torch.ones(2, dtype=torch.complex64)))]
    with pytest.raises(OuterLoopError, match="only floating point"):
        parameters_of(sgd(parameters), parameters)


def test_an_optimizer_that_trains_nothing_here():
    frozen = [("weight", torch.nn.Parameter(torch.ones(2), requires_grad=False))]
    with pytest.raises(OuterLoopError, match="nothing to sync"):
        parameters_of(sgd(frozen), frozen)


def test_tied_parameters_are_synced_once():
    parameters = named((2,), (3,))
    tied = [*parameters, ("head.weight", parameters[0][1])]
    assert [name for name, _ in parameters_of(sgd(parameters), tied)] == ["layers.0.weight", "layers.1.weight"]


def test_parameters_that_the_optimizer_does_not_train_are_left_alone():
    parameters = named((2,), (3,))
    assert len(parameters_of(sgd(parameters[1:]), parameters)) == 1


@pytest.mark.parametrize("fragments", [1, 2, 3, 5])
def test_fragments_cover_everything_once_in_order_and_in_like_sizes(fragments):
    parameters = [("embed.weight", torch.nn.Parameter(torch.ones(40)))]
    for layer in range(8):
        parameters += [
            (f"layers.{layer}.{n}.weight", torch.nn.Parameter(torch.ones(s))) for n, s in (("a", 10), ("b", 20))
        ]
    parts = split_by_depth(parameters, fragments)
    assert [n for part in parts for n, _ in part.named_parameters()] == [n for n, _ in parameters]
    layers = [{n.split(".")[1] for n, _ in p.named_parameters()} for p in parts]
    assert all(not a & b for i, a in enumerate(layers) for b in layers[i + 1 :])  # no layer is cut in two
    sizes = [part.numel() for part in parts]
    assert len(sizes) == fragments and max(sizes) <= 3 * min(sizes)


def test_more_fragments_than_layers():
    with pytest.raises(OuterLoopError, match=r"Lower outer\.fragments"):
        split_by_depth(named((2,), (2,)), 3)


@pytest.mark.parametrize(
    "options",
    [
        {"sync_every": 5, "fragments": 2},
        {"sync_every": 4, "fragments": 2, "sync_delay": 2},
        {"sync_every": 4, "momentum": 0.0},
        {"sync_every": 4, "outer_lr": 1.0},
    ],
)
def test_a_schedule_that_does_not_fit(options):
    with pytest.raises(ValueError):
        OuterConfig(**options)


def test_no_lighthouse(monkeypatch):
    monkeypatch.delenv("TORCHFT_LIGHTHOUSE", raising=False)
    parameters = named((2,))
    with pytest.raises(OuterLoopError, match="composer-rl lighthouse"):
        attach(sgd(parameters), parameters, OuterConfig(sync_every=2))


def test_a_lighthouse_that_does_not_answer():
    parameters = named((2,))
    config = outer("http://127.0.0.1:9", 0, timeouts={"connect": 1, "quorum_retries": 0})
    with pytest.raises(OuterLoopError, match="cannot be reached"):
        attach(sgd(parameters), parameters, config)


def islands_that_differ(address, make):
    def body(i):
        parameters, config = make(i, address)
        return attach(sgd(parameters), parameters, config)

    return in_threads(2, body)


def test_unequal_initial_weights(lighthouse):
    def make(i, address):
        parameters = named((2,), (3,))
        with torch.no_grad():
            parameters[1][1].add_(i * 1e-6)
        return parameters, outer(address, i)

    results = islands_that_differ(lighthouse().address, make)
    assert [type(r) for r in results] == [OuterLoopError] * 2
    assert "the initial parameters" in str(results[0])


def test_fewer_islands_than_begin_a_run(lighthouse):
    def make(i, address):
        return named((2,)), outer(address, i, start_with=3, timeouts={"quorum": 2})

    results = islands_that_differ(lighthouse().address, make)
    assert all(isinstance(r, OuterLoopError) for r in results)
    assert any("begins with 3" in str(r) for r in results)  # the other may find it gone already


def test_unequal_configurations(lighthouse):
    results = islands_that_differ(lighthouse().address, lambda i, a: (named((2,)), outer(a, i, lr=0.7 + i)))
    assert all(isinstance(r, OuterLoopError) and "`outer` section" in str(r) for r in results)


def test_unequal_order_of_parameters(lighthouse):
    def make(i, address):
        parameters = named((2,), (2,))
        return (
            parameters if i else [(n, p) for (n, _), (_, p) in zip(parameters, parameters[::-1], strict=True)][::-1]
        ), outer(address, i)

    results = islands_that_differ(lighthouse().address, make)
    assert all(isinstance(r, OuterLoopError) and "order" in str(r) for r in results)


def test_the_error_is_also_the_builtin():
    assert issubclass(OuterLoopError, RuntimeError) and not issubclass(OuterLoopError, ConfigError)
