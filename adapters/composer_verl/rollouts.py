"""Rollouts as traces: state, action, reward and feedback of every turn of a step, in the core's stage format.

verl's own dumps (`trainer.rollout_data_dir`) keep the prompt and the response as two texts without roles. Beside them
this writes one traces file per step, which `composer-rl stats`, `hints`, `scrub` and the rest of the pipeline read.
Nothing is scrubbed: the manifest says so, and `composer-rl scrub` does it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from composer_plugins.traces.chat_messages import ChatConversation
from composer_plugins.traces.model_fields import number_or_none
from composer_plugins.traces.schema import Trace
from composer_plugins.traces.store import Manifest, write_stage
from composer_verl.rollout_rows import FEEDBACK_KEY, FIELDS, RolloutRow, rows_of
from composer_verl.turns import TurnReader, verl_parser

logger = logging.getLogger("composer_verl")

#: Key under which an agent loop may keep its messages in `extra_fields`; they are taken instead of those from tokens.
MESSAGES_KEY = "messages"


def export_rollouts(batch: Any, trainer: Any, folder: str | Path | None = None) -> Path | None:
    """Write the rollouts of a step as `FOLDER/traces/step_<n>.jsonl` with its manifest.

    Call it where verl dumps generations (`PPOTrainer._log_rollout_data`): after pair rows are taken out of the batch
    and before TransferQueue is cleared.

    Args:
        batch: verl's `KVBatchMeta` of the step.
        trainer: verl's v1 trainer (`config`, `tokenizer`, `global_steps`).
        folder: default: `trainer.rollout_data_dir` of the configuration.

    Returns:
        The traces file, or None when no folder is configured.
    """
    import transfer_queue as tq

    folder = folder or trainer.config.trainer.get("rollout_data_dir", None)
    if not folder:
        return None
    data = tq.kv_batch_get(keys=list(batch.keys), partition_id=batch.partition_id, select_fields=FIELDS)
    reader = getattr(trainer, "_composer_turn_reader", None)
    if reader is None:
        reader = trainer._composer_turn_reader = reader_of(trainer)
    path = Path(folder) / "traces" / f"step_{trainer.global_steps:06d}.jsonl"
    model = str(trainer.config.actor_rollout_ref.model.path)
    write_rollouts(path, rows_of(batch, data), reader, step=trainer.global_steps, model=model)
    return path


def write_rollouts(path: Path, rows: list[RolloutRow], reader: TurnReader, *, step: int, model: str) -> Manifest:
    """Write the traces of a step and account for every row.

    Returns:
        The manifest: `read` rows = `used` + `skipped` by reason: `padding` (rows with which verl fills a batch up),
        `no_model_tokens` (the mask is 0 everywhere: nothing was sampled, or verl rejected all of it). `options` counts
        the steps whose history is exact and those whose is not.

    Raises:
        TraceError: the counts do not add up.
    """
    counts: Counter = Counter(read=0, used=0)
    manifest = Manifest(
        stage="rollouts", record=Trace.__name__, written=0, options={"host": "verl", "step": step, "model": model}
    )

    def stream() -> Iterator[Trace]:
        histories: Counter = Counter()
        for line, row in enumerate(sorted(rows, key=lambda row: row.name), 1):
            counts["read"] += 1
            reason, trace = _set_aside(row), None
            if reason is None:
                trace = to_trace(row, reader, step=step, model=model, source=f"verl/step_{step}", line=line)
                reason = "no_model_tokens" if trace is None else None
            if reason is not None:
                counts[f"skipped:{reason}"] += 1
                continue
            counts["used"] += 1
            histories.update("exact" if s.history_exact else "inexact" for s in trace.steps)
            yield trace
        manifest.options["histories"] = dict(histories)

    return write_stage(path, stream(), manifest, counts=counts)


def _set_aside(row: RolloutRow) -> str | None:
    if row.tag.get("is_padding", False):
        return "padding"
    return None if any(row.mask) else "no_model_tokens"


def to_trace(row: RolloutRow, reader: TurnReader, *, step: int, model: str, source: str, line: int) -> Trace | None:
    """Return one rollout as a trace: a step per turn, with the messages before it as its state.

    Args:
        row: the rollout.
        reader: of the model and tools of the run.
        step: verl's global step, counted from 1.
        model: the path that verl loads; the weights' versions are in `extra`.
        source, line: where the trace says that it comes from.
    """
    turns = reader.read(row.prompt, row.prompt_ids, row.response_ids, row.mask, kept=row.extra.get(MESSAGES_KEY))
    talk = ChatConversation(source, model=model)
    actions = {index for index, _ in turns.actions}
    rewards = _turn_rewards(row, len(actions))
    for index, message in enumerate(turns.messages):
        if index in turns.inexact:
            talk.inexact(turns.inexact[index])
        own = index in actions
        talk.add(message, line, own=own, reward=rewards.pop(0) if own and rewards else None)
    return talk.trace(
        row.key, "verl", tools=reader.tools, session_id="_".join(map(str, row.name[:2])), agent=_agent(row),
        reward=row.reward, extra=_extra(row, step),
    )  # fmt: skip


def _turn_rewards(row: RolloutRow, actions: int) -> list[float | None]:
    """verl's `turn_scores`, one per turn, when the agent loop gives that many."""
    scores = row.extra.get("turn_scores") or []
    return [number_or_none(score) for score in scores] if len(scores) == actions else []


