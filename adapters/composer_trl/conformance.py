"""The TRL adapter under the conformance suite: `composer-rl conformance trl`.

A problem becomes a batch as TRL's own `_generate_and_score_completions` returns it; denominators, student and teacher
forwards, pairs and losses then go through the trainer's own code, from `compute_loss` on.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, ClassVar

import torch

from composer_plugins.conformance.adapter import AdapterConformance
from composer_plugins.conformance.capabilities import Capability as Can
from composer_plugins.conformance.files import table_tokenizer, words, write_pairs
from composer_plugins.conformance.problem import PAD, Layout, Outcome, Problem, Row
from composer_plugins.conformance.ranks import averaged, of_rank, on_ranks
from composer_plugins.conformance.real_model import gradient_of, model_of, norm_of
from composer_plugins.conformance.table_model import read_by_teacher
from composer_trl.config import ComposerGRPOConfig
from composer_trl.hinted_turns import HintedTurn
from composer_trl.trainer import TURNS, ComposerGRPOTrainer


class TestTRL(AdapterConformance):
    """TRL's GRPOTrainer with our channels."""

    capabilities: ClassVar[frozenset] = frozenset(
        {
            Can.SAMPLED, Can.TOPK, Can.FULL, Can.SEQUENCE_RATIO, Can.OFF_POLICY_SDPO, Can.ACCUMULATION, Can.PADDED, Can.PAIRWISE,
            Can.ADVANTAGE_FORM, Can.FORWARDS, Can.LIVE_TEACHER, Can.EMA_TEACHER, Can.REFERENCE_TEACHER, Can.RESUME,
            Can.MONITOR, Can.MULTI_RANK, Can.BF16,
        }
    )  # fmt: skip
    reasons: ClassVar[dict[Any, str]] = {Can.PACKED: "GRPOTrainer pads its rows and never packs them"}

    def references(self):
        from composer_trl.references import references

        return references()

    def evaluate(self, problem: Problem, composer: dict[str, Any], layout: Layout) -> Outcome:
        if layout.ranks > 1:
            return averaged(on_ranks(_evaluate, layout.ranks, problem, composer, layout))
        return _evaluate(problem, composer, layout)

    def run(
        self, problem: Problem, composer: dict[str, Any], layout: Layout, *, steps: int, learning_rate: float,
        resume_after: int | None = None,
    ) -> list[Outcome]:  # fmt: skip
        found = []
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            trainer = make_trainer(problem, composer, layout, folder)
            for number in range(steps):
                if number == resume_after:
                    trainer = _resumed(trainer, problem, composer, layout, folder)
                trainer.state.global_step = number
                found.append(take_step(trainer, problem, layout))
                with torch.no_grad():
                    for parameter in trainer.access.trainable().values():
                        parameter -= learning_rate * parameter.grad
                        parameter.grad = None
                _end_step(trainer)
        return found


def _evaluate(problem: Problem, composer: dict[str, Any], layout: Layout) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(problem, composer, layout, Path(folder))
        outcome = take_step(trainer, problem, layout)
    outcome.metrics = trainer.monitor.metrics.reduce(trainer.accelerator)
    return outcome


def take_step(trainer: ComposerGRPOTrainer, problem: Problem, layout: Layout) -> Outcome:
    """Losses and backward passes of one optimizer step on this rank."""
    model = trainer.model
    model.train()
    mine = of_rank(layout, trainer.accelerator.process_index)
    batches = [make_batch(problem, [problem.rows[i] for i in rows], layout) for rows in mine]
    trainer._set_denominators(batches)
    trainer.current_gradient_accumulation_steps = len(batches)
    if problem.model is None:
        model.model.calls.clear()
        model.model.seen.clear()
    loss = 0.0
    for batch in batches:
        part = trainer.compute_loss(model, batch)
        part.backward()
        loss += float(part.detach())
    outcome = Outcome(loss, *gradient_of(model), norm=norm_of(model))
    if problem.model is None:
        outcome.forwards = _forwards(model, trainer, len(batches))
        outcome.teacher_ids = read_by_teacher(model, problem)
    return outcome


def _end_step(trainer: ComposerGRPOTrainer) -> None:
    """What TRL's callbacks do at the end of an optimizer step."""
    trainer.state.global_step += 1
    trainer.monitor.on_step_end(trainer.args, trainer.state, trainer.control)


