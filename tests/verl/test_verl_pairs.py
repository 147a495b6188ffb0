"""Pairs inside verl's real actor update: TrainingWorker, FSDP2 engine, its micro-batching; a CPU, no Ray.

The rows, their numbers and the loss are the adapter's, everything that cuts, runs and reduces them is verl's. One
process per rank works through all scenarios (`pair_worker.py`). The oracle is float64: `oracle.dpo` for the loss and
its slope, a float64 copy of the model without batching for the slope of the log-probs.
"""

import importlib.util
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

if importlib.util.find_spec("verl") is None:
    pytest.skip(
        "verl is not installed: it needs an environment of its own (docs/how-to/verl.md)", allow_module_level=True
    )

import torch

pytestmark = pytest.mark.timeout(600)
HERE = Path(__file__).parent
WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "say", "a", "color", "number", "please", "the"]
DPO = {"weight": 0.7, "beta": 0.3, "pairs_per_step": 3}
BASE = {"rollouts": 8, "mini_batches": 2, "micro": 4, "terms": "pairs"}
POLICY = {**BASE, "terms": "policy", "entropy_coeff": 0.01, "kl": True}
SCENARIOS = {
    "pairs": BASE,
    "micro 1": {**BASE, "micro": 1},
    "micro 6": {**BASE, "micro": 6},
    "dynamic": {**BASE, "tokens": 60},
    "packed": {**BASE, "tokens": 60, "remove_padding": True},
    "epochs": {**BASE, "epochs": 2, "lr": 1.0},
    "temperature": {**BASE, "temperature": 0.7},
    "packed temperature": {**BASE, "temperature": 0.7, "remove_padding": True},
    "advantage": {**BASE, "epochs": 2, "lr": 1.0, "replay_dpo": {"form": "advantage"}},
    "options": {**BASE, "replay_dpo": {"length_normalized": True, "label_smoothing": 0.1, "nll_weight": 0.2}},
    "no pairs": {**POLICY, "pairs": False, "micro": 2},
    "policy": POLICY,
    "both": {**POLICY, "terms": "both"},
    "no pairs sequences": {
        **POLICY,
        "pairs": False,
        "micro": 2,
        "aggregation": "seq-mean-token-sum",
        "temperature": 0.7,
    },
    "policy sequences": {**POLICY, "aggregation": "seq-mean-token-sum", "temperature": 0.7, "tokens": 60},
}
SCENARIOS["whole"] = {**SCENARIOS["both"], "mini_batches": 1, "tokens": 60}  # one mini-batch: the same on all ranks
SCENARIOS["score"] = {"score": True, "micro": 4}
SCENARIOS["score dynamic"] = {"score": True, "tokens": 24}
WRONG = {
    "sides swapped": {**BASE, "mini_batches": 1, "order": [*range(9), 8 + 2, 9, *range(11, 16)]},
    "shuffled": {**BASE, "shuffle": True},
    "no groups": {**BASE, "tokens": 60, "group": 1},
}
TWO_RANKS = [
    "pairs", "dynamic", "epochs", "temperature", "no pairs", "policy", "both", "no pairs sequences", "policy sequences",
    "whole", "score",
]  # fmt: skip
PAIRS = ["pairs", "micro 1", "micro 6", "dynamic", "packed", "epochs", "temperature", "packed temperature", "options"]


def write_pairs(path, count=9, longest=6, seed=0):
    from composer_plugins.traces.schema import Message, Pair, Provenance, SourceRef
    from composer_plugins.traces.store import Manifest, write_stage

    chance = random.Random(seed)

    def words(most):
        return " ".join(chance.choice(WORDS) for _ in range(chance.randint(1, most)))

    records = [
        Pair(
            id=f"p{i}", state_id=f"s{i}", messages=[Message(role="user", content=words(8))],
            chosen=Message(role="assistant", content=words(longest)),
            rejected=Message(role="assistant", content=words(longest)), weight=chance.choice([1.0, 0.5]),
            provenance=Provenance(rule="x", chosen_by=[], rejected_by=[], source_ref=SourceRef(file="f", line=1)),
        )
        for i in range(count)
    ]  # fmt: skip
    write_stage(path, records, Manifest(stage="pairs", record="Pair", written=0))
    return path


