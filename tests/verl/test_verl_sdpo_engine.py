"""Channel 2 through verl's real TrainingWorker and FSDP2 engine (gloo, CPU), against a float64 model."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("verl") is None:
    pytest.skip(
        "verl is not installed: it needs an environment of its own (docs/how-to/verl.md)", allow_module_level=True
    )

import numpy as np
import torch

HERE = Path(__file__).parent
#: Ids that no rollout has, so that their embeddings move only if the hint itself were trained on.
HINT = [4, 5, 6]
SDPO = {"weight": 0.5, "is_clip": None, "teacher": {"kind": "live"}}
BASE = {"rows": 12, "sdpo": SDPO, "hint": HINT, "micro": 2}
CUTS = {
    "micro 1": {"micro": 1},
    "micro 4": {"micro": 4},
    "dynamic": {"tokens": 45},
    "packed": {"remove_padding": True},
    "packed dynamic": {"remove_padding": True, "tokens": 45},
}
OPTIONS = {
    "two mini-batches": {"mini_batches": 2, "micro": 3},
    "floor": {"sdpo": {**SDPO, "denominator_floor": 500}},
    "is_clip": {"sdpo": {**SDPO, "is_clip": 1.1}},
    "engine correction": {"sdpo": {**SDPO, "is_clip": 1.1}, "engine_weights": True},
    "temperature": {"temperature": 0.7},
}
ENTRIES = {
    "topk of the student": {"sdpo": {**SDPO, "level": "topk", "top_k": 5}},
    "topk of the teacher": {"sdpo": {**SDPO, "level": "topk", "top_k": 5, "top_k_of": "teacher", "alpha": 0.5}},
    "topk packed": {"sdpo": {**SDPO, "level": "topk", "top_k": 5}, "remove_padding": True, "tokens": 45},
    "topk renormalised": {
        "sdpo": {**SDPO, "level": "topk", "top_k": 5, "tail": False, "alpha": 0.0},
        "temperature": 0.7,
    },
    "topk of everything": {"sdpo": {**SDPO, "level": "topk", "top_k": 100}, "micro": 3, "mini_batches": 2},
}
EMPTY = {
    "topk empty": {
        **BASE,
        "hint": [],
        "micro": 1,
        "hinted": [1, 4, 7, 10],
        "sdpo": {**SDPO, "level": "topk", "top_k": 5},
    },
    "empty": {**BASE, "hint": [], "micro": 1, "hinted": [1, 4, 7, 10]},  # the last turns of their rollouts
    "empty inside": {**BASE, "hint": [], "hinted": [0, 3, 6, 9]},
    "no turn": {**BASE, "rows": 4, "mini_batches": 2, "hinted": [0, 1]},
}
LORA = {**BASE, "lora": 4, "lr": 40.0, "updates": 3}
OTHER_WEIGHTS = {
    "lora reference": {**LORA, "teacher": "reference", "sdpo": {**SDPO, "teacher": {"kind": "reference"}}},
    "lora ema": {
        **LORA, "teacher": "ema", "rate": 0.3, "strategy": "composer_fsdp2", "sdpo": {**SDPO, "teacher": {"kind": "ema"}},
    },
    "bf16": {**BASE, "bf16": True},
    "bf16 empty": {**EMPTY["empty"], "bf16": True},
}  # fmt: skip
TWO_RANKS = ["base", "micro 1", "dynamic", "packed", "two mini-batches", "engine correction"]
ENTRIES_TWO_RANKS = ["topk of the student", "topk packed"]


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
            [sys.executable, str(HERE / "sdpo_worker.py"), str(path), str(out)],
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
def model(tmp_path_factory):
    """The tiny Llama with larger weights, so that a hint moves log-probs far beyond rounding."""
    from transformers import LlamaForCausalLM

    sys.path.insert(0, str(HERE / "cpu_host" / "composer_cpu_host"))
    import tiny

    folder = tiny.write_model(tmp_path_factory.mktemp("sdpo") / "model")
    found = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    found.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    """All scenarios, on 1 and on 2 ranks."""
    folder = tmp_path_factory.mktemp("runs")
    named = {name: {**BASE, **change} for name, change in {"base": {}, **CUTS, **OPTIONS, **ENTRIES}.items()} | EMPTY
    named |= OTHER_WEIGHTS
    ema = {
        **BASE, "strategy": "composer_fsdp2", "teacher": "ema", "rate": 0.3, "lr": 0.5, "updates": 3,
        "sdpo": {**SDPO, "teacher": {"kind": "ema"}},
    }  # fmt: skip
    found = {}
    for ranks in (1, 2):
        saved, plain = str(folder / f"ema{ranks}"), str(folder / f"plain{ranks}")
        kept = {
            "ema": {**ema, "save": saved},
            "resumed": {**ema, "updates": 0, "load": saved},
            "stock": {**BASE, "save": plain},
            "without a file": {**ema, "updates": 0, "load": plain, "may_fail": True},
        }
        chosen = (
            named
            if ranks == 1
            else {name: named[name] for name in [*TWO_RANKS, *ENTRIES_TWO_RANKS, "empty", "topk empty", "lora ema"]}
        )
        scenarios = {name: {**s, "model": str(model)} for name, s in {**chosen, **kept}.items()}
        found[ranks] = (scenarios, on_ranks(folder, scenarios, ranks))
    return found


class Oracle:
    """The same Llama in float64, and the formula: alpha sum_t w (log pi - log pi_T) log pi / tokens."""

    def __init__(self, folder, parameters):
        from transformers import LlamaForCausalLM

        self.model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(parameters[name])

    def distributions(self, before, span, temperature=1.0):
        logits = self.logits(torch.tensor([[*before, *span]]))[0, len(before) - 1 : -1]
        return torch.log_softmax(logits / temperature, -1)

    def logits(self, ids):
        return self.model(input_ids=ids).logits

    def log_probs(self, before, span, temperature=1.0):
        return self.distributions(before, span, temperature).gather(-1, torch.tensor(span)[:, None])[:, 0]

    def divergences(self, scenario, before, hinted, span):
        """Divergence per token of a span over k entries and the rest, by its definition; gradient to the student."""
        sdpo, heat = scenario["sdpo"], scenario.get("temperature", 1.0)
        student = self.distributions(before, span, heat).exp()
        with torch.no_grad():
            teacher = self.distributions(hinted, span, heat).exp()
        chosen = (teacher if sdpo.get("top_k_of") == "teacher" else student).detach()
        chosen = chosen.topk(min(sdpo["top_k"], chosen.size(-1))).indices
        s, t = student.gather(-1, chosen), teacher.gather(-1, chosen)
        if not sdpo.get("tail", True):
            s, t = s / s.sum(-1, keepdim=True), t / t.sum(-1, keepdim=True)
        elif chosen.size(-1) < student.size(-1):
            s, t = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (s, t))
        alpha = sdpo.get("alpha", 1.0)
        if alpha in (0.0, 1.0):
            p, q = (s, t) if alpha else (t, s)
            return (p * (p / q).log()).sum(-1)
        m = (1 - alpha) * s + alpha * t
        return (alpha * t * (t / m).log() + (1 - alpha) * s * (s / m).log()).sum(-1)

    def gradient_of_entries(self, scenario, rows, readings):
        """As `gradient`, at level topk; `readings` are (hinted context, span) of the hinted rows."""
        parts = []
        for row in (row for row in rows if row["span"] is not None):
            start, end = row["span"]
            before = [*row["prompts"].tolist(), *row["responses"][:start].tolist()]
            parts.append(
                self.divergences(scenario, before, readings[row["number"]], row["responses"][start:end].tolist())
            )
        loss = scenario["sdpo"]["weight"] * torch.cat(parts).mean()
        self.model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in self.model.named_parameters()}, float(loss.detach())

    def gradient(self, scenario, rows, teacher):
        """Parameters' gradient of one mini-batch; `teacher` are the log-probs of its hinted rows, in order."""
        sdpo, total, count, teacher = scenario["sdpo"], 0.0, 0, iter(teacher)
        for row in rows:
            if row["span"] is None:
                continue
            start, end = row["span"]
            before = [*row["prompts"].tolist(), *row["responses"][:start].tolist()]
            own = self.log_probs(before, row["responses"][start:end].tolist(), scenario.get("temperature", 1.0))
            weight = torch.ones_like(own)
            if sdpo["is_clip"] is not None:
                weight = torch.exp(own.detach() - row["old_log_probs"][start:end]).clamp(max=sdpo["is_clip"])
            if scenario.get("engine_weights"):
                weight = weight * row["rollout_is_weights"][start:end]
            total = total + (weight * (own.detach() - next(teacher).double()) * own).sum()
            count += end - start
        loss = sdpo["weight"] * total / max(count, sdpo.get("denominator_floor", 0))
        trained = self.trained()
        gradients = torch.autograd.grad(loss, list(trained.values()))
        return dict(zip(trained, gradients, strict=True)), float(loss.detach())

    def trained(self):
        return dict(self.model.named_parameters())


