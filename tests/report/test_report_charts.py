"""Chart geometry and token cells against simple, independent calculations."""

from __future__ import annotations

import math
import re
import statistics

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from composer_plugins.report import catalogue, charts, tokens
from composer_plugins.report.html import duration, hide_secrets, split_lines, when
from composer_plugins.report.run_folder import TokenView

floats = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e100, max_value=1e100)


@example([-5e-324])
@example([1.6e-145, -5e-169])
@given(st.lists(floats, min_size=1, max_size=30))
def test_axes_enclose_the_values_and_have_a_few_ticks(values):
    low, high = charts.y_range(values)
    assert low < high and low <= min(values) and high >= max(values)
    ticks = charts.nice_ticks(low, high)
    assert 2 <= len(ticks) <= 5
    slack = 1e-6 * (high - low)
    assert all(low - slack <= t <= high + slack for t, _ in ticks)


def test_ticks_are_the_round_numbers_a_person_would_choose():
    assert [text for _, text in charts.nice_ticks(0, 1)] == ["0.00", "0.25", "0.50", "0.75", "1.00"]
    assert [text for _, text in charts.nice_ticks(0, 4.2)] == ["0", "2", "4"]
    assert [text for _, text in charts.nice_ticks(0, 2e-5)] == ["0", "5e-6", "1e-5", "1.5e-5", "2e-5"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (4.0, "4"), (0.042149, "0.04215"), (1234567.0, "1.23e6"), (1284.0, "1,284"), (12.3456, "12.35"),
     (3.1e-5, "3.1e-5"), (-0.5, "-0.5"), (float("nan"), "not a number"), (float("-inf"), "-∞"), (None, "–")],
)  # fmt: skip
def test_numbers_as_text(value, text):
    assert charts.number(value) == text


@given(st.lists(floats, min_size=301, max_size=2500))
def test_downsampling_keeps_both_extremes_and_the_order(values):
    points = list(enumerate(values))
    kept, bucket = charts.downsample(points)
    assert len(kept) <= charts.MAX_POINTS and bucket > 1
    assert set(kept) <= set(points) and [s for s, _ in kept] == sorted({s for s, _ in kept})
    assert max(v for _, v in kept) == max(values) and min(v for _, v in kept) == min(values)


def test_running_mean_equals_the_mean_of_each_window():
    points = [(i, float((i * 37) % 11)) for i in range(50)]
    for i, (step, value) in enumerate(charts.running_mean(points, 7)):
        window = [v for _, v in points[max(0, i - 3) : i + 4]]
        assert step == i and value == pytest.approx(statistics.fmean(window))


def chart(values, steps=None):
    steps = steps or list(range(1, len(values) + 1))
    return charts.build_chart("c", "t", "u", "a", steps, {"m": ("m", values)})


def test_a_path_goes_through_the_values():
    drawn = chart([0.0, 5.0, 10.0])
    low, high = drawn.y
    found = [tuple(map(float, p.split())) for p in re.findall(r"[ML]([-\d. ]+)", drawn.lines[0].path)]
    expected = [(x, 100 * (high - v) / (high - low)) for x, v in ((0, 0), (150, 5), (300, 10))]
    assert found == [pytest.approx(e, abs=0.06) for e in expected]


def test_unmeasured_steps_are_bridged_and_non_finite_ones_break_the_line():
    bridged, broken = chart([1.0, None, 3.0]), chart([1.0, math.nan, 3.0])
    assert bridged.lines[0].path.count("M") == 1 and bridged.marks == []
    assert broken.lines[0].path.count("M") == 2 and broken.marks == [150.0]
    assert (bridged.lines[0].unmeasured, broken.lines[0].gaps) == (1, [2])


def test_charts_without_a_number_say_why():
    assert "Not measured" in chart([None, None]).empty
    assert "finite" in chart([None, math.nan]).empty


def test_one_step_and_a_flat_line_have_an_axis():
    for values in ([0.25], [0.0, 0.0], [-3.0], [1e-320], [1e99]):
        drawn = chart(values)
        assert drawn.x[0] < drawn.x[1] and drawn.y[0] < drawn.y[1] and "nan" not in drawn.lines[0].path


def test_absurdly_large_values_are_marked_like_infinities():
    drawn = chart([1.0, 1e300, 2.0])
    assert drawn.lines[0].gaps == [2] and drawn.lines[0].high == 2.0


def test_groups_and_unknown_prefixes():
    names = [
        "zeta/x",
        "loss",
        "sdpo/new_thing",
        "sdpo/loss",
        "alpha/y",
        "policy/loss",
        "rewards/tool/mean",
        "other_thing",
    ]
    found = {group.key: members for group, members in catalogue.grouped(names)}
    assert list(found) == ["policy", "sdpo", "rollouts", "prefix:alpha", "prefix:zeta", "other"]
    assert found["sdpo"] == ["sdpo/loss", "sdpo/new_thing"] and found["other"] == ["loss", "other_thing"]
    assert sorted(n for members in found.values() for n in members) == sorted(names)


