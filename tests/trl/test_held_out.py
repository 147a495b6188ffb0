"""The held-out experiment: its data, its bookkeeping and (slow) a shortened run of it."""

import json
import statistics
import sys
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # `benchmarks` is not installed

HELD_OUT = ROOT / "benchmarks" / "held_out"


@pytest.fixture(scope="module")
def words():
    from benchmarks.held_out.base_model import make_tokenizer

    return make_tokenizer()


def test_parts_share_no_string():
    from benchmarks.held_out.task import OPERATIONS, calls, strings

    parts = {part: set(strings(part)) for part in ("pretraining", "train", "held_out")}
    assert all(len(s) > 5000 for s in parts.values())
    assert all(not a & b for a, b in combinations(parts.values(), 2))
    for part, seed in (("train", 3), ("held_out", 4)):
        assert {digits for _, digits in calls(part, 30, seed)} <= parts[part]
    # on every string an answer tells which operation was followed
    assert all(len({f(s) for f in OPERATIONS.values()}) == len(OPERATIONS) for s in parts["held_out"])


def test_seeds_differ_and_every_operation_is_meant_by_two_names():
    from benchmarks.held_out.task import OPERATIONS, make_task

    tasks = [make_task(seed) for seed in (1, 2)]
    assert tasks[0].meaning != tasks[1].meaning
    for task in tasks:
        assert sorted(task.meaning.values()) == sorted(list(OPERATIONS) * 2)
        assert all(abs(sum(prior.values()) - 1) < 1e-12 for prior in task.prior.values())
        sure = [task.prior[name][task.meaning[name]] for name in task.prior]
        assert 0.1 < statistics.fmean(sure) < 0.7


def test_tokenizer_knows_every_text_and_writes_answers_back(words):
    from benchmarks.held_out.base_model import Contexts
    from benchmarks.held_out.task import CALL_LENGTH, INFORMATIVE, NAMES, OPERATIONS, UNINFORMATIVE, completion

    contexts = Contexts(words)
    for name in NAMES:
        for message in [
            None,
            UNINFORMATIVE.format(name=name),
            *(INFORMATIVE.format(name=name, operation=o) for o in OPERATIONS),
        ]:
            assert words.unk_token_id not in contexts.ids(name, "01234", message)
    for operation in OPERATIONS:
        text = completion(operation, "56789")
        ids = words(text)["input_ids"]
        assert words.decode(ids) == text and len(ids) == CALL_LENGTH - 1


def test_answers_of_the_operations():
    from benchmarks.held_out.task import completion

    expected = {
        "reverse": "1 0 9 4 7", "left": "4 9 0 1 7", "right": "1 7 4 9 0", "ends": "1 4 9 0 7", "up": "8 5 0 1 2",
        "down": "6 3 8 9 0",
    }  # fmt: skip
    assert {op: completion(op, "74901") for op in expected} == {op: f"{op} {digits}" for op, digits in expected.items()}


def test_pretraining_follows_the_hint_else_the_prior(words):
    """A hint's batch follows the hint, whatever the name means; a bare batch follows the prior's frequencies."""
    from benchmarks.held_out.base_model import Contexts, PretrainingData
    from benchmarks.held_out.task import CALL_LENGTH, OPERATIONS, completion, make_task, part_of

    task = make_task(7)
    data = PretrainingData(task, Contexts(words), seed=0)
    counts = {True: 0, False: 0}
    hinted = rightly = 0
    for _ in range(120):
        ids, context = data.batch(32)
        for row in ids.tolist():
            texts = words.convert_ids_to_tokens(row)
            name, digits = texts[2], "".join(texts[3:8])
            answer = words.decode(row[context:], skip_special_tokens=True)
            assert part_of(digits) == "pretraining" and len(row) - context == CALL_LENGTH
            assert answer == completion(texts[context], digits)
            told = [op for op in OPERATIONS if op in texts[8:context]]
            if told:
                assert texts[context] == told[0]
                hinted, rightly = hinted + 1, rightly + (told[0] == task.meaning[name])
            else:
                counts[texts[context] == task.meaning[name]] += 1
    assert counts[True] / sum(counts.values()) == pytest.approx(1 / 3, abs=0.04)  # mean of 0.70, 0.25 and 0.05
    assert rightly / hinted == pytest.approx(1 / 6, abs=0.04)  # hints carry no knowledge of the meaning


def test_self_teacher_reads_the_layout_of_pretraining(words, monkeypatch):
    """What the trainer splices in for a failed completion is what the base model was pre-trained on."""
    from composer_trl.hint_sources import HintSources

    from benchmarks.held_out import arms
    from benchmarks.held_out.base_model import Contexts, make_model
    from benchmarks.held_out.task import INFORMATIVE, make_task

    seen = []
    original = HintSources.turns

    def spy(self, inputs, rollout):
        result = original(self, inputs, rollout)
        seen.extend((row, turn) for row, turns in zip(inputs, result, strict=True) for turn in turns)
        return result

    monkeypatch.setattr(HintSources, "turns", spy)
    task, training = make_task(1), arms.Training(steps=1, prompts=2, group=4)
    model = make_model(words, 0)  # random weights: every completion fails
    steps = []
    totals = arms.train(model, words, task, arms.ARMS["grpo_sdpo"], training, seed=1, on_step=steps.append)
    assert steps == [1] and totals == {"rollouts": 8, "hinted_turns": 8} and len(seen) == 8
    for row, turn in seen:
        message = INFORMATIVE.format(name=row["name"], operation=task.meaning[row["name"]])
        hint = f"Feedback on an earlier attempt at this task:\n{message}"
        chat = [*row["prompt"], {"role": "user", "content": hint}]
        rendered = words.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert turn.prefix_ids == list(rendered) == Contexts(words).ids(row["name"], row["digits"], message)


