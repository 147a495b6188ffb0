"""Channel 3 on prime-rl: pairs through its own wire give exactly the gradient of pairwise DPO (SmolLM2)."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

vf = pytest.importorskip("verifiers.v1", reason="verifiers is not installed (make test-prime-rl)")
torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parent / "plugins"))

from composer_prime_rl import pair_reference
from composer_prime_rl.pair_taskset import open_pairs, tokens_per_pair
from prime_fixtures import scoring_requests, server, serving, smollm2, tokenizer_dir  # noqa: F401
from prime_wire_tools import (
    RENDERER,
    Wire,
    backward,
    gradient,
    micro_batches,
    orchestrator_config,
    scales,
    toy_env,
)
from pydantic import ValidationError
from verifiers.v1.utils.loaders import taskset_config_type

from composer_plugins.errors import ConfigError
from composer_plugins.traces.schema import Message, Pair, Provenance, SourceRef, ToolCall
from composer_plugins.traces.store import Manifest, write_stage

pytestmark = [pytest.mark.prime_rl, pytest.mark.model]

POLICY = "tiny"
BETA = 0.5


def pair(number: int, chosen: str, rejected: str) -> Pair:
    asked = [Message(role="user", content=f"Question {number}: what is in the folder?")]
    calls = [ToolCall(id="c", name="bash", arguments={"command": "ls"})]
    why = Provenance(
        rule="teachers", chosen_by=["t"], rejected_by=["u"], source_ref=SourceRef(file="made.jsonl", line=number)
    )
    return Pair(
        id=f"pair-{number}", state_id=f"s{number}", messages=asked,
        chosen=Message(role="assistant", content=chosen, tool_calls=calls),
        rejected=Message(role="assistant", content=rejected), provenance=why,
    )  # fmt: skip


PAIRS = [pair(0, "Let me look.", "I do not know, and I will not look at it."), pair(1, "I will list it.", "No.")]


def write_pairs(path, pairs):
    write_stage(path, pairs, Manifest(stage="pairs", record="Pair", written=len(pairs)))


@pytest.fixture
def section(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, PAIRS)
    return {"weight": 0.25, "pairs": str(path), "beta": BETA, "pairs_per_step": 2, "max_length": 1024}


@pytest.fixture
def reference(server, section, tokenizer_dir, tmp_path):  # noqa: F811
    """A recorded first pass, with the log-probs then changed: Delta is not 0, as later in a run."""
    out = tmp_path / "reference"
    arguments = ["--replay-dpo", json.dumps(section), "--model", str(tokenizer_dir), "--base-url", server.base_url]
    arguments += ["--served-name", "policy", "--renderer", json.dumps(RENDERER), "--out", str(out)]
    assert pair_reference.main(arguments) == 0
    file = out / "composer_pair_reference.json"
    recorded = json.loads(file.read_text())
    for index, (chosen, rejected) in recorded["reference"].items():
        recorded["reference"][index] = [[x - 0.1 for x in chosen], [x + 0.05 * (int(index) + 1) for x in rejected]]
    file.write_text(json.dumps(recorded))
    return out


def source(section, tokenizer_dir, reference, **more):  # noqa: F811
    taskset = {
        "id": "composer-prime-rl", "model": str(tokenizer_dir), "renderer": RENDERER, "reference": str(reference),
        "composer": {"replay_dpo": section}, **more,
    }  # fmt: skip
    return {"env": {"taskset": taskset}, "group_size": 1, "name": "pairs"}


def pairwise_gradient(model, stream, reference_logprobs, *, beta=BETA):
    """The gradient of the mean pairwise DPO loss, by torch from the textbook formula."""
    from prime_wire_tools import _logprobs

    model.zero_grad()
    total = 0.0
    for index, item in enumerate(stream.pairs):
        sums = []
        for ids, recorded in zip((item.chosen, item.rejected), reference_logprobs[index], strict=True):
            row = torch.tensor([*item.context, *ids])
            values = _logprobs(model, row, torch.ones(len(row)))[len(item.context) :]
            sums.append((values.double() - torch.tensor(recorded, dtype=torch.float64)).sum())
        total = total - torch.nn.functional.logsigmoid(beta * (sums[0] - sums[1])) / len(stream.pairs)
    total.backward()
    return gradient(model).clone()


def relative(found, expected) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def stream_of(section, tokenizer_dir):  # noqa: F811
    from pydantic import TypeAdapter
    from renderers import RendererConfig

    from composer_plugins.config import ReplayDPOConfig

    renderer = TypeAdapter(RendererConfig).validate_python(RENDERER)
    return open_pairs(ReplayDPOConfig(**section), str(tokenizer_dir), renderer)


def recorded(reference) -> dict:
    found = json.loads((reference / "composer_pair_reference.json").read_text())["reference"]
    return {int(k): v for k, v in found.items()}


def through_the_wire(server, tokenizer_dir, tmp_path, sources, batch_size):  # noqa: F811
    config = orchestrator_config(server, tokenizer_dir, sources, batch_size=batch_size, output_dir=tmp_path)
    wire = Wire(config, server)
    batch = asyncio.run(wire.roll_out())
    assert batch is not None, [(e.errors, [t.errors for t in e.traces]) for e in wire.episodes]
    wire.send(batch.samples)
    return wire, micro_batches(tmp_path)


def host_loss():
    from prime_rl.configs.trainer import DefaultLossConfig

    return DefaultLossConfig()


def test_route_ce_is_pairwise_dpo(server, smollm2, section, reference, tokenizer_dir, tmp_path, prime_tree):  # noqa: F811
    model = smollm2[0]
    wire, batches = through_the_wire(server, tokenizer_dir, tmp_path, [source(section, tokenizer_dir, reference)], 4)
    stream = stream_of(section, tokenizer_dir)
    expected = 0.25 * pairwise_gradient(model, stream, recorded(reference))
    model.zero_grad()
    backward(model, batches, host_loss())
    error = relative(gradient(model), expected)
    print(f"replay_dpo route ce, relative gradient error {error:.2e}")
    assert error < 1e-5
    rl, ce, ref = scales(batches)
    assert (rl, ref) == (1, 1) and ce == sum(len(p.chosen) + len(p.rejected) for p in stream.pairs)
    for trace in [t for e in wire.episodes for t in e.traces]:
        assert trace.metrics["replay_dpo/multiplier"] == pytest.approx(0.25 * tokens_per_pair(stream))
    model.zero_grad()


def test_route_rl_is_pairwise_dpo_with_a_summing_loss(
    server, smollm2, section, reference, tokenizer_dir, tmp_path, prime_tree  # noqa: F811
):  # fmt: skip
    """Rewards +-w, grpo, group size 1; the loss is prime-rl's default, whose KL and clip vanish at ratio 1."""
    model = smollm2[0]
    section = {**section, "weight": 1.0}
    sources = [source(section, tokenizer_dir, reference, route="rl")]
    wire, batches = through_the_wire(server, tokenizer_dir, tmp_path, sources, 4)
    stream = stream_of(section, tokenizer_dir)
    expected = pairwise_gradient(model, stream, recorded(reference)) * len(stream.pairs)  # the sum over pairs
    model.zero_grad()
    backward(model, batches, host_loss())
    rl, ce, _ = scales(batches)
    assert ce == 1
    error = relative(gradient(model) * rl, expected)
    print(f"replay_dpo route rl, relative gradient error {error:.2e}")
    # the ratio exp(trainer - inference) is 1 up to the engine's rounding, and multiplies the gradient; the random model
    # with its large weights rounds worse than SmolLM2
    assert error < (1e-4 if model.config.hidden_size == 32 else 1e-5)
    model.zero_grad()


