"""The signal report: its numbers against hand counts, its page against hostile logs, its margins against the model."""

from __future__ import annotations

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from composer_plugins.errors import ComposerError, ConfigError, TraceError
from composer_plugins.preferences import PairOptions, PairStats, build_pairs
from composer_plugins.preferences.margin import Estimate, Margins, estimate, interval
from composer_plugins.preferences.signal import signal_of
from composer_plugins.report.signal import histograms, matrix, render, tables
from composer_plugins.traces.schema import Message, Pair, Replay, SourceRef, State, Status, ToolCall, ToolResult
from composer_plugins.traces.store import Manifest, read_manifest, read_stage, write_stage

HOSTILE = "<script>alert(1)</script>\u202e\" onload='x'"


def act(command: str, name: str = "Bash") -> Message:
    return Message(role="assistant", tool_calls=[ToolCall(id="c", name=name, arguments={"command": command})])


def session(trace: str, steps: int, *, failed: bool = False) -> list[State]:
    status = Status.ERROR if failed else Status.OK
    results = [ToolResult(call_id="c", content="", status=status, error_class="timeout" if failed else None)]
    return [
        State(
            id=f"{trace}:{i}", trace_id=trace, step=i, messages=[Message(role="user", content=f"{trace} {i}")], action=act(f"ls {i}"),
            source_ref=SourceRef(file="f", line=i), status=status, results=results, model="claude-x",
        )
        for i in range(steps)
    ]  # fmt: skip


def answers(states: list[State], cost: float | None = None) -> list[Replay]:
    """a and b agree (with the log where it worked), c says something else."""
    found = []
    for state in states:
        agreed = "find ." if state.status.failed else state.action.tool_calls[0].arguments["command"]
        for teacher, command in (("a", agreed), ("b", agreed), ("c", f"git log {state.step}")):
            model = {"a": "claude-y", "b": "gpt-5", "c": "mystery"}[teacher]
            found.append(
                Replay(
                    state_id=state.id,
                    teacher=teacher,
                    model=model,
                    weights_id=teacher,
                    action=act(command),
                    cost_usd=cost,
                )
            )
    return found


def made(states, replays, **options):
    stats = PairStats()
    pairs = list(build_pairs(states, replays, PairOptions(**options), stats=stats))
    counts = stats.counts()
    manifest = Manifest(
        stage="pairs", record="Pair", written=len(pairs), read=stats.read, used=stats.used,
        skipped={k[8:]: v for k, v in counts.items() if k.startswith("skipped:")}, scrubbed="rules-1",
        options={"pairs": {"own_family": "flag", "student": None, "vote": "majority"}, **json.loads(json.dumps(stats.details()))},
    )  # fmt: skip
    return pairs, manifest


@pytest.fixture
def report():
    states = [*session("long", 6), *session("short", 2, failed=True), *session("empty", 1)]
    pairs, manifest = made(states, answers(states[:-1], cost=0.01))
    return signal_of(pairs, manifest)


def test_the_numbers(report):
    assert report.pairs == 8 and report.rules == {"agreement": 6, "disagreement": 2}
    assert report.traces == [("long", 6), ("short", 2), ("empty", 0)] and report.below_bar == 2
    assert report.states == {"read": 9, "with pairs": 8, "not_replayed": 1}
    cells = {(a, b): (same, both) for a, b, same, both in report.agreement}
    assert cells[("a", "b")] == (8, 8) and cells[("a", "recorded")] == (6, 8) and cells[("a", "c")] == (0, 8)
    assert report.names[0] == "recorded" and matrix(report)[0][1][1] == ("75%", 4, "6 of 8 states")
    assert report.tools == [("Bash", 8, 8)] and report.error_classes == [
        ("(the recorded action worked)", 6),
        ("timeout", 2),
    ]
    assert report.guard["pairs_with_own_family"] == 8 and report.guard["share"] == 1.0
    assert report.guard["families"] == {"a": "claude", "b": "gpt", "c": "unknown"}
    assert report.guard["pairs_with_own_family_on_the_chosen_side"] == 8
    assert report.cost["total_usd"] == pytest.approx(0.24) and report.cost["per_pair_usd"] == pytest.approx(0.03)
    assert report.votes["by_share"] == [("2 of 3", 8)] and report.scrubbed == "rules-1"
    assert report.lengths.unit == "characters" and report.lengths.chosen["mean"] < report.lengths.rejected["mean"]
    assert report.lengths.bias == "chosen actions are shorter"
    text = " ".join(report.warnings)
    assert "2 of 3 traces gave fewer than 5 pairs" in text and "100% of the pairs" in text and "Length bias" in text
    assert json.loads(json.dumps(report.to_json()))["traces_below_bar"] == 2
    assert {b.title for b in tables(report)} >= {
        "Pairs per trace",
        "Agreement",
        "By tool",
        "By error class",
        "Circularity guard",
    }


