"""Channel 2 on verl without Ray: hints at the turns of verl's real tool agent loop, fields, and the loss."""

import asyncio
import importlib.util
import os
from collections import Counter
from types import SimpleNamespace

import pytest

os.environ.setdefault("COMPOSER_MODEL_SOURCE", "wheel")
if importlib.util.find_spec("verl") is None:
    pytest.skip(
        "verl is not installed: it needs an environment of its own (docs/how-to/verl.md)", allow_module_level=True
    )

import numpy as np
import torch
from composer_verl.error_turns import Attempt, HintedTurn, HintSources, classify
from composer_verl.fields import SDPO_MASK, SDPO_TEACHER, SDPO_TOKENS
from composer_verl.hinted_rows import attempts_of, mini_batch_of, said_about, sdpo_fields
from composer_verl.rollout_rows import RolloutRow, rows_of
from composer_verl.rollouts import plain_value
from composer_verl.teachers import deal, hinted_batch
from composer_verl.turns import TurnReader

from composer_plugins.config import SDPOConfig, parse_section
from composer_plugins.errors import ModelError
from composer_plugins.hints.turns import FEEDBACK_HINT, SIBLING_HINT
from composer_plugins.traces.schema import Status

model = pytest.mark.model
TOOLS = '''
from verl.tools.function_tool import function_tool

@function_tool
def read_file(path: str) -> str:
    """Read a file.

    Args:
        path: the file.
    """
    if path == "missing.py":
        raise FileNotFoundError(2, "No such file or directory", path)
    return f"content of {path}"
'''
PROMPT = [{"role": "system", "content": "You edit files."}, {"role": "user", "content": "Fix the bug."}]


def call(path, tool="read_file"):
    return f'<tool_call>\n{{"name": "{tool}", "arguments": {{"path": "{path}"}}}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer():
    from composer_plugins.models.tokenizer import load_tokenizer
    from composer_plugins.models.toolcalls import install_tool_template

    return install_tool_template(load_tokenizer("smollm2-135m-instruct"))


@pytest.fixture(scope="module")
def loop(tokenizer, tmp_path_factory):
    """verl's own ToolAgentLoop on scripted answers; returns the row as verl stores it, and what it rendered."""
    from pathlib import Path

    from composer_verl.host import compose
    from verl.experimental.agent_loop.agent_loop import DictConfigWrap, ToolListWrap
    from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop
    from verl.tools.tool_registry import load_all_tools
    from verl.utils.dataset.rl_dataset import RLHFDataset
    from verl.utils.tensordict_utils import list_of_dict_to_tensordict
    from verl.workers.rollout.replica import TokenOutput

    path = tmp_path_factory.mktemp("tools") / "tools.py"
    path.write_text(TOOLS)
    recipe = Path(__file__).parents[2] / "recipes" / "verl" / "composer_policy.yaml"
    turns = "actor_rollout_ref.rollout.multi_turn"
    config = compose(recipe, [f"{turns}.function_tool_path={path}", f"{turns}.max_parallel_calls=2"])
    tools = load_all_tools(None, str(path))

    def run(*answers, info=None, **columns):
        scripted = iter([tokenizer.encode(a + "<|im_end|>", add_special_tokens=False) for a in answers])
        seen = []

        class Server:
            async def generate(self, prompt_ids, **_):
                seen.append(list(prompt_ids))
                return TokenOutput(token_ids=next(scripted), stop_reason="completed", extra_fields={})

        async def go():
            made = ToolAgentLoop(
                trainer_config=DictConfigWrap(config), server_manager=Server(), tokenizer=tokenizer, processor=None,
                dataset_cls=RLHFDataset, data_config=DictConfigWrap(config.data), hf_model_type="llama",
                tools=ToolListWrap(tools),
            )  # fmt: skip
            run.builder = made.continuous_token_builder
            return await made.run({}, raw_prompt=PROMPT)

        output = asyncio.run(go())
        output.reward_score = 0.0
        fields = output.as_dict()
        fields["extra_fields"]["reward_extra_info"] = info or {}
        fields |= {"loss_mask": fields["response_mask"], "raw_prompt": PROMPT, "uid": "u", **columns}
        data = list_of_dict_to_tensordict([fields])
        attempts = attempts_of(rows_of(SimpleNamespace(keys=["u_0_0"], tags=[{}]), data), data)
        return attempts[0], seen

    run.schemas = [t.tool_schema.model_dump(exclude_unset=True, exclude_none=True) for t in tools]
    return run


