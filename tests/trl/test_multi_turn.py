"""An error inside a multi-turn tool rollout: classified, hinted before its turn, KL on that turn's tokens only."""

import pytest
import torch

pytest.importorskip("trl")

QUESTION = [{"role": "user", "content": "edit a.py"}]
CALL = {"type": "function", "function": {"name": "Read", "arguments": {"file_path": "a.py"}}}


def read(file_path: str) -> str:
    """Read a file.

    Args:
        file_path: The file to read.

    Returns:
        Its text.
    """
    raise FileNotFoundError("File does not exist.")


def listing(file_path: str) -> str:
    """Read a file.

    Args:
        file_path: The file to read.

    Returns:
        Its text.
    """
    return "a b c"


read.__name__ = listing.__name__ = "Read"


@pytest.fixture
def caller(make_model, tokenizer):
    """A tiny model that was taught, for real, to call Read first and to answer after the result."""
    from transformers.utils import get_json_schema

    tools = [get_json_schema(read)]
    results = ["{'error': 'File does not exist.'}", "a b c"]
    model = make_model(hidden_size=64, intermediate_size=128)
    examples = []
    for result in results:
        messages = [
            *QUESTION,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "name": "Read", "content": result},
            {"role": "assistant", "content": "ok"},
        ]
        examples.append(
            tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=False, return_tensors="pt")
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        for ids in examples:
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def run(make_trainer, caller, tool=None, environment=None):
    from datasets import Dataset

    trainer = make_trainer(
        {"sdpo": {"weight": 1.0, "hint": {"sources": ["rollout"]}}, "monitor": {"silent_after": 1}},
        model=caller,
        train_dataset=Dataset.from_list([{"prompt": QUESTION}] * 4),
        max_completion_length=120,
        max_steps=1,
        top_k=1,
        chat_template_kwargs={},
        max_tool_calling_iterations=1,
        trainer_kwargs={"tools": [tool]} if tool else {"environment_factory": environment},
    )
    trainer.train()
    rows = [
        (batch["completion_ids"][i], batch["tool_mask"][i], batch["composer_turns"][i])
        for batch in trainer._buffered_inputs
        for i in range(len(batch["completion_ids"]))
    ]
    return trainer, rows


def check_hinted(trainer, rows, tokenizer):
    assert all(len(turns) == 1 for _, _, turns in rows)
    for ids, tool_mask, (turn,) in rows:
        assert turn.kind == "rollout" and "File does not exist." in turn.error
        span = tokenizer.decode(ids[turn.start : turn.end])
        assert span.startswith("<tool_call>") and span.endswith("<|im_end|>")
        assert turn.start == 0 and tool_mask[turn.start : turn.end].all() and not tool_mask[turn.end]
        context = tokenizer.decode(turn.prefix_ids)
        assert context.endswith(f"{turn.hint}<|im_end|>\n<|im_start|>assistant\n")
        assert "tool_response" not in context.split("edit a.py")[1]  # the hint stands before the turn, not after it
    logged = trainer.state.log_history[0]
    assert logged["sdpo/hinted_turns"] == 4
    assert logged["sdpo/tokens"] == sum(turn.end - turn.start for _, _, (turn,) in rows)
    assert logged["sdpo/divergence"] > 0


def test_a_failing_tool_makes_its_turn_an_error_turn(make_trainer, caller, tokenizer):
    trainer, rows = run(make_trainer, caller, tool=read)
    check_hinted(trainer, rows, tokenizer)


def test_the_same_with_an_environment_factory(make_trainer, caller, tokenizer):
    class Workspace:
        def reset(self, **kwargs):
            return None

        def Read(self, file_path: str) -> str:
            """Read a file.

            Args:
                file_path: The file to read.
            """
            raise FileNotFoundError("File does not exist.")

    trainer, rows = run(make_trainer, caller, environment=Workspace)
    check_hinted(trainer, rows, tokenizer)


def test_a_tool_that_succeeds_gets_no_hint(make_trainer, caller):
    from composer_plugins.channels.silence import SilentChannelWarning

    with pytest.warns(SilentChannelWarning, match="no turn of the rollouts had a hint"):
        _, rows = run(make_trainer, caller, tool=listing)
    assert all(turns == [] for _, _, turns in rows)


def test_a_context_that_ends_in_a_tool_message_is_fine_for_recorded_hints(make_trainer, make_model, tokenizer):
    """TRL's own SDPO trainer rejects such prompts."""
    from datasets import Dataset

    prompt = [
        {"role": "user", "content": "edit a.py"},
        {"role": "assistant", "content": "<tool_call>\n{}\n</tool_call>"},
        {"role": "tool", "content": "File does not exist."},
    ]
    trainer = make_trainer(
        {"sdpo": {"weight": 1.0, "hint": {"sources": ["recorded"]}}},
        train_dataset=Dataset.from_list([{"prompt": prompt, "hint": "look for the file first"}] * 4),
        max_steps=1,
    )
    trainer.train()
    assert trainer.state.log_history[0]["sdpo/divergence"] > 0