def on_ranks(folder, scenarios, ranks):
    """Run the scenarios with one process per rank; return what rank 0 wrote."""
    path, out = folder / f"scenarios{ranks}.json", folder / f"out{ranks}.pt"
    path.write_text(json.dumps(scenarios))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0",
        "DIST_INIT_METHOD": f"tcp://127.0.0.1:{port}", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    logs = [(folder / f"log{ranks}.{rank}").open("w+") for rank in range(ranks)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "pair_worker.py"), str(path), str(out)],
            env={**environment, "RANK": str(rank)}, stdout=logs[rank], stderr=subprocess.STDOUT,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        codes = [process.wait(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for log in logs:
        log.seek(0)
    assert codes == [0] * ranks, "\n".join(log.read()[-3000:] for log in logs)
    return torch.load(out, weights_only=False)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    sys.path.insert(0, str(HERE / "cpu_host" / "composer_cpu_host"))
    import tiny

    folder = tmp_path_factory.mktemp("pairs")
    model = tiny.write_model(folder / "model")
    pairs = write_pairs(folder / "pairs.jsonl")
    return folder, {"model": str(model), "ranks": 1}, {**DPO, "pairs": str(pairs)}


@pytest.fixture(scope="module")
def results(setting):
    """{ranks: {scenario: what rank 0 saw}}."""
    folder, model, dpo = setting

    def complete(scenario):
        return {**model, **scenario, "replay_dpo": {**dpo, **scenario.get("replay_dpo", {})}}

    chosen = {name: complete(scenario) for name, scenario in {**SCENARIOS, **WRONG}.items()}
    return {1: on_ranks(folder, chosen, 1), 2: on_ranks(folder, {n: chosen[n] for n in TWO_RANKS}, 2)}


class Exact:
    """The same update in float64, pair by pair, without padding; the loss and its slope are NumPy's (`oracle`)."""

    def __init__(self, folder, dpo, oracle):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from composer_plugins.channels.pair_stream import PairStream
        from composer_plugins.config import ReplayDPOConfig

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        self.dpo, self.oracle = dpo, oracle
        self.stream = PairStream(ReplayDPOConfig(**dpo), AutoTokenizer.from_pretrained(folder), seed=3)

    def logprobs(self, context, action):
        logits = self.model(torch.tensor([context + action])).logits[0, len(context) - 1 : -1]
        return torch.log_softmax(logits, -1)[range(len(action)), action]

    @torch.no_grad()
    def reference(self):
        sides = [(p.context, (p.chosen, p.rejected)) for p in self.stream.pairs]
        return [[self.logprobs(context, action).tolist() for action in actions] for context, actions in sides]

    def step(self, parameters, pairs, reference, options):
        """Parameter gradient and metrics of one inner step over `pairs`, with these parameters."""
        from composer_plugins.config import ReplayDPOConfig

        config = ReplayDPOConfig(**{**self.dpo, **options})
        self.model.load_state_dict({name: value.double() for name, value in parameters.items()}, strict=False)
        self.model.zero_grad()
        value, margins, shifts = 0.0, [], []
        for index in pairs:
            pair = self.stream.pairs[index]
            sides = [self.logprobs(pair.context, action) for action in (pair.chosen, pair.rejected)]
            found = [side.detach().numpy() for side in sides]
            base = [np.array(side) for side in reference[index]]
            loss, margin, slopes = self._pair(config, found, base)
            value += pair.weight * loss / config.pairs_per_step
            margins.append(margin)
            shifts.append([(f - b).sum() for f, b in zip(found, base, strict=True)])
            scale = config.weight * pair.weight / config.pairs_per_step
            for side, slope in zip(sides, slopes, strict=True):
                (scale * side @ torch.tensor(slope)).backward()
        gradient = {name: p.grad.clone() for name, p in self.model.named_parameters()}
        metrics = {
            "replay_dpo/loss": value, "replay_dpo/pairs": len(pairs), "replay_dpo/margin": np.mean(margins),
            "replay_dpo/accuracy": np.mean(np.array(margins) > 0),
            "replay_dpo/chosen_shift": np.mean([c for c, _ in shifts]),
            "replay_dpo/rejected_shift": np.mean([r for _, r in shifts]),
        }  # fmt: skip
        return gradient, metrics

    def _pair(self, config, found, base):
        """Loss, margin, and the loss's slope in each side's log-probs."""
        full = [np.ones(len(side), dtype=bool) for side in found]
        options = dict(
            beta=config.beta,
            smoothing=config.label_smoothing,
            normalize=config.length_normalized,
            nll=config.nll_weight,
        )

        def dpo(c, r):
            return self.oracle.dpo([c], [full[0]], [base[0]], [r], [full[1]], [base[1]], **options)

        values, margins = dpo(*found)
        slopes = (
            self.oracle.central(lambda c: dpo(c, found[1])[0][0], found[0]),
            self.oracle.central(lambda r: dpo(found[0], r)[0][0], found[1]),
        )
        return values[0], margins[0], slopes


@pytest.fixture(scope="module")
def exact(setting, oracle):
    _, paths, dpo = setting
    exact = Exact(paths["model"], dpo, oracle)
    exact.initial = exact.reference()  # before any step loads other parameters
    return exact


def flat(gradient):
    return torch.cat([gradient[name].double().flatten() for name in sorted(gradient)])


def distance(one, other):
    return float((flat(one) - flat(other)).norm() / flat(other).norm())


@pytest.mark.parametrize(
    ("ranks", "name"), [(1, n) for n in [*PAIRS, "advantage"]] + [(2, n) for n in TWO_RANKS if n in PAIRS]
)
def test_every_inner_step_is_pairwise_dpo(results, exact, ranks, name):
    result, options = results[ranks][name], SCENARIOS[name].get("replay_dpo", {})
    assert "error" not in result, result.get("error")
    drawn = result["drawn"] * SCENARIOS[name].get("epochs", 1)
    assert len(result["steps"]) == len(drawn) > 1
    for number, (step, pairs) in enumerate(zip(result["steps"], drawn, strict=True)):
        gradient, metrics = exact.step(step["parameters"], pairs, result["reference"], options)
        assert distance(step["gradient"], gradient) < 1e-5
        for metric, expected in metrics.items():
            if name == "advantage" and metric == "replay_dpo/loss":
                continue  # the same gradient, another value
            if options.get("length_normalized") and metric.endswith("_shift"):
                continue  # per token then
            assert result["metrics"][metric][number] == pytest.approx(expected, rel=1e-5, abs=1e-6), metric
    if SCENARIOS[name].get("lr"):  # the weights moved in between, so the slope of the loss had to be computed anew
        first, later = (s["parameters"]["lm_head.weight"] for s in (result["steps"][0], result["steps"][-1]))
        assert (first - later).abs().max() > 1e-4


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("plain", "name"), [("no pairs", "policy"), ("no pairs sequences", "policy sequences")])
def test_the_policy_term_does_not_see_pair_rows(results, ranks, plain, name):
    stock, ours = results[ranks][plain], results[ranks][name]
    assert "error" not in ours, ours.get("error")
    for one, other in zip(ours["steps"], stock["steps"], strict=True):
        assert distance(one["gradient"], other["gradient"]) < 1e-5
    for metric in ("actor/pg_loss", "actor/entropy_loss", "kl_loss"):
        assert ours["metrics"][metric] == pytest.approx(stock["metrics"][metric], rel=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_both_channels_in_one_update_add_up(results, ranks):
    both, policy, pairs = (results[ranks][name]["steps"] for name in ("both", "policy", "pairs"))
    for step, one, other in zip(both, policy, pairs, strict=True):
        total = {name: one["gradient"][name] + other["gradient"][name] for name in step["gradient"]}
        assert distance(step["gradient"], total) < 1e-5


def test_one_and_two_ranks_give_the_same_update(results):
    one, two = results[1]["whole"], results[2]["whole"]
    assert distance(two["steps"][0]["gradient"], one["steps"][0]["gradient"]) < 1e-5
    for metric in [name for name in one["metrics"] if name.startswith(("replay_dpo/", "actor/", "kl_loss"))]:
        assert two["metrics"][metric] == pytest.approx(one["metrics"][metric], rel=1e-5), metric


@pytest.mark.parametrize(("ranks", "name"), [(1, "score"), (1, "score dynamic"), (2, "score")])
def test_the_reference_is_what_the_initial_weights_say_at_temperature_1(results, exact, ranks, name):
    found = results[ranks][name]["reference"]
    assert sorted(found) == list(range(len(exact.initial)))
    for index, sides in found.items():
        for got, expected in zip(sides, exact.initial[index], strict=True):
            assert got == pytest.approx(expected, rel=1e-5)


def test_verl_cut_real_micro_batches(results):
    """The scenarios are what they say: more than one micro-batch, pairs and rollouts apart and together."""
    for ranks, name in ((1, "dynamic"), (2, "dynamic"), (1, "micro 1"), (1, "packed")):
        for rank in results[ranks][name]["micro_batches"]:
            assert len(rank) > 2
            for micro_batch in rank:
                numbers = micro_batch["rows"]
                assert all(numbers[i + 1] == n + 1 for i, n in enumerate(numbers) if n >= 0 and n % 2 == 0)
                assert "dynamic" not in name or micro_batch["tokens"] <= 60
    assert all(len(m["rows"]) == 2 for m in results[1]["micro 1"]["micro_batches"][0])
    everything = [m["rows"] for name in PAIRS for rank in results[1][name]["micro_batches"] for m in rank]
    assert any(-1 in rows and max(rows) >= 0 for rows in everything) and any(max(rows) == -1 for rows in everything)
    assert any(min(rows) >= 0 for rows in everything)


@pytest.mark.parametrize("name", list(WRONG))
def test_rows_in_the_wrong_place_stop_the_update(results, name):
    assert "torn apart" in results[1][name].get("error", "nothing happened")


@pytest.mark.model
@pytest.mark.timeout(1200)
def test_smollm2_once(tmp_path, oracle):
    """135M real weights, tool calls under the tool template, reference scored by verl itself."""
    from composer_plugins.models.loading import load_model
    from composer_plugins.models.resolve import resolve_model
    from composer_plugins.models.toolcalls import install_tool_template
    from composer_plugins.traces.schema import Message, Pair, Provenance, SourceRef, ToolCall
    from composer_plugins.traces.store import Manifest, write_stage

    model, tokenizer = load_model(resolve_model("smollm2-135m-instruct"))
    model.float().save_pretrained(tmp_path / "model")
    install_tool_template(tokenizer).save_pretrained(tmp_path / "model")
    tools = {"Read": {"name": "Read", "parameters": {"type": "object", "properties": {"path": {"type": "string"}}}}}

    def call(path):
        return Message(role="assistant", tool_calls=[ToolCall(id="0", name="Read", arguments={"path": path})])

    records = [
        Pair(
            id=str(i), state_id=str(i), messages=[Message(role="user", content=f"Open file {i}.")], tools=tools,
            chosen=call(f"{i}.py"), rejected=call("/etc/" + "x" * i),
            provenance=Provenance(rule="x", chosen_by=[], rejected_by=[], source_ref=SourceRef(file="f", line=1)),
        )
        for i in range(3)
    ]  # fmt: skip
    write_stage(tmp_path / "pairs.jsonl", records, Manifest(stage="pairs", record="Pair", written=0))
    dpo = {**DPO, "pairs_per_step": 2, "pairs": str(tmp_path / "pairs.jsonl")}
    kept = ["model.norm.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.29.mlp.down_proj.weight"]
    common = {"model": str(tmp_path / "model"), "micro": 2, "replay_dpo": dpo}
    scenarios = {
        "score": {**common, "score": True},
        "pairs": {**common, "rollouts": 2, "mini_batches": 1, "terms": "pairs", "keep": kept},
    }
    results = on_ranks(tmp_path, scenarios, 1)
    exact = Exact(tmp_path / "model", dpo, oracle)
    for index, sides in enumerate(exact.reference()):
        for got, expected in zip(results["score"]["reference"][index], sides, strict=True):
            assert got == pytest.approx(expected, rel=1e-4, abs=1e-4)
    result = results["pairs"]
    gradient, metrics = exact.step({}, result["drawn"][0], result["reference"], {})
    found = result["steps"][0]["gradient"]
    assert distance(found, {name: gradient[name] for name in found}) < 1e-5
    assert result["metrics"]["replay_dpo/loss"][0] == pytest.approx(metrics["replay_dpo/loss"], rel=1e-5)