@pytest.fixture
def sources(tokenizer, loop):
    def build(max_tokens=4096, **options):
        hint = {"sources": ["recorded", "rollout", "feedback"], **options.pop("hint", {})}
        reader = TurnReader(loop.builder, tools=loop.schemas)
        return HintSources(SDPOConfig(weight=1, hint=hint, **options), tokenizer, reader, max_tokens=max_tokens)

    return build


@model
def test_the_hint_lands_at_the_turn_whose_call_failed(loop, sources, tokenizer):
    attempt, seen = loop(call("a.py"), f"Now b.\n{call('missing.py')}", "Done.")
    found = sources()
    (turn,) = found.turns([attempt])
    ids = attempt.row.response_ids
    assert tokenizer.decode(ids[turn.start : turn.end]) == f"Now b.\n{call('missing.py')}<|im_end|>"
    assert turn.kind == "rollout" and turn.error_class == "file_not_found" and all(turn.mask)
    assert found.counts["error_turns"] == found.counts["hinted_turns"] == 1
    # without the hint's message it is what the engine was given when it sampled that turn; the hint stands right before
    text, before = tokenizer.decode(turn.prefix_ids), tokenizer.decode(seen[1])
    message = f"<|im_start|>user\n{turn.hint}<|im_end|>\n"
    assert "issing.py" in turn.hint and text.count(message) == 1
    assert text.replace(message, "") == before and text.endswith(f"{message}<|im_start|>assistant\n")


@model
def test_several_errors_of_one_rollout_and_two_results_of_one_turn(loop, sources, tokenizer):
    attempt, seen = loop(call("a.py") + "\n" + call("missing.py"), call("x", "wrong_tool"), "Done.")
    turns = sources().turns([attempt])
    assert [t.error_class for t in turns] == ["file_not_found", "unknown_tool"]
    for turn, prompt in zip(turns, seen, strict=False):
        hint = sources().splicer.block(turn.hint)
        size = len(sources().splicer.generation_prompt)
        assert turn.prefix_ids == [*prompt[:-size], *hint]


@model
def test_good_results_and_single_turns_have_no_hint(loop, sources):
    attempt, _ = loop(call("a.py"), "Done.")
    assert sources().turns([attempt]) == []
    attempt, _ = loop("Done.")
    assert sources().turns([attempt]) == []


@model
def test_what_the_reward_function_and_the_dataset_say(loop, sources, tokenizer):
    said, _ = loop("Done.", info={"score": 0.0, "feedback": "two tests fail"})
    (turn,) = sources().turns([said])
    assert (turn.kind, turn.start, turn.end) == ("feedback", 0, len(said.row.response_ids))
    assert turn.hint == FEEDBACK_HINT.format(feedback="two tests fail")
    advised, _ = loop("Done.", info={"feedback": "two tests fail", "hint": "run the tests first"})
    assert sources().turns([advised])[0].hint == "run the tests first"
    recorded, _ = loop(call("a.py"), "Done.", extra_info={"hint": "look before you leap", "error_class": "tool_error"})
    (turn,) = sources().turns([recorded])
    assert (turn.kind, turn.hint, turn.start) == ("recorded", "look before you leap", 0)
    assert turn.end < len(recorded.row.response_ids)  # the recorded state's own turn, not the whole rollout
    assert sources(hint={"sources": ["rollout"]}).turns([said, recorded]) == []


