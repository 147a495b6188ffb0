"""verl's own generation dumps; written by verl's own function where verl is installed, else by the same lines."""

import importlib.util
import json

import pytest

from composer_plugins.traces.ingest import ingest
from composer_plugins.traces.schema import Trace
from composer_plugins.traces.store import read_stage
from composer_plugins.traces.verl_rollouts import READER

CALL = '<tool_call>\n{"name": "read_file", "arguments": {"path": "a.py"}}\n</tool_call>'
ROWS = {
    "inputs": ["system\nYou edit.\nuser\nFix it.\nassistant\n"] * 4,
    "outputs": ["I fix it.", CALL, f"{CALL}\nuser\n<tool_response>\nx\n</tool_response>\nassistant\nDone.", "ü" * 9],
    "gts": ["42", None, None, {"tests": ["a"]}],
    "scores": [1.0, 0.0, 0.5, float("nan")],
}


@pytest.fixture
def dump(tmp_path):
    """A dump of step 3, as training writes it."""
    extra = {"uid": ["u_0_0", "u_1_0", "v_0_0", "v_1_0"]}
    if importlib.util.find_spec("verl") is not None:
        from verl.trainer.ppo.v1.trainer_base import PPOTrainer

        PPOTrainer._write_generations(*ROWS.values(), extra, str(tmp_path / "dumps"), 3)
        return tmp_path / "dumps" / "3.jsonl"
    path = tmp_path / "dumps" / "3.jsonl"
    path.parent.mkdir()
    with path.open("w") as file:
        for row in zip(*ROWS.values(), *extra.values(), strict=True):
            values = dict(zip(["input", "output", "gts", "score", "uid"], row, strict=True)) | {"step": 3}
            order = ["input", "output", "gts", "score", "step", "uid"]
            file.write(json.dumps({key: values[key] for key in order}, ensure_ascii=False) + "\n")
    return path


def test_every_rollout_becomes_a_trace_with_its_reward(dump, tmp_path):
    report = ingest([dump], tmp_path / "traces.jsonl")
    assert (report.manifest.read, report.manifest.used, report.manifest.skipped) == (4, 4, {})
    traces = list(read_stage(tmp_path / "traces.jsonl", Trace))
    assert [(t.id, t.format, t.reward) for t in traces] == [
        ("u_0_0", "verl", 1.0), ("u_1_0", "verl", 0.0), ("v_0_0", "verl", 0.5), ("v_1_0", "verl", None),
    ]  # fmt: skip
    assert [[m.role for m in t.messages] for t in traces] == [["user", "assistant"]] * 4
    assert traces[0].messages[0].content == ROWS["inputs"][0] and traces[0].messages[1].content == "I fix it."
    assert traces[0].extra["fields"] == {"gts": "42", "step": 3, "uid": "u_0_0"}
    assert all(t.steps[0].inexact == ["text_completion"] for t in traces)


def test_a_call_is_a_call_and_turns_that_cannot_be_told_apart_are_not_trained_on(dump, tmp_path):
    ingest([dump], tmp_path / "traces.jsonl")
    steps = [t.steps[0] for t in read_stage(tmp_path / "traces.jsonl", Trace)]
    traces = list(read_stage(tmp_path / "traces.jsonl", Trace))
    assert traces[1].messages[1].tool_calls[0].arguments == {"path": "a.py"}
    assert [s.not_trainable_reason for s in steps] == [None, None, "turns_in_one_text", None]


def test_what_is_no_dump_is_left_to_others_and_damage_is_counted(dump, tmp_path):
    good = dump.read_bytes().splitlines()[0]
    assert READER.sniff(good + b"\n") and READER.sniff(good[:40])
    for other in (b'{"input": "x", "output": "y"}\n', b'{"messages": []}\n', b"", b'{"input": "cut\n{}\n'):
        assert not READER.sniff(other), other
    damaged = tmp_path / "4.jsonl"
    damaged.write_bytes(
        good + b'\n{"input": 3, "output": "x", "gts": null, "score": 0, "step": 4}\n' + good[:30] + b"\n"
    )
    report = ingest([damaged], tmp_path / "damaged.jsonl", allow_damaged=True)
    assert (report.manifest.read, report.manifest.used) == (3, 1)
    assert report.manifest.skipped == {"malformed_record": 1, "cut_or_not_json": 1}
