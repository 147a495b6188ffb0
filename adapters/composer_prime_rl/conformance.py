"""The prime-rl adapter under the conformance suite, in an environment with prime-rl's source on the path:

    make test-prime-rl PRIME_RL=/path/to/prime-rl            # sets it up and runs this too
    composer-rl conformance prime_rl                         # where `import prime_rl` works

A problem becomes packed samples with the streams that our environment and pair sender stamp, and prime-rl's own
`compute_loss` is called on them. What finds error turns, scores hints and packs is tested in `tests/prime_rl`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from composer_plugins.conformance.adapter import AdapterConformance
from composer_plugins.conformance.capabilities import Capability as Can
from composer_plugins.conformance.problem import Layout, Outcome, PairOfRows, Problem, Row
from composer_plugins.conformance.table_model import TableLM, table_model, token_logprobs
from composer_plugins.errors import UnsupportedError

ORCHESTRATOR = "channels 2 and 3 are stamped and reported by the orchestrator's side (environment, pair task set)"
GARBAGE = "prime-rl's own ref_kl component multiplies by its mask, and 0 * nan is nan"
SAMPLING = "vLLM scores prompts at temperature 1 only, so the environment stamps nothing at another one"


class TestPrimeRL(AdapterConformance):
    """prime-rl's `compute_loss` with our loss and our streams (sdpo_route: ref_kl; pairs as signed ce weights)."""

    capabilities: ClassVar[frozenset] = frozenset({Can.SAMPLED, Can.ACCUMULATION, Can.PACKED, Can.ADVANTAGE_FORM})
    #: Means over the step's tokens; prime-rl divides by tokens, so means over sequences are approximate
    #: (`tokens_per_sample`).
    objectives: ClassVar[tuple[str, ...]] = ("dapo", "cispo")
    loss_is_a_surrogate: ClassVar[bool] = True
    deviations: ClassVar[dict[str, str]] = {
        "test_sdpo_at_a_temperature[sampled]": SAMPLING,
        "test_garbage_under_the_mask_reaches_nothing[nan]": GARBAGE,
        "test_garbage_under_the_mask_reaches_nothing[inf]": GARBAGE,
        "test_garbage_under_the_mask_reaches_nothing[-inf]": GARBAGE,
        "test_metrics_have_the_neutral_names": ORCHESTRATOR,
        "test_counts_are_the_steps_counts": ORCHESTRATOR,
    }

    def evaluate(self, problem: Problem, composer: dict[str, Any], layout: Layout) -> Outcome:
        from prime_rl.configs.trainer import CustomLossConfig
        from prime_rl.trainer.rl import loss as host

        sdpo, replay = composer.get("sdpo", {}), composer.get("replay_dpo", {})
        if sdpo.get("weight", 0) > 0 and problem.temperature != 1:
            raise UnsupportedError("The environment stamps no reference log-probs at another temperature than 1.")
        model = table_model(problem)
        rl_loss = host.setup_rl_loss_fn(
            CustomLossConfig(
                type="custom", import_path="composer_prime_rl.loss.composer_loss", kwargs=loss_kwargs(composer)
            )
        )
        tokens = [sum(row.sampled) for row in problem.rows]
        hinted = sum(sum(r.sampled[t.start : t.end]) for r in problem.rows for t in r.turns)
        action_tokens = sum(len(p.chosen) + len(p.rejected) for p in problem.pairs)
        scales = {
            "rl_scale": max(sum(tokens), 1), "ref_kl_scale": max(hinted, 1), "ce_scale": max(action_tokens, 1),
        }  # fmt: skip
        loss, metrics = 0.0, {}
        for number, rows in enumerate(layout.micro_batches):
            samples = [_rollout(problem, model, problem.rows[i], sdpo.get("weight", 0.0)) for i in rows]
            if number == 0 and replay.get("weight", 0) > 0:
                for pair in problem.pairs:
                    samples += _pair(model, pair, replay, action_tokens / len(problem.pairs))
            part, found = host.compute_loss(**_streams(samples), rl_loss_fn=rl_loss, **scales)
            part.backward()
            loss += float(part.detach())
            for name, values in found.items():
                metrics[name] = metrics.get(name, 0.0) + float(values.float().sum())
        gradients = (model.model.table.weight.grad, model.model.hinted.weight.grad)
        table, hint = (torch.zeros(problem.table.shape) if g is None else g for g in gradients)
        return Outcome(loss, table.double().numpy(), hint.double().numpy(), metrics)


def loss_kwargs(composer: dict[str, Any]) -> dict[str, Any]:
    """What `[trainer.loss.kwargs]` says: the section without what the orchestrator's side reads."""
    policy = {key: value for key, value in composer["policy"].items() if key != "length_constant"}
    sdpo = {key: value for key, value in composer.get("sdpo", {}).items() if key in ("weight", "level", "teacher")}
    if policy.get("weight") == 0 and not sdpo.get("weight"):
        sdpo = {"weight": 1.0, "teacher": {"kind": "live"}}  # a section in which nothing is trained is refused
    return {"composer": {"policy": policy, "sdpo": sdpo}, "sdpo_route": "ref_kl"}


def _streams(samples: list[dict[str, torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
    return {name: [sample[name] for sample in samples] for name in samples[0]}


def _rollout(problem: Problem, model: TableLM, row: Row, weight: float) -> dict[str, torch.Tensor]:
    mask, hinted = torch.tensor(row.sampled), torch.zeros(len(row.completion), dtype=torch.bool)
    for turn in row.turns:
        hinted[turn.start : turn.end] = mask[turn.start : turn.end]
    with torch.no_grad():
        teacher = token_logprobs(model, row.previous, row.completion, temperature=problem.temperature, hinted=True)
    logprobs = token_logprobs(model, row.previous, row.completion, temperature=problem.temperature)
    return {
        "trainer_logprobs": logprobs,
        "inference_logprobs": torch.tensor(row.old_logprobs, dtype=torch.float32),
        "ref_logprobs": torch.where(hinted, teacher, 0.0),
        "advantages": torch.full((len(row.completion),), row.advantage),
        "loss_mask": mask,
        "rl_weights": mask.float(),
        "ce_weights": torch.zeros(len(row.completion)),
        "ref_kl_weights": hinted.float() * weight,
    }


def _pair(model: TableLM, pair: PairOfRows, replay: dict[str, Any], per_pair: float) -> list[dict[str, torch.Tensor]]:
    """Both actions as samples of the ce component: signed weights that undo its division by tokens."""
    from composer_plugins.config import ReplayDPOConfig
    from composer_prime_rl.pair_weights import pair_weights

    actions, references = (pair.chosen, pair.rejected), (pair.ref_chosen.tolist(), pair.ref_rejected.tolist())
    logprobs = [token_logprobs(model, (pair.context[-1], *action[:-1]), action) for action in actions]
    config = ReplayDPOConfig(**{k: v for k, v in replay.items() if k != "form"})
    found = pair_weights(config, *(values.tolist() for values in logprobs), *references)
    samples = []
    for values, weight in zip(logprobs, (found.chosen, found.rejected), strict=True):
        zeros = torch.zeros_like(values.detach())
        samples.append(
            {
                "trainer_logprobs": values, "inference_logprobs": values.detach(), "ref_logprobs": zeros,
                "advantages": zeros, "loss_mask": torch.ones_like(zeros, dtype=torch.bool), "rl_weights": zeros,
                "ce_weights": zeros + weight * config.weight * per_pair, "ref_kl_weights": zeros,
            }
        )  # fmt: skip
    return samples