@model
def test_scope_completion_goes_to_the_end_without_tool_tokens(loop, sources):
    attempt, _ = loop(call("missing.py"), "Done.")
    (turn,) = sources(scope="completion").turns([attempt])
    assert (turn.start, turn.end) == (0, len(attempt.row.response_ids))
    assert turn.mask == [bool(m) for m in attempt.row.mask] and not all(turn.mask)


@model
def test_what_cannot_be_used_is_counted(loop, sources):
    attempt, _ = loop(call("missing.py"), "Done.")
    short = sources(max_tokens=20)
    assert short.turns([attempt]) == [] and short.counts["too_long"] == 1
    rejected = Attempt(attempt.row, attempt.said, [False] * len(attempt.row.response_ids))
    found = sources()
    assert found.turns([rejected]) == [] and found.counts["rejected"] == 1
    attempt.row.prompt_ids = attempt.row.prompt_ids[:-1]  # cut: no generation prompt at its end
    found = sources()
    assert found.turns([attempt]) == [] and found.counts["unplaced"] == 1 and "generation prompt" in found.unplaced_why


@model
@pytest.mark.parametrize("placement", ["leading_system", "last_user"])
def test_other_placements_render_the_prompt_again_and_keep_the_rest(loop, sources, tokenizer, placement):
    attempt, seen = loop(call("a.py"), call("missing.py"), "Done.")
    (turn,) = sources(hint={"placement": placement}).turns([attempt])
    text = tokenizer.decode(turn.prefix_ids)
    assert text.index(turn.hint) < text.index("<|im_start|>assistant")
    assert text.replace(f"\n\n{turn.hint}", "") == tokenizer.decode(seen[1])
    attempt.row.prompt_ids = attempt.row.prompt_ids[3:]
    found = sources(hint={"placement": placement})
    assert found.turns([attempt]) == [] and "rendered again differs" in found.unplaced_why


@model
def test_a_successful_sibling_of_the_same_group(loop, sources, tokenizer):
    def attempt(key, reward):
        found, _ = loop(f"Answer {key}.")
        found.row.key, found.row.reward = key, reward
        return found

    group = [attempt("a_0_0", 0.0), attempt("a_1_0", 1.0), attempt("b_0_0", 0.0)]
    (turn,) = sources(hint={"sources": ["sibling"]}).turns(group)
    assert turn.attempt == 0 and "Answer a_1_0." in turn.hint


def outputs(rewards, texts, **said):
    """Attempts by key `{uid}_{session}_{output}`, without a tokenizer: the ids of a text are its characters."""
    found = []
    for key, text in texts.items():
        ids = [ord(c) for c in text]
        row = RolloutRow(key, {}, [1], ids, [1] * len(ids), rewards[key.rsplit("_", 1)[0]], [])
        found.append(Attempt(row, dict(said)))
    return found


@pytest.fixture
def bare_sources():
    """Hint sources whose self-teacher reads the hint as characters; no model, no chat template."""

    def build(source):
        found = HintSources.__new__(HintSources)
        found.config = SDPOConfig(weight=1, hint={"sources": [source]})
        found.sources, found.counts, found.max_tokens = {source}, Counter(), 10_000
        found.tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: "".join(map(chr, ids)))
        found.splicer = SimpleNamespace(splice=lambda ids, hint: [*ids, *map(ord, hint)])
        return found

    return build


def test_a_recorded_hint_is_for_the_first_action_of_a_session_not_of_each_of_its_outputs(bare_sources):
    """verl makes one row per output of an agent loop and gives the columns of the dataset's row to each."""
    texts = {"a_0_1": "second", "a_0_0": "first", "a_1_0": "other", "a_1_1": "its second"}
    turns = bare_sources("recorded").turns(outputs({"a_0": 0.0, "a_1": 0.0}, texts, hint="look"))
    assert [turn.attempt for turn in turns] == [1, 2]