class LoraOracle(Oracle):
    """The base model in float64 with W + alpha / rank * B A in the place of W; only A and B have a gradient."""

    def __init__(self, folder, parameters, rank=4, alpha=8):
        from transformers import LlamaForCausalLM

        self.model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        self.scale = alpha / rank
        self.leaves = {n: p.double().requires_grad_() for n, p in parameters.items() if "lora_" in n}
        base = {n: p for n, p in parameters.items() if "lora_" not in n}
        for name, parameter in self.model.named_parameters():  # the base stands still
            layer = name.removesuffix(".weight")
            same = base.get(f"base_model.model.{name}", base.get(f"base_model.model.{layer}.base_layer.weight"))
            assert torch.equal(same.double(), parameter)

    def logits(self, ids):
        weights = dict(self.model.named_parameters())
        for name, down in self.leaves.items():
            if ".lora_A." in name:
                layer = name.removeprefix("base_model.model.").split(".lora_A.")[0]
                up = self.leaves[name.replace(".lora_A.", ".lora_B.")]
                weights[f"{layer}.weight"] = weights[f"{layer}.weight"].detach() + self.scale * up @ down
        return torch.func.functional_call(self.model, weights, (), {"input_ids": ids}).logits

    def trained(self):
        return self.leaves


def mini_batches(scenario, ranks, result):
    """The rows of each mini-batch: verl gives ranks contiguous parts and cuts each in order; and their teachers."""
    count, hinted = scenario.get("mini_batches", 1), iter(result["teacher"][0])
    rows = [(row, None if row["span"] is None else next(hinted)) for row in result["rows"]]
    parts = np.array_split(np.arange(len(rows)), ranks)
    for number in range(count):
        chosen = [int(i) for part in parts for i in np.array_split(part, count)[number]]
        yield [rows[i][0] for i in chosen], [rows[i][1] for i in chosen if rows[i][1] is not None]


