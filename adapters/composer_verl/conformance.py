"""The verl adapter under the conformance suite: `composer-rl conformance verl`, in verl's environment.

A problem becomes micro-batches as verl's engine hands them to a loss function (jagged, log-probs shifted by one), and
`composer_loss` is called as its workers call it: losses of micro-batches add up, gradients of ranks are averaged. What
the driver puts into a batch (teacher log-probs, references) is computed from the problem here. `TestVerlEngine` does the same
through verl's real workers, where there is an engine for the device. Ray and dispatch are tested in `tests/verl`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from composer_plugins.conformance.adapter import AdapterConformance
from composer_plugins.conformance.capabilities import Capability as Can
from composer_plugins.conformance.problem import Layout, Outcome, PairOfRows, Problem, Row
from composer_plugins.conformance.real_model import gradient_of, model_of, norm_of
from composer_plugins.conformance.table_model import token_logits
from composer_verl.engine_conformance import LOGITS, TestVerlEngine

__all__ = ["TestVerl", "TestVerlEngine"]

ENGINE = "belongs to verl's engine: see TestVerlEngine"


class TestVerl(AdapterConformance):
    """verl's actor loss with our channels."""

    capabilities: ClassVar[frozenset] = frozenset(
        {
            Can.SAMPLED,
            Can.TOPK,
            Can.SEQUENCE_RATIO,
            Can.OFF_POLICY_SDPO,
            Can.ACCUMULATION,
            Can.MULTI_RANK,
            Can.PAIRWISE,
            Can.ADVANTAGE_FORM,
            Can.BF16,
        }
    )

    reasons: ClassVar[dict[Any, str]] = {
        Can.FULL: LOGITS,
        **dict.fromkeys(
            (Can.PADDED, Can.PACKED, Can.FORWARDS, Can.LIVE_TEACHER, Can.EMA_TEACHER, Can.REFERENCE_TEACHER, Can.RESUME, Can.MONITOR),
            ENGINE,
        ),
    }  # fmt: skip

    def references(self):
        from composer_verl.references import references

        return references()

    def evaluate(self, problem: Problem, composer: dict[str, Any], layout: Layout) -> Outcome:
        from composer_verl.channel_loss import composer_loss

        section, actor = configuration(composer, pairs=len(problem.pairs))
        model, loss, found = model_of(problem, layout.dtype), 0.0, []
        for number, rows in enumerate(layout.micro_batches):
            pairs = problem.pairs if number == 0 and section.replay_dpo.weight > 0 else ()
            data, outputs = micro_batch(problem, section, model, [problem.rows[i] for i in rows], pairs, layout)
            if "logits" in outputs:  # level topk: the engine shows the loss the logits first
                shown = composer_loss(actor, section, student_logits=outputs.pop("logits")[None], data=data)
                outputs |= {name: _like(value[0], outputs["log_probs"]) for name, value in shown.items()}
            part, metrics = composer_loss(actor, section, outputs, data)
            (part / layout.ranks).backward()
            loss += float(part.detach()) / layout.ranks
            found.append({name.removeprefix("actor/"): value for name, value in metrics.items()})
        return Outcome(loss, *gradient_of(model), _totals(found, layout.ranks), norm=norm_of(model))


def configuration(composer: dict[str, Any], *, pairs: int):
    """Return our parsed section and verl's `ActorConfig` that goes with it."""
    from verl.workers.config import ActorConfig

    from composer_plugins.config import parse_section
    from composer_verl.options import ComposerPolicyLossConfig
    from composer_verl.section import PREFIX, TRAINER_MODE

    composer = {name: dict(section) for name, section in composer.items()}
    if composer.get("replay_dpo", {}).get("weight", 0) > 0:
        # the rows are put into the batch below
        composer["replay_dpo"] |= {"pairs": "given", "pairs_per_step": pairs}
    section = parse_section(composer)
    loss = ComposerPolicyLossConfig(
        loss_mode=PREFIX + section.policy.objective, composer=composer, trainer_mode=TRAINER_MODE
    )
    return section, ActorConfig(strategy="fsdp2", rollout_n=2, ppo_micro_batch_size_per_gpu=2, policy_loss=loss)