def test_a_report_of_nothing():
    pairs, manifest = made(session("t", 2), [])
    report = signal_of(pairs, manifest)
    assert report.pairs == 0 and report.warnings[0].startswith("There is no pair")
    assert "There is no pair" in render(report, name="x") and tables(report)


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_escapes_what_comes_from_logs():
    states = session(HOSTILE, 3, failed=True)
    for state in states:
        state.action = act("ls", name=HOSTILE)
    pairs, manifest = made(states, answers(states))
    margins = Margins(
        student=HOSTILE, pairs={u: Estimate(1, 0, 2, 0.5, 3) for u in ("sum", "per_token")}, control={u: Estimate(None, None, None, None, 0) for u in ("sum", "per_token")},
        difference={u: Estimate(None, None, None, None, 0) for u in ("sum", "per_token")}, left_out={HOSTILE: 1}, tokens=[(1, 2)],
        values=[("p", -1.5, 0.5), ("q", 2.0, None)],
    )  # fmt: skip
    html = render(signal_of(pairs, manifest, margins=margins), name=HOSTILE)
    page = Page()
    page.feed(html)
    assert "script" not in page.tags and not any(name.startswith("on") for name, _ in page.attributes)
    assert not any(name in ("src", "href") and not value.startswith("data:") for name, value in page.attributes)
    assert "default-src 'none'" in html and "\u202e" not in html and "alert(1)" in " ".join(page.text)
    assert "script-src" not in html, "the page runs nothing"
    assert re.search(r"our own addition|own addition", html)


def test_histograms_count_every_value():
    values = [("a", -3.0, 1.0), ("b", 3.0, None), ("c", 0.0, 3.0)]
    empty = {u: Estimate(None, None, None, None, 0) for u in ("sum", "per_token")}
    margins = Margins("m", empty, empty, empty, {}, [], values)
    own, control = histograms(margins)
    assert sum(b.count for b in own["bars"]) == 3 and sum(b.count for b in control["bars"]) == 2
    assert own["zero"] == pytest.approx(50) and own["bars"][0].low == -3 and own["bars"][-1].high == pytest.approx(3)
    flat = Margins("m", empty, empty, empty, {}, [], [("a", 1.0, 1.0)])
    assert histograms(flat)[0]["bars"] and histograms(None) == []


def test_intervals_cover_the_mean_as_often_as_they_say():
    rng, hits = random.Random(3), 0
    for trial in range(60):
        values, clusters = [], []
        for cluster in range(25):
            shared = rng.gauss(0, 1)
            size = rng.randint(1, 4)
            values += [1.0 + shared + rng.gauss(0, 0.3) for _ in range(size)]
            clusters += [str(cluster)] * size
        low, high = interval(values, clusters, seed=trial)
        hits += low <= 1.0 <= high
    assert 0.86 <= hits / 60 <= 0.99
    assert interval([1.0, 2.0], ["s", "s"]) is None, "one state: nothing to resample"
    assert estimate([], []).count == 0 and estimate([2.0, -1.0], ["a", "b"]).positive == 0.5


