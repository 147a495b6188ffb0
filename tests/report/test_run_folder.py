"""The run folder: what the writer puts down, the reader finds again; damage is named, never swallowed."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from composer_plugins.errors import ConfigError, TraceError
from composer_plugins.report.reader import read_metrics, read_run
from composer_plugins.report.run_folder import RunSummary, RunWriter, StageCount, TokenView
from composer_plugins.traces.store import Manifest


def view(**changes) -> TokenView:
    fields = {
        "step": 1, "kind": "recorded", "state_id": "s", "tokens": ["a", "b"], "divergence": [0.5, 0.1],
        "mask": [True, False], "hint": "h", "teacher": "ema", "level": "full",
    }  # fmt: skip
    return TokenView(**{**fields, **changes})


def test_round_trip(tmp_path):
    with RunWriter(tmp_path) as writer:
        writer.metrics(1, {"loss": 0.5, "sdpo/grad_norm": None}, seconds=2.0)
        writer.metrics(2, {"loss": float("nan"), "reward": float("-inf")}, seconds=4.5)
        writer.token_view(view(reward=0.25, source_ref="log.jsonl:7"))
        writer.recipe({"a": {"path": tmp_path, "n": 1}})
        writer.summary(RunSummary(name="r", counts={"pairs": 3}))
    run = read_run(tmp_path)
    assert run.metrics.steps == [1, 2] and run.metrics.seconds == [2.0, 4.5]
    assert run.metrics.series["sdpo/grad_norm"] == [None, None]
    assert run.metrics.series["loss"][0] == 0.5 and math.isnan(run.metrics.series["loss"][1])
    assert run.metrics.series["reward"] == [None, -math.inf]
    assert run.views == [view(reward=0.25, source_ref="log.jsonl:7")]
    assert run.recipe == {"a": {"path": str(tmp_path), "n": 1}}
    assert run.summary.counts == {"pairs": 3} and run.problems == []


def test_every_line_is_strict_json_and_on_disk_at_once(tmp_path):
    writer = RunWriter(tmp_path)
    writer.metrics(1, {"loss": float("nan"), "big": float("inf")})
    line = (tmp_path / "metrics.jsonl").read_text()

    def refuse(text):
        raise AssertionError(f"not JSON: {text}")

    assert json.loads(line, parse_constant=refuse)["loss"] == "NaN" and line.endswith("\n")
    writer.close()


def test_values_of_arrays_and_tensors_become_numbers(tmp_path):
    numpy = pytest.importorskip("numpy")
    with RunWriter(tmp_path) as writer:
        writer.metrics(1, {"a": numpy.float32(0.5), "b": numpy.int64(3), "c": True, "d": numpy.array(2.5)})
    assert {k: v[0] for k, v in read_run(tmp_path).metrics.series.items()} == {"a": 0.5, "b": 3, "c": 1, "d": 2.5}


@pytest.mark.parametrize("values", [{"step": 3}, {"time": 1.0}, {"loss": "high"}, {"loss": [1, 2]}])
def test_a_metric_that_is_no_number_or_takes_a_reserved_name_is_refused(tmp_path, values):
    with RunWriter(tmp_path) as writer, pytest.raises(ConfigError, match=next(iter(values))):
        writer.metrics(1, values)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_lists_of_different_length_are_refused(tmp_path):
    with RunWriter(tmp_path) as writer, pytest.raises(ConfigError, match="2 tokens, 1 divergences, 2 mask"):
        writer.token_view(view(divergence=[0.1]))


def test_half_a_surrogate_pair_is_written_as_a_replacement(tmp_path):
    with RunWriter(tmp_path) as writer:
        writer.metrics(1, {"loss": 1.0})
        writer.token_view(view(hint="cut \ud83d here", tokens=["\udc00", "b"]))
        writer.recipe({"note": "x \ud83d"})
        writer.summary(RunSummary(name="n \ud83d"))
    run = read_run(tmp_path)
    assert run.views[0].hint == "cut ? here" and run.summary.name == "n ?" and run.problems == []


def test_an_existing_run_is_refused_appended_to_or_replaced(tmp_path):
    with RunWriter(tmp_path) as writer:
        writer.metrics(1, {"loss": 1.0})
        writer.summary(RunSummary(name="first"))
    with pytest.raises(ConfigError, match="already holds a run"):
        RunWriter(tmp_path)
    with RunWriter(tmp_path, existing="append") as writer:
        assert not (tmp_path / "summary.json").exists()  # unfinished again
        writer.metrics(2, {"loss": 0.5})
    assert read_run(tmp_path).metrics.steps == [1, 2]
    with RunWriter(tmp_path, existing="replace") as writer:
        writer.metrics(1, {"loss": 9.0})
    assert read_run(tmp_path).metrics.series == {"loss": [9.0]}


def test_appending_after_a_torn_line_keeps_the_new_line_whole(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    with RunWriter(tmp_path, existing="append") as writer:
        writer.metrics(2, {"loss": 0.5})
    run = read_run(tmp_path)
    assert run.metrics.series["loss"] == [1.0, 0.5]
    assert any("line 2 is damaged" in p for p in run.problems)


def test_a_torn_last_line_is_tolerated_and_reported(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.')
    (tmp_path / "token_views.jsonl").write_text('{"step": 1, "kind": "rec')
    run = read_run(tmp_path)
    assert run.metrics.steps == [1] and run.views == []
    assert [p for p in run.problems if "cut off" in p and "line 2" in p]
    assert [p for p in run.problems if p.startswith("token_views.jsonl, line 1 is cut off")]


def test_damage_in_the_middle_is_named_and_the_rest_is_kept(tmp_path):
    lines = [
        b'{"step": 1, "loss": 1}',
        b"\xff\xfe",
        b"[1]",
        b'{"loss": 2}',
        b'{"step": "x"}',
        b'{"step": 3, "loss": {}, "n": NaN}',
    ]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    problems: list[str] = []
    metrics = read_metrics(tmp_path / "metrics.jsonl", problems)
    assert metrics.steps == [1, 3] and metrics.series["loss"] == [1.0, None]
    assert math.isnan(metrics.series["n"][1])
    assert [sum(f"line {n}" in p for p in problems) for n in (2, 3, 4, 5, 6)] == [1, 1, 1, 1, 1]


def test_many_problems_are_counted_not_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + "junk\n" * 50)
    problems: list[str] = []
    read_metrics(tmp_path / "metrics.jsonl", problems)
    assert problems[-1] == "metrics.jsonl: 42 more lines with problems." and len(problems) == 9


def test_a_step_written_twice_keeps_the_later_value_and_says_so(tmp_path):
    lines = [{"step": 2, "loss": 5}, {"step": 1, "loss": 1}, {"step": 2, "loss": 2}, {"step": 2, "extra": 7}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    problems: list[str] = []
    metrics = read_metrics(tmp_path / "metrics.jsonl", problems)
    assert (metrics.steps, metrics.series) == ([1, 2], {"loss": [1, 2], "extra": [None, 7]})
    assert len(problems) == 1 and "1 steps were written more than once" in problems[0]


@pytest.mark.parametrize("content", ["", "\n\n", "junk\n", '{"step": 1'])
def test_metrics_without_a_usable_line_are_an_error(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(TraceError, match="no usable line"):
        read_run(tmp_path)


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(TraceError, match="no such folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(TraceError, match=r"metrics\.jsonl"):
        read_run(tmp_path)


def test_damaged_side_files_are_problems_not_errors(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n')
    (tmp_path / "summary.json").write_text('{"name": 3}')
    (tmp_path / "recipe.yaml").write_text("a: [1")
    bad = '{"step":1,"kind":"recorded","state_id":"s","tokens":["a"],"divergence":[],"mask":[true],"hint":"","teacher":"","level":""}'
    (tmp_path / "token_views.jsonl").write_text(bad + "\n")
    run = read_run(tmp_path)
    assert run.summary is None and run.recipe is None and run.recipe_text == "a: [1" and run.views_total == 0
    assert [p.split(" ")[0].rstrip(",") for p in run.problems] == ["token_views.jsonl", "recipe.yaml", "summary.json"]


def test_the_most_divergent_views_are_kept_in_order(tmp_path):
    with RunWriter(tmp_path) as writer:
        writer.metrics(1, {"loss": 1.0})
        for i, value in enumerate([0.1, 0.9, 0.4, -0.9, 0.2]):
            writer.token_view(view(state_id=f"s{i}", divergence=[value, 50.0]))  # 50.0 lies outside the mask
    run = read_run(tmp_path, max_views=3)
    assert [v.state_id for v in run.views] == ["s1", "s3", "s2"]
    assert run.views_total == 5 and run.views_by_kind == {"recorded": 5}


def test_mean_divergence_ignores_what_is_not_finite():
    assert view(divergence=[None, 3.0]).mean_divergence() == 0.0
    assert view(divergence=[-0.5, 1.5], mask=[True, True]).mean_divergence() == 1.0


def test_stage_counts_come_from_manifests():
    manifest = Manifest(stage="pairs", record="Pair", written=2, read=5, used=2, skipped={"alike": 3})
    assert StageCount.of(manifest) == StageCount(stage="pairs", written=2, read=5, used=2, skipped={"alike": 3})


def test_writing_and_reading_load_no_torch():
    code = "import sys, composer_plugins.report.html, composer_plugins.cli.report; print({'torch', 'trl', 'transformers'} & set(sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "set()"
    )
