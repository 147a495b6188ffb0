"""Rollouts as traces: verl's real agent loops make the rollouts, their own messages are the oracle."""

import asyncio
import importlib
import importlib.util
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

os.environ.setdefault("COMPOSER_MODEL_SOURCE", "wheel")
if importlib.util.find_spec("verl") is None:
    pytest.skip(
        "verl is not installed: it needs an environment of its own (docs/how-to/verl.md)", allow_module_level=True
    )

from composer_verl.rollout_rows import FIELDS, rows_of
from composer_verl.rollouts import export_rollouts, plain_value, reader_of, to_trace, write_rollouts
from composer_verl.turns import TurnReader, host_error, spans, verl_parser

from composer_plugins.errors import TraceError
from composer_plugins.traces.schema import State, Status, Trace
from composer_plugins.traces.store import read_manifest, read_stage

pytestmark = pytest.mark.model
RECIPE = Path(__file__).parents[2] / "recipes" / "verl" / "composer_policy.yaml"
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
    return f"content of {path}\\nsecond line\\n"
'''
PROMPT = [{"role": "system", "content": "You edit files."}, {"role": "user", "content": "Fix the bug."}]


def call(path):
    return f'<tool_call>\n{{"name": "read_file", "arguments": {{"path": "{path}"}}}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer():
    from composer_plugins.models.tokenizer import load_tokenizer
    from composer_plugins.models.toolcalls import install_tool_template

    return install_tool_template(load_tokenizer("smollm2-135m-instruct"))


@pytest.fixture(scope="module")
def run_loop(tokenizer, tmp_path_factory):
    """Run verl's own agent loop on scripted answers; return (its output, the messages that it held)."""
    from composer_verl.host import compose
    from verl.experimental.agent_loop.agent_loop import DictConfigWrap, ToolListWrap
    from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
    from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop
    from verl.tools.tool_registry import load_all_tools
    from verl.utils.dataset.rl_dataset import RLHFDataset
    from verl.workers.rollout.replica import TokenOutput

    path = tmp_path_factory.mktemp("tools") / "tools.py"
    path.write_text(TOOLS)

    def run(*answers, prompt=PROMPT, family=None, overrides=(), loop="tool", stop="<|im_end|>", keep=False):
        config = compose(RECIPE, [f"actor_rollout_ref.rollout.multi_turn.function_tool_path={path}", *overrides])
        scripted = iter([tokenizer.encode(a + stop, add_special_tokens=False) for a in answers])

        class Server:
            async def generate(self, **_):
                return TokenOutput(
                    token_ids=next(scripted), stop_reason="completed",
                    extra_fields={"min_global_steps": 3, "max_global_steps": 4},
                )  # fmt: skip

        held = {}

        class Watched(ToolAgentLoop):
            async def _handle_generating_state(self, agent_data, *args, **kwargs):
                held["messages"] = agent_data.messages
                state = await super()._handle_generating_state(agent_data, *args, **kwargs)
                if keep:
                    agent_data.extra_fields["messages"] = agent_data.messages
                return state

        async def go():
            made = (Watched if loop == "tool" else SingleTurnAgentLoop)(
                trainer_config=DictConfigWrap(config), server_manager=Server(), tokenizer=tokenizer, processor=None,
                dataset_cls=RLHFDataset, data_config=DictConfigWrap(config.data), hf_model_type=family or "llama",
                tools=ToolListWrap(load_all_tools(None, str(path))),
            )  # fmt: skip
            return await made.run({}, raw_prompt=prompt)

        output = asyncio.run(go())
        trainer = SimpleNamespace(config=config, tokenizer=tokenizer, global_steps=7)
        return output, held.get("messages"), trainer

    return run


@pytest.fixture
def reader(tokenizer, monkeypatch):
    """The reader as the export makes it, for a model family."""

    def build(trainer, family="llama"):
        monkeypatch.setattr("composer_verl.rollouts._model_type", lambda config: family)
        return reader_of(trainer)

    return build


def shown(messages):
    """What two spellings of a conversation have in common: role, text, calls with arguments as objects."""
    found = []
    for message in messages:
        calls = [
            (c["function"]["name"], json.loads(a) if isinstance(a := c["function"]["arguments"], str) else a)
            for c in message.get("tool_calls", [])
        ]
        found.append((message["role"], message["content"].replace("<|im_end|>", "").strip(), calls))
    return found


def stored(output, *, reward=0.5, prompt=PROMPT, info=None, **columns):
    """The fields of one row as verl's `AgentLoopWorkerTQ._agent_loop_postprocess` puts them into TransferQueue."""
    output = output.model_copy(deep=True)
    output.reward_score = reward
    fields = output.as_dict()
    fields["extra_fields"]["reward_extra_info"] = info or {}
    return {**fields, "loss_mask": fields["response_mask"], "raw_prompt": prompt, "uid": "u", **columns}


def row_of(output, key="u_0_0", *, tag=None, **columns):
    """The row as the export reads it back."""
    from verl.utils.tensordict_utils import list_of_dict_to_tensordict

    batch = SimpleNamespace(keys=[key], tags=[tag or {"min_global_steps": 3, "max_global_steps": 4}])
    return rows_of(batch, list_of_dict_to_tensordict([stored(output, **columns)]))[0]


TWO_TURNS = (f"I look.\n{call('missing.py')}", call("a.py"), "Done.")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_messages_are_those_that_the_agent_loop_held(run_loop, reader, family):
    output, held, trainer = run_loop(*TWO_TURNS, family=family)
    turns = reader(trainer, family).read(PROMPT, output.prompt_ids, output.response_ids, output.response_mask)
    assert shown(turns.messages) == shown(held)
    assert [m["role"] for m in held] == ["system", "user", "assistant", "tool", "assistant", "tool", "assistant"]
    assert turns.inexact == {} and [i for i, _ in turns.actions] == [2, 4, 6]


def test_a_rollout_is_a_step_per_turn_with_status_reward_and_feedback(run_loop, reader):
    output, _, trainer = run_loop(*TWO_TURNS)
    row = row_of(output, "abc_1_0", reward=0.25, info={"feedback": "test_x fails", "acc": 0.25}, data_source="unit")
    trace = to_trace(row, reader(trainer), step=7, model="m", source="verl/step_7", line=1)
    assert [s.status for s in trace.steps] == [Status.ERROR, Status.OK, Status.OK]
    assert trace.steps[0].results[0].content.startswith("Error executing tool 'read_file'")
    assert trace.steps[0].results[0].error_class == "file_not_found"
    assert trace.steps[1].results[0].content == "content of a.py\nsecond line\n"
    assert all(s.history_exact and s.model == "m" for s in trace.steps)
    assert [m.role for m in trace.state_of(trace.steps[1])] == ["system", "user", "assistant", "tool"]
    assert trace.action_of(trace.steps[2]).content == "Done."
    assert (trace.reward, trace.session_id, trace.id) == (0.25, "abc_1", "abc_1_0")
    wanted = {"uid": "abc", "rollout": 1, "output": 0, "step": 7, "weights": [3, 4], "feedback": "test_x fails"}
    assert wanted.items() <= trace.extra.items() and trace.extra["reward_info"] == {"acc": 0.25}
    assert trace.tools["read_file"]["parameters"]["required"] == ["path"]


def test_parallel_calls_keep_their_results_apart(run_loop, reader):
    both = f"{call('missing.py')}\n{call('b.py')}"
    output, held, trainer = run_loop(
        both, "ok", overrides=["actor_rollout_ref.rollout.multi_turn.max_parallel_calls=2"]
    )
    turns = reader(trainer).read(PROMPT, output.prompt_ids, output.response_ids, output.response_mask)
    assert shown(turns.messages) == shown(held) and turns.inexact == {}
    trace = to_trace(row_of(output), reader(trainer), step=1, model="m", source="s", line=1)
    assert [r.status for r in trace.steps[0].results] == [Status.ERROR, Status.OK]


def test_a_call_that_verl_did_not_run_has_no_result_and_the_state_behind_it_is_not_exact(run_loop, reader):
    """max_parallel_calls is 1 by default: verl drops the second call from its messages, the model's tokens have it."""
    output, held, trainer = run_loop(f"{call('a.py')}\n{call('b.py')}", "ok")
    assert len(held[2]["tool_calls"]) == 1
    trace = to_trace(row_of(output), reader(trainer), step=1, model="m", source="s", line=1)
    assert [r.status for r in trace.steps[0].results] == [Status.OK, Status.MISSING]
    assert trace.steps[0].history_exact and trace.steps[1].inexact == ["missing_result"]


def test_a_result_goes_to_the_call_that_verl_could_read(run_loop, reader):
    broken = '<tool_call>\n{"name": "read_file", "arguments": {"path": }}\n</tool_call>'
    output, _, trainer = run_loop(f"{broken}\n{call('missing.py')}", "ok")
    trace = to_trace(row_of(output), reader(trainer), step=1, model="m", source="s", line=1)
    assert [r.status for r in trace.steps[0].results] == [Status.MISSING, Status.ERROR]


def test_a_call_that_cannot_be_read_is_kept(run_loop, reader):
    output, _, trainer = run_loop('<tool_call>\n{"name": "read_file", "arguments": {"path": }}\n</tool_call>')
    trace = to_trace(row_of(output), reader(trainer), step=1, model="m", source="s", line=1)
    found = trace.action_of(trace.steps[0]).tool_calls[0]
    assert (found.name, found.raw_arguments) == ("read_file", '{"path": }')


def test_an_answer_without_tools(run_loop, reader):
    output, _, trainer = run_loop("just text", loop="single")
    trainer.config.actor_rollout_ref.rollout.multi_turn.function_tool_path = None
    trace = to_trace(row_of(output), reader(trainer), step=1, model="m", source="s", line=1)
    assert len(trace.steps) == 1 and trace.steps[0].history_exact
    assert trace.action_of(trace.steps[0]).content == "just text"


def test_a_cut_prompt_is_not_exact(run_loop, reader):
    output, _, trainer = run_loop(*TWO_TURNS, overrides=["data.max_prompt_length=20"])
    trace = to_trace(row_of(output), reader(trainer), step=1, model="m", source="s", line=1)
    assert all(s.inexact == ["prompt_differs"] for s in trace.steps)


def replaced(output, tokenizer, text):
    """The rollout with other tokens between its first two actions: (ids, mask)."""
    first = next(s for s in spans(output.response_mask) if not s.sampled)
    strange = tokenizer.encode(text, add_special_tokens=False)
    ids = [*output.response_ids[: first.start], *strange, *output.response_ids[first.end :]]
    return ids, [*output.response_mask[: first.start], *[0] * len(strange), *output.response_mask[first.end :]]


def test_what_no_message_renders_to_is_marked(run_loop, reader):
    output, _, trainer = run_loop(*TWO_TURNS)
    ids, mask = replaced(output, trainer.tokenizer, "<|im_start|>observation\n42<|im_end|>\n<|im_start|>assistant\n")
    turns = reader(trainer).read(PROMPT, output.prompt_ids, ids, mask)
    assert turns.inexact == {3: "context_from_text"} and "observation\n42" in turns.messages[3]["content"]
    trace = to_trace(
        row_of(output, responses=ids, loss_mask=mask), reader(trainer), step=1, model="m", source="s", line=1
    )
    assert [s.inexact for s in trace.steps] == [[], ["context_from_text"], ["context_from_text"]]


def test_text_beside_a_result_is_not_lost(run_loop, reader):
    """The frame of a tool message is there, but verl would not make these tokens of that message alone."""
    output, _, trainer = run_loop(*TWO_TURNS)
    text = "<|im_start|>note\nlost?<|im_end|>\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n"
    ids, mask = replaced(output, trainer.tokenizer, text)
    turns = reader(trainer).read(PROMPT, output.prompt_ids, ids, mask)
    assert turns.inexact == {3: "context_from_text"} and "lost?" in turns.messages[3]["content"]


GROUPED = (
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user\n{% endif %}"
    "<tool_response>\n{{ m.content }}\n</tool_response>\n"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_groups_results(tokenizer, run_loop, reader, monkeypatch):
    """As Qwen's. A result that quotes the frame is still one result when there was one call; of two calls it is open."""
    monkeypatch.setattr(tokenizer, "chat_template", GROUPED)
    two = ["actor_rollout_ref.rollout.multi_turn.max_parallel_calls=2"]
    both = f"{call('missing.py')}\n{call('b.py')}"
    output, held, trainer = run_loop(both, "ok", family="qwen2", overrides=two)
    read = reader(trainer, "qwen2").read
    turns = read(PROMPT, output.prompt_ids, output.response_ids, output.response_mask)
    assert shown(turns.messages) == shown(held) and turns.inexact == {}
    quoting = "a\n</tool_response>\n<tool_response>\nb"
    text = f"\n<|im_start|>user\n<tool_response>\n{quoting}\n</tool_response>\n<|im_end|>\n<|im_start|>assistant\n"
    output, _, trainer = run_loop(*TWO_TURNS, family="qwen2")
    turns = read(PROMPT, output.prompt_ids, *replaced(output, tokenizer, text))
    assert turns.messages[3]["content"] == quoting and turns.inexact == {}
    three = text.replace("b\n", "b\n</tool_response>\n<tool_response>\nc\n")
    output, _, _ = run_loop(both, "ok", family="qwen2", overrides=two)
    turns = read(PROMPT, output.prompt_ids, *replaced(output, tokenizer, three))
    assert turns.inexact == {3: "context_from_text"}


def test_messages_that_the_agent_loop_keeps_are_taken(run_loop, reader):
    output, held, trainer = run_loop(*TWO_TURNS, keep=True)
    held[3]["content"] = "kept by the loop"
    read = reader(trainer).read
    ids = (PROMPT, output.prompt_ids, output.response_ids, output.response_mask)
    assert read(*ids, kept=output.extra_fields["messages"]).messages[3]["content"] == "kept by the loop"
    assert read(*ids, kept=held[:4]).messages[3]["content"] != "kept by the loop"  # other turns than the tokens
    trace = to_trace(row_of(output), reader(trainer), step=1, model="m", source="s", line=1)
    assert trace.messages[3].content == "kept by the loop"


def test_every_row_is_accounted_for_and_read_back(run_loop, reader, tmp_path):
    output, _, trainer = run_loop(*TWO_TURNS)
    rows = [row_of(output, f"{uid}_{n}_0", reward=n) for uid in "ba" for n in (1, 0)]
    rows.append(row_of(output, "pad_0_0", tag={"is_padding": True}))
    empty = row_of(output, "c_0_0")
    empty.mask = [0] * len(empty.mask)
    path = tmp_path / "step.jsonl"
    manifest = write_rollouts(path, [*rows, empty], reader(trainer), step=7, model="m")
    assert (manifest.read, manifest.used, manifest.skipped) == (6, 4, {"padding": 1, "no_model_tokens": 1})
    assert manifest.scrubbed is None and manifest.options["histories"] == {"exact": 12}
    traces = list(read_stage(path, Trace))
    assert [(t.id, t.reward) for t in traces] == [("a_0_0", 0.0), ("a_1_0", 1.0), ("b_0_0", 0.0), ("b_1_0", 1.0)]
    path.write_text(path.read_text().rsplit("\n", 2)[0] + "\n")
    with pytest.raises(TraceError, match="lines were lost"):
        list(read_stage(path, Trace))


def test_the_pipeline_takes_the_file(run_loop, reader, tmp_path):
    import typer
    from typer.testing import CliRunner

    app = typer.Typer()
    for name in ("validate", "stats", "scrub", "hints"):
        app.command(name)(getattr(importlib.import_module(f"composer_plugins.cli.{name}"), name))
    output, _, trainer = run_loop(*TWO_TURNS)
    path, states = tmp_path / "step.jsonl", tmp_path / "states.jsonl"
    write_rollouts(path, [row_of(output, "u_0_0"), row_of(output, "u_1_0")], reader(trainer), step=7, model="m")
    clean = tmp_path / "clean.jsonl"
    for command in (
        ["validate", str(path)], ["stats", str(path)], ["scrub", str(path), "-o", str(clean)],
        ["hints", str(clean), "-o", str(states), "--exact", "full"],
    ):  # fmt: skip
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, (command, done.output)
    found = list(read_stage(states, State))
    failed = [s for s in found if s.status.failed]
    assert len(found) == 4 and len(failed) == 2 and all(s.hint.error_class == "file_not_found" for s in failed)
    assert read_manifest(states).scrubbed is not None


def test_export_asks_for_a_folder_and_fetches_what_there_is(run_loop, reader, tmp_path, monkeypatch):
    import transfer_queue as tq
    from verl.utils.tensordict_utils import list_of_dict_to_tensordict

    output, _, trainer = run_loop(*TWO_TURNS)
    reader(trainer)
    asked = {}

    def get(keys, partition_id, select_fields):
        asked.update(keys=keys, partition=partition_id, fields=select_fields)
        rows = [stored(output), stored(output)]
        return list_of_dict_to_tensordict([{k: v for k, v in row.items() if k in select_fields} for row in rows])

    monkeypatch.setattr(tq, "kv_batch_get", get)
    batch = SimpleNamespace(keys=["u_1_0", "u_0_0"], tags=[{}, {"is_padding": True}], partition_id="train")
    assert export_rollouts(batch, trainer) is None and not asked
    path = export_rollouts(batch, trainer, tmp_path)
    assert path == tmp_path / "traces" / "step_000007.jsonl"
    assert asked == {"keys": ["u_1_0", "u_0_0"], "partition": "train", "fields": FIELDS}
    (trace,) = read_stage(path, Trace)
    assert trace.id == "u_1_0" and trace.reward == 0.5 and len(trace.steps) == 3


def test_tokens_that_rollout_correction_rejects_are_still_the_models(run_loop):
    """verl writes the corrected mask back to response_mask; the turns come from loss_mask."""
    output, _, _ = run_loop(*TWO_TURNS)
    row = row_of(output)
    rejected = row_of(output, response_mask=output.as_dict()["response_mask"] * 0)
    assert rejected.mask == row.mask and sum(row.mask) > 0


def test_another_call_format_is_read_by_verls_own_parser(tokenizer):
    text = "<function=read_file>\n<parameter=path>\na.py\n</parameter>\n</function>"
    ids = tokenizer.encode(f"<tool_call>\n{text}\n</tool_call>", add_special_tokens=False)

    async def inside_a_loop():
        return verl_parser("qwen3_coder", tokenizer)(ids)

    message, calls = asyncio.run(inside_a_loop())
    assert calls[0]["function"]["name"] == "read_file" and message["role"] == "assistant"
    with pytest.raises(ValueError, match="Unknown tool parser"):
        verl_parser("no_such", tokenizer)


def test_verls_own_failures_are_errors_and_others_are_not():
    assert host_error("Unknown function 'x'. Available tools: []") and not host_error("An Error executing tool 'x'")


def test_spans_and_values():
    assert [(s.start, s.end, s.sampled) for s in spans([0, 1, 1, 0])] == [(0, 1, False), (1, 3, True), (3, 4, False)]
    assert spans([]) == []
    value = {"a": np.array([1, 2]), 3: (np.float32(0.5), float("nan")), "o": object}
    assert plain_value(value) == {"a": [1, 2], "3": [0.5, None], "o": "<class 'object'>"}


def test_a_template_without_tool_messages_marks_what_it_cannot_read(tokenizer):
    class Builder:
        def __init__(self):
            self.tokenizer = tokenizer

        def build_initial_tokens(self, messages, tools=None):
            raise ValueError("no template")

        tokenize_context_incremental_messages = build_initial_tokens

    ids = tokenizer.encode(f"{call('a')}<|im_end|>", add_special_tokens=False)
    result = tokenizer.encode("<|im_start|>tool\nhello<|im_end|>", add_special_tokens=False)
    turns = TurnReader(Builder()).read(PROMPT, [1], ids + result, [1] * len(ids) + [0] * len(result))
    assert set(turns.inexact.values()) == {"prompt_differs", "context_from_text"}
    assert "hello" in turns.messages[-1]["content"] and turns.messages[-1]["tool_call_id"] == "call_0_0"