# The student's margins


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A tiny real model and tokenizer on disk, as `--student` takes them."""
    torch = pytest.importorskip("torch")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from composer_plugins.models.toolcalls import install_tool_template

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(
        ["a"],
        trainers.BpeTrainer(vocab_size=270, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = install_tool_template(
        PreTrainedTokenizerFast(
            tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token="<|im_start|>"
        )
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.3,
        )
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("student")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_margins_are_the_models_own_log_probabilities(student):
    import torch

    from composer_plugins.models import load_model
    from composer_plugins.preferences.margin import measure

    states = session("t", 5)
    pairs, manifest = made(states, answers(states))
    found = measure(pairs, str(student))
    model, tokenizer = load_model(str(student))

    def logprob(pair: Pair, action: Message) -> tuple[float, int]:
        """The whole conversation at once, position by position, with the model's full logits."""
        text = tokenizer.apply_chat_template(
            [*(m.to_chat() for m in pair.messages)], add_generation_prompt=True, tokenize=False
        )
        full = tokenizer.apply_chat_template(
            [*(m.to_chat() for m in pair.messages), action.to_chat()], tokenize=False
        ).rstrip("\n")
        context, ids = (tokenizer(t, add_special_tokens=False).input_ids for t in (text, full))
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double()
        total = sum(torch.log_softmax(logits[i - 1], -1)[ids[i]].item() for i in range(len(context), len(ids)))
        return total, len(ids) - len(context)

    for pair, (identifier, value, control) in zip(pairs, found.values, strict=True):
        (good, n), (bad, m) = logprob(pair, pair.chosen), logprob(pair, pair.rejected)
        assert identifier == pair.id and value == pytest.approx(good - bad, abs=2e-3)
        possible = [
            logprob(pair, o.chosen)[0] - logprob(pair, o.rejected)[0] for o in pairs if o.state_id != pair.state_id
        ]
        assert any(control == pytest.approx(p, abs=2e-3) for p in possible), "the actions of another state's pair"
        assert (n, m) in found.tokens
    values = [v for _, v, _ in found.values]
    assert found.pairs["sum"].mean == pytest.approx(sum(values) / 5, abs=1e-3) and found.pairs["sum"].count == 5
    gap = [v - c for _, v, c in found.values]
    assert found.difference["sum"].mean == pytest.approx(sum(gap) / 5, abs=1e-3)
    assert found.difference["sum"].low < found.difference["sum"].mean < found.difference["sum"].high


def test_a_student_that_was_trained_on_the_pairs_stands_out_from_the_control(student):
    """The control must tell a preference that depends on the state from one that does not."""
    import torch

    from composer_plugins.models import load_model
    from composer_plugins.preferences.margin import _render, measure_with

    model, tokenizer = load_model(str(student))
    states = session("t", 6)
    replays = []
    for i, state in enumerate(states):  # the right command differs from state to state, all have one length
        state.messages = [Message(role="user", content="abcdef"[i])]
        state.action = act("abcdef"[i] * 3)
        wrong = "abcdef"[(i + 1) % 6] * 3
        replays += [
            Replay(state_id=state.id, teacher=t, model=t, weights_id=t, action=act(c))
            for t, c in (("x", "abcdef"[i] * 3), ("y", "abcdef"[i] * 3), ("z", wrong))
        ]
    pairs, _ = made(states, replays, max_similarity=1.0)
    assert len(pairs) == 6
    torch.manual_seed(1)
    model = type(model)(type(model.config)(**{**model.config.to_dict(), "initializer_range": 0.05})).eval()
    before = measure_with(model, tokenizer, pairs)
    rendered = [_render(pair, tokenizer, 1024) for pair in pairs]
    ids = torch.tensor([item.context + item.chosen for item in rendered])  # all of one length
    start = len(rendered[0].context)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for _ in range(200):
        optimizer.zero_grad()
        logits = model(ids).logits[:, start - 1 : -1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, start:].flatten()).backward()
        optimizer.step()
    after = measure_with(model.eval(), tokenizer, pairs)
    assert after.difference["sum"].low > 1 and after.difference["sum"].positive == 1.0
    assert after.difference["sum"].mean > before.difference["sum"].mean + 1


def test_what_cannot_be_measured_is_counted(student):
    from composer_plugins.preferences.margin import measure

    states = session("t", 4)
    states[1].messages = [Message(role="user", content="word " * 800)]
    pairs, _ = made(states, answers(states))
    found = measure(pairs, str(student), limit=3)
    assert sum(found.left_out.values()) + len(found.values) == 4
    found = measure(pairs, str(student))
    assert found.left_out == {"longer than the limit of tokens": 1} and found.pairs["sum"].count == 3
    [one] = measure(pairs[:1], str(student)).values
    assert one[2] is None and math.isfinite(one[1]), "no other state, no control"