def relative(got, expected):
    squares = [float(((got[n].double() - g) ** 2).sum()) for n, g in expected.items()]
    return (sum(squares) / sum(float((g**2).sum()) for g in expected.values())) ** 0.5


SCENARIOS = [(1, name) for name in ["base", *CUTS, *OPTIONS]] + [(2, name) for name in TWO_RANKS]


@pytest.mark.parametrize(("ranks", "name"), SCENARIOS)
def test_value_and_gradient_are_those_of_a_float64_model(runs, model, ranks, name):
    scenarios, found = runs[ranks]
    scenario, result = scenarios[name], found[name]
    losses = []
    for (rows, teacher), step in zip(mini_batches(scenario, ranks, result), result["steps"], strict=True):
        gradient, loss = Oracle(model, step["parameters"]).gradient(scenario, rows, teacher)
        losses.append(loss)
        assert relative(step["gradient"], gradient) < 1e-5
    assert np.mean(result["metrics"][0]["loss"]) == pytest.approx(np.mean(losses), rel=2e-5)


@pytest.mark.parametrize(("ranks", "name"), [(1, n) for n in ENTRIES] + [(2, n) for n in ENTRIES_TWO_RANKS])
def test_topk_value_and_gradient_are_those_of_a_float64_model(runs, model, ranks, name):
    scenarios, found = runs[ranks]
    scenario, result = scenarios[name], found[name]
    numbers = [i for i, row in enumerate(result["rows"]) if row["span"] is not None]
    readings = {number: before for number, (before, _) in zip(numbers, result["readings"], strict=True)}
    for number, row in enumerate(result["rows"]):
        row["number"] = number
    losses = []
    for (rows, _), step in zip(mini_batches(scenario, ranks, result), result["steps"], strict=True):
        gradient, loss = Oracle(model, step["parameters"]).gradient_of_entries(scenario, rows, readings)
        losses.append(loss)
        assert relative(step["gradient"], gradient) < 1e-5
    assert np.mean(result["metrics"][0]["loss"]) == pytest.approx(np.mean(losses), rel=2e-5)