def _agent(row: RolloutRow) -> str | None:
    name = row.columns.get("agent_name")
    return name if isinstance(name, str) else None


def _extra(row: RolloutRow, step: int) -> dict[str, Any]:
    """What the canonical records have no field for. Token ids and log-probabilities are not kept."""
    uid, session, output = row.name
    info = {k: v for k, v in (row.extra.get("reward_extra_info") or {}).items() if k != FEEDBACK_KEY}
    found = {
        "uid": uid, "rollout": session, "output": output, "step": step,
        "weights": [row.tag.get("min_global_steps"), row.tag.get("max_global_steps")],
        "feedback": row.feedback, "reward_info": info, "advantage": row.advantage,
        "turn_scores": row.extra.get("turn_scores"), "tool_rewards": row.extra.get("tool_rewards"),
        "prompt_tokens": len(row.prompt_ids), "response_tokens": len(row.response_ids),
        **{key: row.columns.get(key) for key in ("data_source", "index", "reward_model", "extra_info")},
    }  # fmt: skip
    return {key: plain_value(value) for key, value in found.items() if value is not None}


def plain_value(value: Any) -> Any:
    """Turn what datasets and reward functions hold (NumPy, tensors, tuples) into what JSON can hold."""
    if isinstance(value, str):
        return str(value)  # a NumPy string too
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return number_or_none(value)
    if isinstance(value, dict):
        return {str(key): plain_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain_value(item) for item in value]
    if hasattr(value, "tolist"):
        return plain_value(value.tolist())
    return str(value)


def reader_of(trainer: Any) -> TurnReader:
    """Return the reader for a trainer's model, chat template and tools; made once per run."""
    from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

    config = trainer.config
    builder = create_continuous_token_builder(
        trainer.tokenizer,
        hf_model_type=_model_type(config),
        chat_template_kwargs=dict(config.data.get("apply_chat_template_kwargs", None) or {}),
    )
    turns = config.actor_rollout_ref.rollout.multi_turn
    parse = None if turns.format == "hermes" else verl_parser(turns.format, trainer.tokenizer)
    return TurnReader(builder, tools=tool_schemas(turns), parse=parse)


def _model_type(config: Any) -> str | None:
    from transformers import AutoConfig
    from verl.utils.fs import copy_to_local

    model = config.actor_rollout_ref.model
    path = copy_to_local(model.get("hf_config_path", None) or model.path, use_shm=model.get("use_shm", False))
    return AutoConfig.from_pretrained(path, trust_remote_code=model.get("trust_remote_code", False)).model_type


def tool_schemas(multi_turn: Any) -> list[dict[str, Any]] | None:
    """Return the schemas of the tools of a run, from the files that verl's agent loops load; None: no tools.

    Stateful tools are not started here: the schema is in their YAML file.
    """
    from omegaconf import OmegaConf
    from verl.utils.import_utils import resolve_config_path

    found: list[dict[str, Any]] = []
    if multi_turn.tool_config_path:
        loaded = OmegaConf.to_container(OmegaConf.load(resolve_config_path(multi_turn.tool_config_path)), resolve=True)
        found += [tool["tool_schema"] for tool in loaded.get("tools", []) if tool.get("tool_schema")]
    if multi_turn.function_tool_path:
        from verl.tools.function_tool import load_function_tools_from_path

        tools = load_function_tools_from_path(resolve_config_path(multi_turn.function_tool_path))
        found += [tool.tool_schema.model_dump(exclude_unset=True, exclude_none=True) for tool in tools]
    return found or None