def test_on_route_rl_the_effective_weight_is_the_reported_multiplier_times_pairs_over_all_rl_tokens(
    server, smollm2, section, reference, tokenizer_dir, tmp_path, prime_tree  # noqa: F811
):  # fmt: skip
    """One denominator: every policy token of the step dilutes the pairs, by exactly the formula of the docs."""
    from prime_rl.configs.trainer import CustomLossConfig
    from prime_wire_tools import CALL, MISSING

    server.script.extend([CALL, "Done."])
    policy = {
        "env": {**toy_env([{"prompt": "Read a.txt", "results": [MISSING]}], sdpo={"weight": 0.0})},
        "group_size": 1,
    }
    sources = [{**policy, "name": "toy"}, source(section, tokenizer_dir, reference, route="rl")]
    config = orchestrator_config(server, tokenizer_dir, sources, batch_size=5, output_dir=tmp_path)
    config.train.filter_zero_advantages = False  # the toy's tokens have advantage 0, and count in the denominator
    wire = Wire(config, server)
    wire.send(asyncio.run(wire.roll_out()).samples)
    batches, stream = micro_batches(tmp_path), stream_of(section, tokenizer_dir)
    rl, ce, _ = scales(batches)
    traces = [t for e in wire.episodes for t in e.traces]
    pairs = sum(t.metrics.get("replay_dpo/pairs", 0) for t in traces)
    (multiplier,) = {t.metrics["replay_dpo/multiplier"] for t in traces if "replay_dpo/multiplier" in t.metrics}
    own = sum(len(p.chosen) + len(p.rejected) for p in stream.pairs)
    toy = sum(sum(n.mask) for t in traces if "replay_dpo/pairs" not in t.metrics for n in t.nodes)
    assert (pairs, multiplier, ce, rl) == (2, 0.25, 1, own + toy) and toy > 0
    expected = multiplier * pairs / rl * pairwise_gradient(smollm2[0], stream, recorded(reference))
    smollm2[0].zero_grad()
    kwargs = {"composer": {"policy": {"objective": "dr_grpo"}}}  # as in the recipes: a sum, no clip at ratio 1
    backward(smollm2[0], batches, CustomLossConfig(import_path="composer_prime_rl.loss.composer_loss", kwargs=kwargs))
    assert relative(gradient(smollm2[0]), expected) < 1e-4
    smollm2[0].zero_grad()