@pytest.mark.parametrize(("ranks", "name"), [(1, name) for name in CUTS] + [(2, "base"), (2, "dynamic"), (2, "packed")])
def test_how_verl_cuts_the_batch_does_not_change_the_gradient(runs, ranks, name):
    base, other = runs[1][1]["base"]["steps"][0], runs[ranks][1][name]["steps"][0]
    expected = {n: g.double() for n, g in base["gradient"].items()}
    assert relative(other["gradient"], expected) < 1e-5


@pytest.mark.parametrize(("ranks", "name"), [(1, "base"), (1, "packed dynamic"), (1, "temperature"), (2, "dynamic")])
def test_the_teacher_reads_the_hint_and_scores_the_same_ids(runs, model, ranks, name):
    scenarios, found = runs[ranks]
    result = found[name]
    oracle = Oracle(model, result["steps"][0]["parameters"])
    spans = [(row, *row["span"]) for row in result["rows"] if row["span"] is not None]
    for (before, span), (row, start, end), values in zip(result["readings"], spans, result["teacher"][0], strict=True):
        assert span == row["responses"][start:end].tolist()
        assert [i for i in before if i in HINT] == HINT
        expected = oracle.log_probs(before, span, scenarios[name].get("temperature", 1.0))
        assert torch.allclose(values.double(), expected, atol=3e-6)
        assert float((values - oracle.log_probs([i for i in before if i not in HINT], span)).abs().max()) > 1e-3


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("level", ["", "topk "])
def test_an_empty_hint_and_a_live_teacher_give_exactly_zero(runs, ranks, level):
    result = runs[ranks][1][f"{level}empty"]
    assert len(result["teacher"][0]) == 4
    assert result["metrics"][0]["sdpo/loss"] == [0.0] and result["metrics"][0]["sdpo/active_tokens"] == [0.0]
    largest = max(float(g.abs().max()) for g in result["steps"][0]["gradient"].values())
    assert largest == 0.0 if not level else largest < 1e-6  # topk: sum_k d S_k is 0 up to rounding


def test_an_empty_hint_inside_a_rollout_is_zero_up_to_rounding(runs):
    """The teacher's row ends with the turn, the student's goes on: other shapes, other rounding."""
    metrics = runs[1][1]["empty inside"]["metrics"][0]
    assert abs(metrics["sdpo/divergence"][0]) < 1e-6 and metrics["sdpo/active_tokens"] == [0.0]


def test_hint_tokens_get_no_gradient(runs):
    for ranks, name in SCENARIOS:
        gradient = runs[ranks][1][name]["steps"][0]["gradient"]["model.embed_tokens.weight"]
        assert float(gradient[HINT].abs().max()) == 0.0
        assert float(gradient[7:].abs().max()) > 0.0


def test_counts_are_those_of_the_whole_mini_batch(runs):
    for ranks, name in [(1, "micro 1"), (1, "dynamic"), (2, "micro 1"), (2, "packed")]:
        result = runs[ranks][1][name]
        tokens = sum(end - start for start, end in (r["span"] for r in result["rows"] if r["span"]))
        metrics = result["metrics"][0]
        assert metrics["sdpo/tokens"] == [tokens] and 0 < metrics["sdpo/active_tokens"][0] <= tokens
        base = runs[1][1]["base"]["metrics"][0]
        assert metrics["sdpo/divergence"] == pytest.approx(base["sdpo/divergence"], rel=1e-4)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_average_moves_by_its_rate_and_the_weights_come_back(runs, model, ranks):
    result = runs[ranks][1]["ema"]
    seen = [step["parameters"] for step in result["steps"]] + [result["parameters"]]
    average = {name: p.double() for name, p in seen[0].items()}
    for number, weights in enumerate(seen):
        if number:
            average = {name: a + 0.3 * (weights[name] - a) for name, a in average.items()}
        oracle = Oracle(model, average)
        for (before, span), values in zip(result["readings"], result["teacher"][number], strict=True):
            assert torch.allclose(values.double(), oracle.log_probs(before, span), atol=5e-6)
    moved = max(float((average[n] - seen[-1][n]).abs().max()) for n in average)
    assert moved > 1e-3  # else the average could be the weights
    assert all(torch.equal(result["after"][n], p) for n, p in result["parameters"].items())
    oracle = Oracle(model, result["parameters"])
    for (before, span), values in zip(result["readings"], result["live"], strict=True):
        assert torch.allclose(values.double(), oracle.log_probs(before, span), atol=5e-6)
    size = sum(p.numel() for p in seen[0].values()) * 4 / 1e9
    assert result["metrics"][0]["sdpo/teacher_weights_gb"][0] == pytest.approx(size / ranks, rel=0.05)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_average_is_in_the_checkpoint(runs, ranks):
    saved, resumed = runs[ranks][1]["ema"], runs[ranks][1]["resumed"]
    assert [f for f in saved["files"] if "composer" in f] == [
        f"composer_ema_world_size_{ranks}_rank_{rank}.pt" for rank in range(ranks)
    ]
    for before, after in zip(saved["teacher"][-1], resumed["teacher"][0], strict=True):
        assert torch.equal(before, after)
    error = runs[ranks][1]["without a file"]["error"]
    assert error.startswith("ConfigError") and "cannot be resumed exactly" in error