def test_the_last_output_of_a_successful_session_is_its_solution(bare_sources):
    """verl copies the final reward to all outputs of a session, and balancing puts rows into any order."""
    rewards = {"a_0": 0.0, "a_1": 1.0, "a_2": 1.0}
    texts = {"a_2_0": "third", "a_1_0": "a plan", "a_0_0": "failed", "a_1_10": "the solution", "a_1_2": "a step"}
    (turn,) = bare_sources("sibling").turns(outputs(rewards, texts))
    assert turn.attempt == 2 and turn.hint == SIBLING_HINT.format(solution="the solution")


def test_texts_that_come_as_numpy_strings_are_texts():
    """A colocated reward function's columns: `np.str_` has a `data` of its own, a view of its bytes."""
    import torch
    from tensordict import NonTensorData

    texts = np.array(["two tests fail", ""])
    said = {"feedback": list(texts), "hint": [NonTensorData("a"), NonTensorData("")], "extra_info": [{}, {}],
            "reward_model": [np.str_("r"), np.array([1, 2])]}  # fmt: skip
    tensors = {name: torch.tensor([[1], [1]]) for name in ("prompts", "responses", "response_mask", "rm_scores")}
    rows = rows_of(SimpleNamespace(keys=["a_0_0", "a_1_0"], tags=[{}, {}]), {**tensors, **said})
    assert type(rows[0].columns["reward_model"]) is str and rows[1].columns["reward_model"].tolist() == [1, 2]
    nested = {name: torch.nested.as_nested_tensor(list(t), layout=torch.jagged) for name, t in tensors.items()}
    first, second = attempts_of(rows, {**nested, **said})
    assert first.said == {"feedback": "two tests fail", "hint": "a"} and second.said == {}
    assert all(type(text) is str for text in first.said.values())
    row = RolloutRow("k", {}, [], [], [], 0.0, [], extra={"reward_extra_info": {"feedback": np.str_("f")}})
    assert type(row.feedback) is str and type(plain_value({"a": np.str_("x")})["a"]) is str


def test_verls_own_error_texts_are_errors():
    assert classify("Unknown function 'x'. Available tools: ['y']", "x", True) == (Status.ERROR, "unknown_tool")
    assert classify("Invalid JSON in arguments for 'x': y", "x", False) == (Status.ERROR, "invalid_arguments")
    status, name = classify("Error executing tool 'x': [Errno 2] No such file or directory: 'a.py'", "x", False)
    assert status is Status.ERROR and name == "file_not_found"
    assert classify("all fine", "x", False) == (Status.OK, None)


def test_where_the_texts_are_looked_for():
    row = RolloutRow(
        "k", {}, [], [], [], 0.0, [], extra={"reward_extra_info": {"feedback": "f", "acc": 1.0}, "hint": "h"}
    )
    assert said_about(row, {}) == {"feedback": "f", "advice": "h"}
    row = RolloutRow("k", {}, [], [], [], 0.0, [], columns={"extra_info": {"hint": "x", "error": "e", "index": 3}})
    assert said_about(row, {"feedback": "colocated"}) == {"hint": "x", "error": "e", "feedback": "colocated"}
    assert said_about(row, {"hint": "column"})["hint"] == "column"


def test_the_rows_of_a_forward_go_to_the_ranks_by_length():
    order, micro = deal([5, 9, 3, 7, 8], 2, True, None)
    assert order == [1, 0, 2, 4, 3, None] and micro is None
    order, micro = deal([5, 9, 3], 2, False, 4)
    assert micro == 2 and len(order) == 4 and sorted(i for i in order if i is not None) == [0, 1, 2]
    order, micro = deal([5] * 5, 2, False, 2)
    assert micro == 2 and len(order) == 8
    batch = hinted_batch([([1, 2], [3]), ([4], [5, 6])], temperature=0.7)
    assert [r.tolist() for r in batch["input_ids"].unbind()] == [[1, 2, 3], [4, 5, 6]]
    assert batch["temperature"] == 0.7 and batch["compute_loss"] is False


