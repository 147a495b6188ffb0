"""TRL's conversational dataset layouts; TRL itself says what is conversational and where a prompt ends."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path

import agent_logs
import pytest

from composer_plugins.plugins import get_plugin_manager
from composer_plugins.traces.chat_rows import row_format
from composer_plugins.traces.find import find_reader
from composer_plugins.traces.trl_dataset import READER

read = partial(agent_logs.balanced, READER)
FILE = Path(__file__).parent / "data/trl/dataset.jsonl"


def write(path: Path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_layout():
    traces, ledger = read(FILE)
    assert ledger["read"] == 8 and ledger.skipped() == {"no_model_step": 1}
    actions = [(t.outcome, [t.action_of(s).content for s in t.steps], [s.trainable for s in t.steps]) for t in traces]
    assert actions == [
        (None, ["", "It is 21 degrees."], [True, True]),
        (None, ["Hello.", "Bye."], [True, True]),
        (None, ["It is blue."], [True]),
        (None, ["6"], [True]),  # the "4" of the prompt is context
        ("chosen", ["It is blue."], [True]),
        ("rejected", ["It is green."], [False]),
        ("chosen", ["Yellow."], [True]),
        ("rejected", ["Purple."], [False]),
        ("undesirable", ["3"], [False]),
    ]
    assert [t.steps[0].source_ref.line for t in traces] == [1, 2, 3, 4, 5, 5, 6, 6, 7]
    assert all(s.history_exact for t in traces for s in t.steps)


@pytest.mark.parametrize("indent", [None, 1])
def test_rows_in_one_document_are_read_as_its_lines_are(tmp_path, indent):
    rows = [json.loads(line) for line in FILE.read_text().splitlines()]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=indent))
    assert find_reader(tmp_path / "list.json") is READER
    traces, ledger = read(tmp_path / "list.json")
    lines, other = read(FILE)
    assert [t.messages for t in traces] == [t.messages for t in lines] and dict(ledger) == dict(other)
    assert [s.source_ref.line for t in traces for s in t.steps] == (
        [1] * sum(len(t.steps) for t in lines) if indent is None else _starts(rows, lines)
    )
    (tmp_path / "one.json").write_text(json.dumps(rows[0], indent=1))
    (trace,), ledger = read(tmp_path / "one.json")
    assert (trace.messages, ledger["read"]) == (lines[0].messages, 1)
    text = json.dumps(rows, indent=1)
    (tmp_path / "cut.json").write_text(text[: len(text) // 2])
    traces, ledger = read(tmp_path / "cut.json")
    assert 0 < len(traces) < len(lines) and ledger["skipped:cut_or_not_json"] == 1


def _starts(rows, lines):
    """Where each row of the indented list begins, once a step."""
    starts, at = {}, 2
    for number, row in enumerate(rows, 1):
        starts[number] = at
        at += json.dumps(row, indent=1).count("\n") + 1
    return [starts[s.source_ref.line] for t in lines for s in t.steps]


def test_calls_without_ids_are_paired_by_name_and_order():
    (weather, second, *_), _ = read(FILE)
    (result,) = weather.steps[0].results
    assert result.content == "21 degrees" and result.call_id == weather.messages[1].tool_calls[0].id
    assert weather.messages[1].tool_calls[0].arguments == {"location": "Paris"}
    assert weather.messages[2].tool_call_id == result.call_id
    assert weather.tools == second.tools and "description" in weather.tools["get_weather"]  # a list, and JSON text


def test_results_without_ids_go_to_the_call_of_their_name(tmp_path):
    calls = [{"function": {"name": name, "arguments": {}}} for name in ("f", "g", "f")]
    results = [{"role": "tool", "name": name, "content": f"{name}{k}"} for k, name in enumerate("gff")]
    asked = {"role": "user", "content": "q"}
    (trace,), _ = read(
        write(tmp_path / "d", {"messages": [asked, {"role": "assistant", "tool_calls": calls}, *results]})
    )
    assert [r.content for r in trace.steps[0].results] == ["f1", "g0", "f2"]
    assert trace.extra["paired_by_order"] == 3


def test_other_columns_are_kept():
    traces, _ = read(FILE)
    assert traces[3].extra["fields"] == {"solution": "6"}


def test_rows_that_are_no_conversations(tmp_path):
    good = {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}
    rows = [good, {"prompt": "The sky is", "completion": " blue."}, {"text": "x"}, {"chosen": 3, "rejected": []}, [1]]
    traces, ledger = read(write(tmp_path / "d.jsonl", *rows))
    assert len(traces) == 1
    assert ledger.skipped() == {"not_conversational": 1, "malformed_record": 3}
    assert [p.line for p in ledger.problems] == [2, 3, 4, 5]


def test_content_alone_decides_between_trl_and_openai(tmp_path):
    asked, said = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    objects = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    text = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]}
    cases = [
        ("openai_messages", {"messages": [asked, said]}),
        ("openai_messages", {"messages": [asked, text], "tools": []}),
        ("trl", {"messages": [asked, objects]}),
        ("trl", {"messages": [asked, said], "tools": "[]"}),
        ("trl", {"prompt": [asked], "completion": [said]}),
        ("trl", {"chosen": [asked, said], "rejected": [asked, said]}),
        ("verifiers", {"prompt": [asked], "completion": [said], "reward": 1.0}),
        (None, {"prompt": "text", "completion": "text"}),
    ]
    for expected, row in cases:
        assert row_format(row) == expected, row
        head = write(tmp_path / "d", row, row).read_bytes()
        claimed = [entry.name for entry in get_plugin_manager().trace_readers if entry.load().sniff(head)]
        assert claimed == ([expected] if expected else []), row


def test_a_later_row_can_show_the_format_and_a_long_first_line_too(tmp_path):
    asked, said = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    plain = {"messages": [asked, said]}
    mixed = write(tmp_path / "d", plain, plain, {**plain, "tools": "[]"})
    assert READER.sniff(mixed.read_bytes())
    long = write(tmp_path / "l", {"prompt": [{"role": "user", "content": "q" * 70_000}], "completion": [said]})
    assert READER.sniff(long.read_bytes()[: 64 * 1024])


def test_the_implicit_prompt_is_the_one_that_trl_extracts(tmp_path):
    data_utils = pytest.importorskip("trl.data_utils")
    chance = random.Random(0)
    rows = []
    for _ in range(60):
        shared = [
            {"role": ("user", "assistant")[k % 2], "content": str(chance.randrange(3))}
            for k in range(chance.randrange(1, 6))
        ]
        sides = [[*shared, {"role": "assistant", "content": str(chance.randrange(2))}] for _ in "cr"]
        rows.append({"chosen": sides[0], "rejected": sides[1]})
    traces, ledger = read(write(tmp_path / "d.jsonl", *rows))
    assert ledger["used"] == 60 and len(traces) == 120
    for row, chosen, rejected in zip(rows, traces[::2], traces[1::2], strict=True):
        assert data_utils.is_conversational(row)
        wanted = data_utils.extract_prompt(row)
        for side, trace in (("chosen", chosen), ("rejected", rejected)):
            assert [{"role": m.role, "content": m.content} for m in trace.state_of(trace.steps[0])] == wanted["prompt"]
            assert [trace.action_of(s).content for s in trace.steps] == [m["content"] for m in wanted[side]]