def test_pairs_and_policy_do_not_dilute_each_other(
    server, smollm2, section, reference, tokenizer_dir, tmp_path, prime_tree  # noqa: F811
):  # fmt: skip
    """Pairs beside hinted rollouts in one step: each component has its own count, and the pairs' gradient is unchanged."""
    from prime_wire_tools import CALL, MISSING

    server.script.extend([CALL, "Done."])
    hinted = {"env": toy_env([{"prompt": "Read a.txt", "results": [MISSING]}]), "group_size": 1, "name": "toy"}
    sources = [hinted, source(section, tokenizer_dir, reference)]
    wire, batches = through_the_wire(server, tokenizer_dir, tmp_path, sources, 5)
    stream = stream_of(section, tokenizer_dir)
    rl, ce, ref = scales(batches)
    stamped = next(t for e in wire.episodes for t in e.traces if t.metrics.get("sdpo/tokens")).metrics["sdpo/tokens"]
    assert (rl, ce, ref) == (1, sum(len(p.chosen) + len(p.rejected) for p in stream.pairs), stamped)
    alone = [{**b, "ref_kl_weights": None} for b in batches]
    smollm2[0].zero_grad()
    backward(smollm2[0], alone, host_loss())
    assert relative(gradient(smollm2[0]), 0.25 * pairwise_gradient(smollm2[0], stream, recorded(reference))) < 1e-5
    smollm2[0].zero_grad()


def test_a_reference_server_gives_the_same_as_a_recorded_pass(
    server, section, tokenizer_dir, tmp_path, prime_tree  # noqa: F811
):  # fmt: skip
    where = {"reference_server": {"base_url": server.base_url, "model": "initial", "api_key_var": "UNSET_KEY"}}
    spec = source(section, tokenizer_dir, "unused", **where)
    del spec["env"]["taskset"]["reference"]
    wire, batches = through_the_wire(server, tokenizer_dir, tmp_path, [spec], 4)
    assert {r["model"] for r in scoring_requests(server)} == {"policy", "initial"}
    for trace in [t for e in wire.episodes for t in e.traces]:
        assert trace.metrics["replay_dpo/margin"] == pytest.approx(0.0, abs=1e-6)  # the same weights behind both
    weights = torch.cat([b["ce_weights"][b["ce_weights"] != 0] for b in batches]).abs()
    stream = stream_of(section, tokenizer_dir)
    assert weights.numpy() == pytest.approx(0.25 * tokens_per_pair(stream) * BETA / 2, rel=1e-5)