def micro_batch(problem: Problem, section, model, rows: list[Row], pairs, layout: Layout):
    """Return (data, model output) of one micro-batch: its rollouts, then both rows of each of `pairs`."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu

    from composer_verl.fields import SDPO_TOKENS
    from composer_verl.pair_fields import stacked

    hinted = sum(sum(r.sampled[t.start : t.end]) for r in problem.rows for t in r.turns)
    samples = [_rollout(problem, section, model, row) for row in rows]
    for number, pair in enumerate(pairs):
        samples += [_pair_row(pair, number, side, samples[0]) for side in (0, 1)]
    data: TensorDict = stacked(samples)
    data[SDPO_TOKENS] = torch.full((len(samples),), float(hinted))
    tu.assign_non_tensor(
        data,
        dp_size=layout.ranks,
        batch_num_tokens=max(sum(sum(row.sampled) for row in problem.rows), 1),
        global_batch_size=len(problem.rows),
    )
    temperatures = [problem.temperature] * len(rows) + [1.0] * (2 * len(pairs))
    logits = [
        model(input_ids=ids[None]).logits[0].float() / temperature
        for ids, temperature in zip(data["input_ids"].unbind(), temperatures, strict=True)
    ]
    log_probs = []
    for row, ids in zip(logits, data["input_ids"].unbind(), strict=True):
        scored = torch.log_softmax(row[:-1], -1).gather(-1, ids[1:, None])[:, 0]
        log_probs.append(torch.cat([scored, scored.new_zeros(1)]))  # shifted to the left, as verl returns them
    outputs = {"log_probs": torch.nested.as_nested_tensor(log_probs, layout=torch.jagged)}
    if section.sdpo.weight > 0 and section.sdpo.level == "topk":
        outputs["logits"] = torch.cat(logits)
    return data, outputs


def _rollout(problem: Problem, section, model, row: Row) -> dict[str, torch.Tensor]:
    from composer_verl.fields import SDPO_MASK, SDPO_TEACHER
    from composer_verl.pair_fields import text_fields

    size = len(row.completion)
    hinted = torch.zeros(size, dtype=torch.bool)
    teacher = torch.zeros(size, problem.vocabulary)
    for turn in row.turns:
        span = slice(turn.start, turn.end)
        hinted[span] = torch.tensor(row.sampled[span])
        with torch.no_grad():
            logits = token_logits(model, row.hinted_context(turn), row.completion[span]) / problem.temperature
        teacher[span] = torch.log_softmax(logits, -1)
    fields = text_fields(list(row.prompt), list(row.completion))
    fields["response_mask"] = fields["loss_mask"] = torch.tensor(row.sampled).long()
    fields["old_log_probs"] = torch.tensor(row.old_logprobs, dtype=torch.float32)
    fields["advantages"] = torch.full((size,), row.advantage)
    fields[SDPO_MASK] = hinted.long()
    chosen = teacher.gather(-1, torch.tensor(row.completion)[:, None])[:, 0]
    fields[SDPO_TEACHER] = torch.where(hinted, chosen, 0.0)
    if section.sdpo.weight > 0 and section.sdpo.level == "topk":
        with torch.no_grad():
            student = torch.log_softmax(token_logits(model, row.prompt, row.completion) / problem.temperature, -1)
        fields |= _topk_fields(section, student, teacher, hinted)
    if section.replay_dpo.weight > 0:
        from composer_verl.pair_loss import PAIR_REFERENCE, PAIR_ROW, PAIR_WEIGHT, ROLLOUT

        fields |= {
            PAIR_ROW: torch.tensor(ROLLOUT), PAIR_REFERENCE: torch.zeros(size), PAIR_WEIGHT: torch.tensor(0.0),
        }  # fmt: skip
    return fields


def _topk_fields(section, student, teacher, hinted) -> dict[str, torch.Tensor]:
    """The k entries of the side that the section names, and the teacher's log-probs of them."""
    from composer_verl.fields import SDPO_TOPK_IDS, SDPO_TOPK_TEACHER

    ids = (student if section.sdpo.top_k_of == "student" else teacher).topk(section.sdpo.top_k, -1).indices
    kept = hinted[:, None]
    return {SDPO_TOPK_IDS: ids * kept, SDPO_TOPK_TEACHER: teacher.gather(-1, ids) * kept}


def _pair_row(pair: PairOfRows, number: int, side: int, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A pair's row with a neutral value in every field that rollouts have."""
    from composer_verl.pair_fields import text_fields
    from composer_verl.pair_loss import PAIR_REFERENCE, PAIR_ROW, PAIR_WEIGHT

    action, reference = ((pair.chosen, pair.ref_chosen), (pair.rejected, pair.ref_rejected))[side]
    fields = {
        name: value.new_zeros((len(action), *value.shape[1:])) for name, value in like.items() if value.dim()
    } | text_fields(list(pair.context), list(action))
    fields[PAIR_ROW], fields[PAIR_WEIGHT] = torch.tensor(2 * number + side), torch.tensor(pair.weight)
    fields[PAIR_REFERENCE] = torch.tensor(reference, dtype=torch.float32)
    return fields


def _like(flat: torch.Tensor, nested: torch.Tensor) -> torch.Tensor:
    """Lay a value per token out as rows."""
    return torch.nested.nested_tensor_from_jagged(flat, nested.offsets())


def _totals(found: list[dict[str, Any]], ranks: int) -> dict[str, float]:
    """What verl's aggregation makes of the micro-batches: sums are added and averaged over ranks, means are means."""
    totals: dict[str, list] = {}
    for metrics in found:
        for name, metric in metrics.items():
            totals.setdefault(name, []).append(metric)
    result = {}
    for name, metrics in totals.items():
        values = [float(m.aggregate()) if hasattr(m, "aggregate") else float(m) for m in metrics]
        summed = any("sum" in str(getattr(m, "aggregation", "")).lower() for m in metrics)
        result[name] = sum(values) / ranks if summed else sum(values) / len(values)
    return result