def test_fields_count_the_hinted_tokens_of_their_mini_batch():
    turns = [HintedTurn(0, 1, 3, [True, False], [], "h", "x"), HintedTurn(2, 0, 2, [True, True], [], "h", "x")]
    values = [torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -4.0])]
    found = sdpo_fields([4, 2, 2, 3], turns, values, mini_batch_of(4, 2, 2))
    assert mini_batch_of(4, 2, 2) == [0, 1, 0, 1]
    assert found[SDPO_TOKENS].tolist() == [3.0, 0.0, 3.0, 0.0]
    assert [m.tolist() for m in found[SDPO_MASK].unbind()] == [[0, 1, 0, 0], [0, 0], [1, 1], [0, 0, 0]]
    assert found[SDPO_TEACHER].unbind()[2].tolist() == [-3.0, -4.0]


def hinted(batch, rng, share=0.4):
    """Some tokens of a conftest Batch hinted, with a teacher near the student; the last row has none."""
    mask = batch.mask & (rng.random(batch.mask.shape) < share)
    mask[0, 0], mask[-1] = True, False
    return mask, np.where(mask, batch.logp + rng.normal(size=batch.logp.shape), 7.0)


def expected(batch, mask, teacher, *, weight, clip, floor, engine):
    """Value and gradient by hand: alpha sum_t w (log pi - log pi_T) log pi / tokens; w and the ratio carry no gradient."""
    ratio = np.minimum(np.exp(batch.logp - batch.old), clip) if clip else 1.0
    factor = (
        weight * (batch.logp - teacher) * ratio * (batch.weights if engine else 1.0) * mask / max(mask.sum(), floor)
    )
    return float((factor * batch.logp).sum()), factor


def one_step(batch, actor, section, mask, teacher, *, micro=None, tokens=None, ranks=1):
    """One optimizer step of `composer_loss` in verl's micro-batches: (value, gradient, metrics), as conftest's `step`."""
    from composer_verl.channel_loss import composer_loss
    from verl.utils import tensordict_utils as tu
    from verl.workers.engine.utils import prepare_micro_batches

    log_probs, value, seen = torch.tensor(batch.logp, requires_grad=True), 0.0, []
    for rank in range(ranks):
        rows = list(range(rank, batch.rows, ranks))
        data = batch.tensordict(rows, log_probs, torch.float64)
        for name, values in ((SDPO_MASK, mask), (SDPO_TEACHER, teacher)):
            parts = [torch.tensor(values[i, : batch.lengths[i]]) for i in rows]
            data[name] = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
        data[SDPO_TOKENS] = torch.full((len(rows),), float(mask.sum()))
        tu.assign_non_tensor(
            data, use_dynamic_bsz=tokens is not None, max_token_len_per_gpu=tokens,
            micro_batch_size_per_gpu=micro or len(rows), dp_size=ranks, batch_num_tokens=int(batch.mask.sum()),
            global_batch_size=batch.rows,
        )  # fmt: skip
        for part in prepare_micro_batches(data)[0]:
            output = batch.model_output(part["row"].tolist(), log_probs)
            loss, metrics = composer_loss(actor, section, model_output=output, data=part)
            (loss / ranks).backward()
            value += float(loss) / ranks
            seen.append(
                {name: metric.aggregate() / ranks for name, metric in metrics.items() if name.startswith("sdpo")}
            )
    return value, log_probs.grad.numpy().copy(), {name: sum(m[name] for m in seen) for name in seen[0]}