# The command


def run(*arguments, code: int = 0) -> str:
    from composer_plugins.cli import build_app

    result = CliRunner().invoke(build_app(), [str(a) for a in arguments], env={"COLUMNS": "160"})
    if isinstance(result.exception, ComposerError):
        raise result.exception
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    states = [*session("long", 6), *session("short", 2, failed=True)]
    write_stage(tmp_path / "s.jsonl", states, Manifest(stage="hints", record="State", written=0, scrubbed="rules-7"))
    write_stage(tmp_path / "r.jsonl", answers(states, 0.01), Manifest(stage="replay", record="Replay", written=0))
    return [tmp_path / "s.jsonl", tmp_path / "r.jsonl"]


def test_from_states_to_the_report(files, tmp_path, student):
    out = tmp_path / "p.jsonl"
    text = run("pairs", *files, "-o", out, "--student", "Qwen/Qwen3-4B", "--vote", "weighted", "--teacher-pairs")
    assert "Circularity guard: a (claude) is of the student's or the recorded agent's own family" in text
    assert "the model family of c is unknown" in text and "Estimated reliability" in text
    manifest = read_manifest(out)
    assert manifest.scrubbed == "rules-7" and manifest.options["pairs"]["student"] == "Qwen/Qwen3-4B"
    assert all(p.provenance.own_family for p in read_stage(out, Pair))
    html, data = tmp_path / "o" / "s.html", tmp_path / "s.json"
    text = run("signal", out, "--html", html, "--json", data, "--student", student)
    assert "below the bar" in text and "Margins of" in text and "Warning: 1 of 2 traces" in text
    found = json.loads(data.read_text())
    assert (
        found["pairs"] == 8 + 2
        and found["margins"]["pairs"]["sum"]["count"] == 10
        and found["lengths"]["unit"] == "tokens"
    )
    assert "<h3>Agreement</h3>" in html.read_text()
    assert "ok" in run("validate", out)
    text = run("pairs", *files, "-o", out, "--own-family", "exclude")
    assert "8 answers of a (claude) were excluded" in text and "0 pairs from 0 of 8 states" in text
    assert "There is no pair" in run("signal", out)


def test_the_files_are_written_also_when_nobody_reads_the_tables_to_the_end(files, tmp_path, monkeypatch):
    out, html, data = tmp_path / "pairs.jsonl", tmp_path / "s.html", tmp_path / "s.json"
    run("pairs", *files, "-o", out)

    def closed(found):
        raise BrokenPipeError  # as `| head` does

    monkeypatch.setattr("composer_plugins.cli.signal._print", closed)
    run("signal", out, "--html", html, "--json", data, code=1)
    assert "<h3>Agreement</h3>" in html.read_text() and json.loads(data.read_text())["pairs"]


def test_bad_input_is_refused_in_one_sentence(files, tmp_path):
    out = tmp_path / "p.jsonl"
    run("pairs", *files, "-o", out)
    before = out.read_bytes()
    for arguments, error, message in (
        (["--vote", "loud"], ConfigError, "Votes: majority"),
        (["--own-family", "hide"], ConfigError, "flag, exclude, allow"),
        (["--families", tmp_path / "none"], ConfigError, "cannot be read"),
        (["--equality", tmp_path / "none"], ConfigError, "cannot be read"),
        (["--trl", tmp_path / "x.csv"], ConfigError, "parquet"),
        (["--min-confidence", "2"], ConfigError, "min_confidence"),
        (["--max-length-ratio", "nan"], ConfigError, "max_length_ratio"),
    ):
        with pytest.raises(error, match=message):
            run("pairs", *files, "-o", out, *arguments)
        assert out.read_bytes() == before
    with pytest.raises(TraceError, match="holds State records"):
        run("signal", files[0])
    with pytest.raises(ConfigError, match="would replace the pairs"):
        run("signal", out, "--html", out)
    with pytest.raises(ConfigError, match="is a folder"):
        run("signal", out, "--json", tmp_path)
    with pytest.raises(ConfigError, match="replace another file"):
        run("pairs", *files, "-o", tmp_path / "q.jsonl", "--trl", tmp_path / "q.jsonl")