def test_arms_differ_only_in_what_they_name(words):
    """GRPO never sees the error messages; the controls' messages do not say what the name means."""
    from benchmarks.held_out.arms import ARMS, Training, composer_section, make_reward
    from benchmarks.held_out.task import OPERATIONS, make_task

    assert composer_section(ARMS["grpo"], Training())["sdpo"]["weight"] == 0
    assert composer_section(ARMS["sdpo"], Training())["policy"]["weight"] == 0
    task = make_task(1)
    names = list(task.meaning) * 50
    right = task.answer(names[0], "13579")
    completions = [[{"role": "assistant", "content": right}], *[[{"content": "left"}]] * (len(names) - 1)]
    logged = {}
    for feedback in ("informative", "uninformative", "random"):
        reward = make_reward(task, feedback, seed=0)
        rewards = reward(completions, names, ["13579"] * len(names), lambda key, v, f=feedback: logged.update({f: v}))
        assert rewards == [1.0] + [0.0] * (len(names) - 1)
        assert logged[feedback][0] is None and all(logged[feedback][1:])
    told = {
        f: [m.split()[-1] == task.meaning[n] for m, n in zip(v[1:], names[1:], strict=True)] for f, v in logged.items()
    }
    assert all(told["informative"])
    assert statistics.fmean(told["random"]) == pytest.approx(1 / 6, abs=0.05)
    assert not any(op in m.split() for m in logged["uninformative"][1:] for op in OPERATIONS)


def test_interval_against_mpmath():
    import mpmath

    from benchmarks.held_out.measure import T_95, interval

    for df, quantile in enumerate(T_95, start=1):
        # two-sided tail of Student's t as a regularised incomplete beta function
        tail = mpmath.betainc(df / 2, 0.5, 0, df / (df + quantile**2), regularized=True)
        assert float(tail) == pytest.approx(0.05, abs=2e-5)
    mean, half = interval([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3) and half == pytest.approx(4.3027 * (7 / 3) ** 0.5 / 3**0.5, rel=1e-4)
    with pytest.raises(ValueError, match="2 to 20"):
        interval([1.0])


@pytest.mark.parametrize("page, numbers", [("README.md", "results.json"), ("FOLLOW_UP.md", "results_follow_up.json")])
def test_recorded_tables_are_those_of_the_recorded_numbers(page, numbers):
    from benchmarks.held_out.report import END, START, render

    results = json.loads((HELD_OUT / numbers).read_text())
    section = (HELD_OUT / page).read_text().partition(START)[2].partition(END)[0]
    assert section.strip() == render(results).strip()
    assert len(results["seeds"]) >= 5
    for arm, runs in results["runs"].items():
        assert {run["rollouts"] for run in runs.values()} == {0 if arm == "none" else results["rollouts"]}


def test_command_line_refuses_what_cannot_be_reported(capsys):
    from benchmarks.held_out.run import parse

    for bad in (["--seeds", "1"], ["--arms", "none", "sdpo"], ["--steps", "3"], ["--jobs", "0"]):
        with pytest.raises(SystemExit) as stopped:
            parse(bad)
        assert stopped.value.code == 2 and "must" in capsys.readouterr().err


@pytest.mark.slow
def test_shortened_experiment(tmp_path):
    """One seed that the recorded table does not hold, half the steps: base, hint, learning, control, determinism."""
    from benchmarks.held_out.arms import Training
    from benchmarks.held_out.run import Settings, make_base, run_arm

    settings = Settings(training=Training(steps=30), curve=2)
    base = make_base(1001, settings, tmp_path)
    for mode in ("greedy", "sampled"):
        assert 0.1 <= base["none"][mode] <= 0.7
        assert base["informative"][mode] > base["none"][mode] + 0.3
        assert base["random"][mode] < base["informative"][mode] - 0.3
    runs = {arm: run_arm(1001, arm, settings, tmp_path) for arm in ("grpo", "sdpo", "grpo_sdpo", "grpo_sdpo_random")}
    assert {run["rollouts"] for run in runs.values()} == {30 * 64}
    assert runs["grpo"]["hinted_turns"] == 0 < runs["sdpo"]["hinted_turns"]
    final = {arm: run["final"]["sampled"] for arm, run in runs.items()}
    assert final["grpo"] > base["none"]["sampled"] + 0.1  # held-out prompts: what is learned is no memory of strings
    assert final["sdpo"] > base["none"]["sampled"] + 0.1
    assert final["grpo_sdpo"] > final["grpo_sdpo_random"] + 0.05  # the gain comes from what the hint says
    again = run_arm(1001, "grpo_sdpo", settings, tmp_path)
    assert again["curve"] == runs["grpo_sdpo"]["curve"]