@pytest.mark.parametrize(
    "options", [{}, {"micro": 2}, {"tokens": 40}, {"micro": 1, "ranks": 2}, {"tokens": 30, "ranks": 2}]
)
@pytest.mark.parametrize(("clip", "floor", "engine"), [(None, 0, False), (1.1, 0, True), (2.0, 1000, False)])
def test_value_and_gradient_are_the_oracles(batch, actor, rng, options, clip, floor, engine):
    mask, teacher = hinted(batch, rng)
    batch.weights = 0.5 + rng.random(batch.mask.shape) if engine else None
    sdpo = {"weight": 0.3, "is_clip": clip, "denominator_floor": floor, "teacher": {"kind": "live"}}
    section = parse_section({"policy": {"objective": "host", "weight": 0}, "sdpo": sdpo})
    value, gradient, metrics = one_step(batch, actor("vanilla"), section, mask, teacher, **options)
    wanted, slope = expected(batch, mask, teacher, weight=0.3, clip=clip, floor=floor, engine=engine)
    assert value == pytest.approx(wanted, rel=1e-6) and metrics["sdpo/loss"] == pytest.approx(wanted / 0.3, rel=1e-6)
    assert np.linalg.norm(gradient - slope) <= 1e-6 * np.linalg.norm(slope)
    assert np.array_equal(gradient != 0, mask)  # exactly zero outside the error turns
    assert metrics["sdpo/tokens"] == mask.sum()
    assert metrics["sdpo/divergence"] == pytest.approx((batch.logp - teacher)[mask].mean(), rel=1e-5)


def test_the_policy_term_is_verls_own_beside_it(batch, actor, step, rng):
    mask, teacher = hinted(batch, rng)
    section = parse_section({"policy": {"objective": "host"}, "sdpo": {"weight": 0.3, "is_clip": None}})
    config = actor("vanilla")
    value, gradient, _ = one_step(batch, config, section, mask, teacher, micro=2)
    policy, slope, _ = step(batch, config, micro=2)
    extra, own = expected(batch, mask, teacher, weight=0.3, clip=None, floor=0, engine=False)
    assert value == pytest.approx(policy + extra, rel=1e-6)
    assert np.allclose(gradient, slope + own, rtol=1e-6, atol=1e-12)


def test_the_weight_of_the_policy(batch, actor, step, rng):
    mask, teacher = hinted(batch, rng)
    for objective, mode, built in (
        ("host", "vanilla", actor("vanilla")),
        ("dapo", "composer_dapo", actor("composer_dapo", composer={"policy": {"weight": 0.25}})),
    ):
        section = parse_section({"policy": {"objective": objective, "weight": 0.25}, "sdpo": {"weight": 1.0}})
        value, _, metrics = one_step(batch, built, section, mask * 0, teacher)
        whole = actor(mode) if mode == "vanilla" else actor(mode, composer={"policy": {}})
        assert value == pytest.approx(0.25 * step(batch, whole)[0], rel=1e-6)
        assert metrics["sdpo/loss"] == 0.0 and metrics["sdpo/tokens"] == 0.0


def test_a_channel_of_weight_0_is_not_computed(batch, actor, rng, monkeypatch):
    def never(*_, **__):
        raise AssertionError("computed")

    mask, teacher = hinted(batch, rng)
    monkeypatch.setattr("verl.workers.utils.losses.ppo_loss", never)
    alone = parse_section({"policy": {"objective": "host", "weight": 0}, "sdpo": {"weight": 1.0}})
    assert one_step(batch, actor("vanilla"), alone, mask, teacher)[2]["sdpo/tokens"] == mask.sum()
    with pytest.raises(AssertionError, match="computed"):
        one_step(batch, actor("vanilla"), parse_section({"sdpo": {"weight": 1.0}}), mask, teacher)


def test_placement_local_needs_a_generation_prompt(loop):
    flat = SimpleNamespace(apply_chat_template=lambda messages, **_: [1, 2, 3])
    with pytest.raises(ModelError, match="no generation prompt"):
        HintSources(SDPOConfig(weight=1), flat, None, max_tokens=9)