def test_a_pair_that_cannot_be_scored_is_a_failed_episode_and_never_a_zero(
    server, section, reference, tokenizer_dir, tmp_path, prime_tree  # noqa: F811
):  # fmt: skip
    server.faults.extend(["400"] * 4)
    spec = source(section, tokenizer_dir, reference)
    config = orchestrator_config(server, tokenizer_dir, [spec], batch_size=4, output_dir=tmp_path)
    wire = Wire(config, server)
    assert asyncio.run(wire.roll_out()) is None
    assert all(not e.ok and "was not scored (refused)" in e.errors[0].message for e in wire.episodes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"route": "rl", "composer": {"length_normalized": True}}, "use route: ce"),
        ({"route": "rl", "composer": {"nll_weight": 0.1}}, "use route: ce"),
        ({"composer": {"weight": 0.0}}, "leave this source out"),
        ({"reference": None}, "give one of reference"),
        ({"model": ""}, "names no tokenizer"),
    ],
)
def test_what_would_be_wrong_is_refused(section, tokenizer_dir, change, message):  # noqa: F811
    taskset = source(section, tokenizer_dir, "somewhere")["env"]["taskset"]
    change = dict(change)
    taskset["composer"] = {"replay_dpo": {**section, **change.pop("composer", {})}}
    with pytest.raises(ValidationError, match=message):
        taskset_config_type("composer-prime-rl").model_validate({**taskset, **change})


def test_another_pairs_file_than_the_recorded_one_is_refused(server, section, reference, tokenizer_dir):  # noqa: F811
    write_pairs(Path(section["pairs"]), PAIRS[:1])
    taskset = source(section, tokenizer_dir, reference)["env"]["taskset"]
    loaded = vf.load_taskset(taskset_config_type("composer-prime-rl").model_validate(taskset))
    with pytest.raises(ConfigError, match="SHA-256 differs"):
        list(loaded)


def played(server, taskset, *, temperature=1.0, change=None):  # noqa: F811
    """The episode of the first pair, its task changed on the way."""
    from verifiers.v1.utils.loaders import env_config_type, load_environment

    loaded = load_environment(env_config_type("composer-prime-rl").model_validate({"taskset": taskset}))
    task = next(iter(loaded.taskset))
    task = type(task)(task.data.model_copy(update=change or {}), loaded.config.taskset.task)
    client = vf.TrainClientConfig(base_url=server.base_url, api_key_var="UNSET_KEY")
    ctx = vf.ModelContext(client=client, model="policy", sampling=vf.SamplingConfig(temperature=temperature))

    async def run():
        async with loaded.serving():
            return await loaded.run_episode(task, ctx)

    return asyncio.run(run())


def test_a_pairs_own_weight_multiplies_both_actions(server, section, reference, tokenizer_dir):  # noqa: F811
    taskset = source(section, tokenizer_dir, reference)["env"]["taskset"]
    once, thrice = (played(server, taskset, change={"pair_weight": w}) for w in (1.0, 3.0))
    for a, b in zip(once.traces, thrice.traces, strict=True):
        assert b.nodes[-1].loss_weights["ce"] == pytest.approx([3 * w for w in a.nodes[-1].loss_weights["ce"]])
    chosen, rejected = (trace.nodes[-1].loss_weights["ce"][0] for trace in once.traces)
    assert chosen == -rejected > 0


def test_another_temperature_is_a_failed_episode(server, section, reference, tokenizer_dir):  # noqa: F811
    server.requests.clear()
    episode = played(server, source(section, tokenizer_dir, reference)["env"]["taskset"], temperature=0.7)
    assert not episode.ok and not episode.traces and scoring_requests(server) == []
    assert "sampling.temperature = 1" in episode.errors[0].message


def test_a_recorded_pass_that_lacks_a_pair_is_refused(section, reference, tokenizer_dir):  # noqa: F811
    file = reference / "composer_pair_reference.json"
    recorded = json.loads(file.read_text())
    recorded["reference"].popitem()
    file.write_text(json.dumps(recorded))
    taskset = source(section, tokenizer_dir, reference)["env"]["taskset"]
    with pytest.raises(ConfigError, match="lacks 1 of 2 pairs"):
        list(vf.load_taskset(taskset_config_type("composer-prime-rl").model_validate(taskset)))


def test_the_first_pass_reports_a_server_that_cannot_score(section, tokenizer_dir, tmp_path, capsys):  # noqa: F811
    arguments = ["--replay-dpo", section["pairs"], "--model", str(tokenizer_dir), "--renderer", json.dumps(RENDERER)]
    arguments += ["--base-url", "http://127.0.0.1:9", "--timeout", "1", "--out", str(tmp_path / "out")]
    assert pair_reference.main(arguments) == 4
    assert "Nothing was recorded" in capsys.readouterr().err and not (tmp_path / "out").exists()