def _resumed(trainer, problem: Problem, composer: dict[str, Any], layout: Layout, folder: Path) -> ComposerGRPOTrainer:
    """Save what a checkpoint holds, and build a trainer from the first weights that loads it."""
    parts = ("sdpo_channel", "pair_channel", "monitor")
    for name in parts:
        getattr(trainer, name).save(folder)
    weights = {name: p.detach().clone() for name, p in trainer.model.state_dict().items()}
    other = make_trainer(problem, composer, layout, folder)
    other.model.load_state_dict(weights)
    for name in parts:
        getattr(other, name).load(folder)
    return other


def make_trainer(problem: Problem, composer: dict[str, Any], layout: Layout, folder: Path) -> ComposerGRPOTrainer:
    """Build the trainer of a problem, its references set to the problem's."""
    from datasets import Dataset

    composer = {name: dict(section) for name, section in composer.items()}
    if composer.get("sdpo"):  # the turns are given; no splicer has to fit this tokenizer's template
        composer["sdpo"]["hint"] = {"placement": "last_user"}
    with_pairs = composer.get("replay_dpo", {}).get("weight", 0) > 0
    if with_pairs:
        pairs = write_pairs(problem, folder / "pairs.jsonl")
        composer["replay_dpo"] |= {"pairs": str(pairs), "pairs_per_step": len(problem.pairs)}
    rows = [{"prompt": [{"role": "user", "content": words(row.prompt)}]} for row in problem.rows]
    args = ComposerGRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=len(rows), num_generations=problem.group_size, max_steps=1,
        max_completion_length=problem.width, temperature=problem.temperature, report_to="none", save_strategy="no",
        use_cpu=True, bf16=False, disable_tqdm=True, gradient_checkpointing=False, composer=composer,
        gradient_accumulation_steps=len(layout.micro_batches) // layout.ranks,
    )  # fmt: skip
    trainer = ComposerGRPOTrainer(
        model_of(problem, layout.dtype), lambda completions, **_: [0.0] * len(completions), args,
        Dataset.from_list(rows), processing_class=table_tokenizer(problem.vocabulary),
    )  # fmt: skip
    if with_pairs:
        stream = trainer.pair_channel.stream
        stream.reference = {i: (p.ref_chosen.tolist(), p.ref_rejected.tolist()) for i, p in enumerate(problem.pairs)}
    return trainer


def make_batch(problem: Problem, rows: list[Row], layout: Layout) -> dict[str, Any]:
    """Lay rows out as TRL does: prompts padded on the left, completions on the right."""
    width = max(len(row.completion) for row in rows) + layout.padding
    prompt = max(len(row.prompt) for row in rows) + layout.padding

    def right(values, fill, kind):
        return torch.tensor([[*v, *[fill] * (width - len(v))] for v in values], dtype=kind)

    def left(values, fill):
        return torch.tensor([[*[fill] * (prompt - len(v)), *v] for v in values])

    turns = [
        [
            HintedTurn(
                start=turn.start, end=turn.end, mask=list(row.sampled[turn.start : turn.end]),
                prefix_ids=list(row.hinted_context(turn)), hint="hint", kind="recorded",
            )
            for turn in row.turns
        ]
        for row in rows
    ]  # fmt: skip
    return {
        "prompt_ids": left([row.prompt for row in rows], PAD),
        "prompt_mask": left([[1] * len(row.prompt) for row in rows], 0),
        "completion_ids": right([row.completion for row in rows], PAD, torch.long),
        "completion_mask": right([[1] * len(row.completion) for row in rows], 0, torch.long),
        "tool_mask": right([[int(s) for s in row.sampled] for row in rows], 0, torch.long),
        "old_per_token_logps": right([row.old_logprobs for row in rows], layout.fill, torch.float32),
        "advantages": torch.tensor([row.advantage for row in rows], dtype=torch.float32),
        "num_items_in_batch": torch.tensor(float(sum(sum(row.sampled) for row in problem.rows))),
        TURNS: turns,
    }


def _forwards(model, trainer, batches: int) -> dict[str, int]:
    calls = model.model.calls
    pairs = batches if trainer.pair_channel is not None else 0
    return {"student": calls["student"] - pairs, "teacher": calls["teacher"], "pairs": pairs}
