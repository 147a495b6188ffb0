"""A full pass over prime-rl's own wire: rollout, stamp, train sink, packer, loader, compute_loss with our loss, backward.

Environment server and client, TrainSink, BatchPacker, transport, DataLoader and compute_loss are prime-rl's and
verifiers'; the engine is a local HTTP server with SmolLM2 (`plugins/prime_policy_server.py`).
"""

import asyncio
import sys
from pathlib import Path

import pytest

vf = pytest.importorskip("verifiers.v1", reason="verifiers is not installed (make test-prime-rl)")
torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parent / "plugins"))

from prime_fixtures import scoring_requests, server, serving, smollm2, tokenizer_dir  # noqa: F401
from prime_wire_tools import CALL, MISSING, SDPO, Wire, backward, micro_batches, orchestrator_config, scales, toy_env

pytestmark = [pytest.mark.prime_rl, pytest.mark.model]

POLICY = "tiny"
LOSS = "composer_prime_rl.loss.composer_loss"


def loss_config(route="ref_kl", **section):
    from prime_rl.configs.trainer import CustomLossConfig

    composer = {"policy": {"objective": "dapo"}, "sdpo": SDPO, **section}
    return CustomLossConfig(import_path=LOSS, kwargs={"composer": composer, "sdpo_route": route})


def roll(server, tokenizer_dir, tmp_path, tasks, script, *, group_size=1, **env):  # noqa: F811
    """Roll out, sink and send; (wire, prime-rl's batch, the micro-batches as the trainer gets them)."""
    server.script.extend(script)
    source = {"env": toy_env(tasks, **env), "group_size": group_size}
    config = orchestrator_config(
        server, tokenizer_dir, [source], batch_size=len(tasks) * group_size, output_dir=tmp_path, group_size=group_size
    )
    wire = Wire(config, server)
    batch = asyncio.run(wire.roll_out())
    assert batch is not None, [(e.errors, [t.errors for t in e.traces]) for e in wire.episodes]
    wire.send(batch.samples)
    return wire, batch, micro_batches(tmp_path)


@pytest.fixture
def failed_group(server, tokenizer_dir, tmp_path, prime_tree):  # noqa: F811
    """Two rollouts of one task, both with reward 0, both with an error turn."""
    tasks = [{"prompt": "Read a.txt", "results": [MISSING], "score": 0.0}]
    return roll(server, tokenizer_dir, tmp_path, tasks, [CALL, "Done."] * 2, group_size=2)


def test_an_all_failed_group_keeps_its_self_distillation(failed_group):
    wire, batch, batches = failed_group
    assert wire.config.train.filter_zero_advantages  # prime-rl's default
    assert len(batch.samples) == 2
    for sample in batch.samples:
        assert set(sample.advantages) == {0.0} and set(sample.rl_weights) == {0.0}  # the filter did its work
    turns = [trace.nodes[1] for episode in wire.episodes for trace in episode.traces]
    assert scales(batches) == (1, 1, sum(sum(node.mask) for node in turns))


def test_what_was_stamped_arrives_at_the_trainer_token_by_token(failed_group):
    wire, _, (batch,) = failed_group
    trace = wire.episodes[0].traces[0]
    before, turn = len(trace.nodes[0].token_ids), trace.nodes[1]
    first = turn.mask.index(True)
    size = batch["sequence_lengths"][0]
    stored = [t for node in trace.nodes for t in node.token_ids]
    assert batch["input_ids"][0, :size].tolist() == stored
    reference, weights = batch["ref_logprobs"][0, :size], batch["ref_kl_weights"][0, :size]
    span = slice(before + first, before + len(turn.token_ids))
    assert reference[span].tolist() == pytest.approx(turn.reference_logprobs)
    outside = torch.ones(size, dtype=torch.bool)
    outside[span] = False
    assert weights[span].tolist() == [0.5] * len(turn.reference_logprobs) and not weights[outside].any()
    assert not reference[outside].any()


@pytest.mark.parametrize("route", ["ref_kl"])
def test_backward_reaches_the_error_turn_and_no_other_token(failed_group, smollm2, route):  # noqa: F811
    model = smollm2[0]
    wire, _, batches = failed_group
    model.zero_grad()
    loss, metrics, (logprobs,) = backward(model, batches, loss_config(route))
    batch = batches[0]
    weights = batch["ref_kl_weights"][0]
    assert torch.equal(logprobs.grad != 0, weights != 0)
    # an independent reading of prime-rl's component: -(ref - lp) ratio + 1e-3 log^2 ratio, ratio 1, mean over its tokens
    on = weights != 0
    reference, sampled = batch["ref_logprobs"][0][on].double(), batch["inference_logprobs"][0][on].double()
    student = logprobs.detach()[on].double()
    expected = -0.5 * (reference - student) / on.sum()
    ratio = (student - sampled).exp()
    expected = expected * ratio + 0.5 * 2e-3 * (student - sampled) / on.sum()
    assert logprobs.grad[on].double().numpy() == pytest.approx(expected.numpy(), rel=1e-4, abs=1e-9)
    assert sum(float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None) > 0
    model.zero_grad()