def view(divergence, mask=None, token_list=None):
    return TokenView(
        step=1, kind="rollout", state_id="s", hint="h", teacher="ema", level="full", divergence=divergence,
        mask=mask or [True] * len(divergence), tokens=token_list or ["x"] * len(divergence),
    )  # fmt: skip


def test_colour_steps_rise_with_nats_and_masked_tokens_have_none():
    v = view([0.0, 0.05, 0.2, 0.9, 2.0, 9.0, 9.0], mask=[True] * 6 + [False])
    scale = tokens.scale_of([v])
    assert scale.thresholds == (0.01, 0.03, 0.1, 0.3, 1.0, 3.0) and not scale.signed
    cells = tokens.show(v, 1, scale).cells
    assert [c.classes.split()[1] for c in cells] == ["k0", "k2", "k3", "k4", "k5", "k6", "off"]
    assert cells[3].title == "token 3: 0.9 nats" and cells[6].title == "token 6: no KL here"


def test_signed_values_use_the_other_hue():
    v = view([-2.0, 2.0, -0.0001])
    scale = tokens.scale_of([v])
    assert scale.signed and [c.classes.split()[1] for c in tokens.show(v, 1, scale).cells] == ["n6", "k6", "k0"]
    assert [css for css, _ in scale.legend()] == [f"n{i}" for i in range(6, 0, -1)] + [f"k{i}" for i in range(7)]


def test_a_divergence_that_is_not_finite_is_shown_as_such():
    v = view([None, 0.5])
    shown = tokens.show(v, 1, tokens.scale_of([v]))
    assert "bad" in shown.cells[0].classes and "not a finite" in shown.cells[0].title and shown.mean == 0.5


@pytest.mark.parametrize(
    ("token", "lead", "text", "newlines"),
    [(" a", "·", "a", 0), ("\n\n", "↵↵", "", 2), ("\tx y", "⇥", "x·y", 0), ("", "", "∅", 0), ("\x1b[0m", "", "␛[0m", 0),
     ("\u202eabc", "", "⟨U+202E⟩abc", 0), ("\u200b", "", "⟨U+200B⟩", 0), ("é", "", "é", 0), ("\ud83d", "", "⟨U+D83D⟩", 0)],
)  # fmt: skip
def test_whitespace_and_control_characters_are_visible(token, lead, text, newlines):
    v = view([0.1], token_list=[token])
    cell = tokens.show(v, 1, tokens.scale_of([v])).cells[0]
    assert (cell.lead, cell.text, cell.newlines) == (lead, text, newlines)


def test_special_tokens_are_marked():
    v = view([0.1] * 4, token_list=["<|im_end|>", "<tool_call>", "a<b", "</s>"])
    assert [" sp" in c.classes for c in tokens.show(v, 1, tokens.scale_of([v])).cells] == [True, True, False, True]


def test_a_very_long_action_is_cut_in_the_drawing_and_counted():
    v = view([0.1] * 1500)
    shown = tokens.show(v, 1, tokens.scale_of([v]))
    assert len(shown.cells) == tokens.MAX_TOKENS and shown.cells_left == 300 and len(shown.strip) <= 60


@given(st.text(max_size=600), st.integers(1, 8))
def test_folded_text_loses_nothing(text, limit):
    head, rest, left = split_lines(text, limit)
    assert head + rest == text or head + "\n" + rest == text
    assert (left == 0) == (rest == "" and head == text)


def test_long_messages_keep_both_ends_and_say_how_much_is_left_out():
    text, left = tokens.shorten("a" * 5000 + "END")
    assert left == 1003 and text.endswith("END") and "1,003 characters not shown" in text
    assert tokens.shorten("short") == ("short", 0)


def test_times():
    assert when("2026-06-02T14:31:09+00:00") == "2026-06-02 14:31 UTC"
    assert when("2026-06-02T14:31:09") == "2026-06-02 14:31" and when("yesterday <b>") == "yesterday <b>"


def test_durations():
    assert [duration(s) for s in (0.42, 48, 372.4, 11040, None, math.nan)] == [
        "0.4 s",
        "48 s",
        "6 min 12 s",
        "3 h 04 min",
        "",
        "",
    ]


def test_secrets_of_the_recipe_are_hidden_and_nothing_else():
    recipe = "hub_token: hf_abc\nteachers:\n- api_key: 'sk-1'\n  api_key_env: OPENAI_API_KEY\neos_token: <|im_end|>\nPASSWORD: x y\nhf_token: null\n"
    assert hide_secrets(recipe) == (
        "hub_token: (hidden)\nteachers:\n- api_key: (hidden)\n  api_key_env: OPENAI_API_KEY\neos_token: <|im_end|>\n"
        "PASSWORD: (hidden)\nhf_token: null\n"
    )