@pytest.mark.parametrize(("ranks", "name"), [(1, "lora reference"), (1, "lora ema"), (2, "lora ema")])
def test_an_adapter_is_trained_and_its_teacher_is_what_it_says(runs, model, ranks, name):
    """reference: the model without its adapter; ema: the average of the adapter alone, a few bytes per rank."""
    scenarios, found = runs[ranks]
    scenario, result = scenarios[name], found[name]
    adapters = [step["parameters"] for step in result["steps"]]
    for number, step in enumerate(result["steps"]):
        assert step["gradient"].keys() == {n for n in step["parameters"] if "lora_" in n}
        gradient, loss = LoraOracle(model, step["parameters"]).gradient(
            scenario, result["rows"], result["teacher"][number]
        )
        assert relative(step["gradient"], gradient) < 1e-5
        assert result["metrics"][number]["loss"][0] == pytest.approx(loss, rel=2e-5)
    average = {n: p.double() for n, p in adapters[0].items()}
    for weights in [*adapters[1:], result["parameters"]]:
        average = {n: a + 0.3 * (weights[n] - a) if "lora_" in n else a for n, a in average.items()}
    if name == "lora reference":
        average = {n: torch.zeros_like(p) if "lora_" in n else p for n, p in average.items()}
    reads = LoraOracle(model, average)
    live = LoraOracle(model, result["parameters"])
    for (before, span), values in zip(result["readings"], result["teacher"][-1], strict=True):
        assert torch.allclose(values.double(), reads.log_probs(before, span).detach(), atol=5e-6)
    moved = [float((live.log_probs(*r) - reads.log_probs(*r)).abs().max().detach()) for r in result["readings"]]
    assert max(moved) > 1e-3  # else the teacher could be the adapter as it is
    if name == "lora ema":
        trained = sum(p.numel() for n, p in adapters[0].items() if "lora_" in n)
        size = result["metrics"][0]["sdpo/teacher_weights_gb"][0]
        assert size == pytest.approx(trained * 4 / 1e9 / ranks, rel=0.05)


def test_bf16_is_the_same_loss_at_its_own_precision(runs, model):
    """verl's default on a GPU: bf16 forward, fp32 gradients. An empty hint is still exactly zero."""
    scenarios, found = runs[1]
    result = found["bf16"]
    gradient, loss = Oracle(model, result["steps"][0]["parameters"]).gradient(
        scenarios["bf16"], result["rows"], result["teacher"][0]
    )
    distance = relative(result["steps"][0]["gradient"], gradient)
    assert 1e-4 < distance < 0.1
    assert result["metrics"][0]["loss"][0] == pytest.approx(loss, rel=0.1)
    empty = found["bf16 empty"]
    assert empty["metrics"][0]["sdpo/loss"] == [0.0]
    assert all(float(g.abs().max()) == 0.0 for g in empty["steps"][0]["gradient"].values())


def test_a_mini_batch_without_an_error_turn_is_a_zero(runs):
    result = runs[1][1]["no turn"]
    first, second = (step["gradient"] for step in result["steps"])
    assert max(float(g.abs().max()) for g in first.values()) > 0
    assert all(float(g.abs().max()) == 0.0 for g in second.values())
    assert result["metrics"][0]["sdpo/tokens"][1] == 0.0 and result["metrics"][0]["sdpo/loss"][1] == 0.0