def test_the_student_is_the_policy_that_sampled_and_the_hint_moves_the_teacher(failed_group, smollm2):  # noqa: F811
    """The stored ids scored without the hint give the sampling log-probs; with it, something else."""
    batch = failed_group[2][0]
    on = batch["ref_kl_weights"][0] != 0
    _, _, (logprobs,) = backward(smollm2[0], failed_group[2], loss_config())
    assert logprobs.detach()[on].numpy() == pytest.approx(batch["inference_logprobs"][0][on].numpy(), abs=2e-4)
    assert (logprobs.detach()[on] - batch["ref_logprobs"][0][on]).abs().max() > 0.01
    smollm2[0].zero_grad()


def test_the_channels_add_without_diluting_each_other(server, smollm2, tokenizer_dir, tmp_path, prime_tree):  # noqa: F811
    """One good and one failed rollout: policy and sdpo together equal their sum, each over its own tokens."""
    tasks = [{"prompt": "Read a.txt", "results": [MISSING]}]
    server.script.extend([CALL, "Done.", CALL, "Fine."])
    source = {"env": toy_env(tasks), "group_size": 2}
    config = orchestrator_config(server, tokenizer_dir, [source], batch_size=2, output_dir=tmp_path, group_size=2)
    wire = Wire(config, server)
    give_rewards(wire, [1.0, 0.0])
    wire.send(asyncio.run(wire.roll_out()).samples)
    batches, model = micro_batches(tmp_path), smollm2[0]
    grads = {}
    for name, keep in {"both": ("rl", "ref_kl"), "policy": ("rl",), "sdpo": ("ref_kl",)}.items():
        part = [
            {**b, **{f"{s}_weights": b[f"{s}_weights"] if s in keep else off(b, s) for s in ("rl", "ref_kl")}}
            for b in batches
        ]
        model.zero_grad()
        _, _, kept = backward(model, part, loss_config())
        grads[name] = torch.cat([k.grad for k in kept])
    assert torch.allclose(grads["both"], grads["policy"] + grads["sdpo"], rtol=1e-6, atol=1e-10)
    assert grads["policy"].any() and grads["sdpo"].any()
    rl, _, ref = scales(batches)
    assert rl == sum(sum(map(sum, (n.mask for n in t.nodes))) for e in wire.episodes for t in e.traces) and rl > ref > 0
    model.zero_grad()


def off(batch, stream):
    """A component without tokens; rl needs an explicit zero, because None means everything."""
    return torch.zeros_like(batch["advantages"]) if stream == "rl" else None


def give_rewards(wire, rewards):
    """The environment's verdicts, attempt by attempt (a task of the toy has one score)."""
    original, left = wire._episode, list(rewards)

    async def episode(*args):
        played = await original(*args)
        played.traces[0].record_reward("verdict", left.pop(0))
        return played

    wire._episode = episode


def test_the_loss_route_counts_the_reference_once(server, smollm2, tokenizer_dir, tmp_path, prime_tree):  # noqa: F811
    tasks = [{"prompt": "Read a.txt", "results": [MISSING]}]
    server.script.extend([CALL, "Done.", CALL, "Fine."])
    source = {"env": toy_env(tasks, sdpo_route="loss"), "group_size": 2}
    config = orchestrator_config(server, tokenizer_dir, [source], batch_size=2, output_dir=tmp_path, group_size=2)
    wire = Wire(config, server)
    give_rewards(wire, [1.0, 0.0])
    wire.send(asyncio.run(wire.roll_out()).samples)
    batches = micro_batches(tmp_path)
    assert all(b["ref_kl_weights"] is None for b in batches)
    smollm2[0].zero_grad()
    _, metrics, (logprobs,) = backward(smollm2[0], batches, loss_config("loss", policy={"weight": 0.0}))
    on = batches[0]["ref_logprobs"][0] != 0
    assert torch.equal(logprobs.grad != 0, on) and on.any()
    assert float(metrics["sdpo/tokens"].sum()) == float(on.sum()) and not any(k.startswith("ref_kl") for k in metrics)
    smollm2[0].zero_grad()
