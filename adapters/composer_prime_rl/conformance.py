"""The prime-rl adapter under the conformance suite, in an environment with prime-rl's source on the path:

    make test-prime-rl PRIME_RL=/path/to/prime-rl            # sets it up and runs this too
    composer-rl conformance prime_rl                         # where `import prime_rl` works

A problem becomes packed samples with the streams that our environment and pair sender stamp, by their own code, and
prime-rl's own `compute_loss` is called on them. Metrics are what trainer, environment and pair sender report together.
What finds error turns, scores hints and packs is tested in `tests/prime_rl`.
"""

from __future__ import annotations

import os
from collections import Counter
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from composer_plugins.conformance.adapter import AdapterConformance
from composer_plugins.conformance.capabilities import Capability as Can
from composer_plugins.conformance.problem import Layout, Outcome, PairOfRows, Problem, Row, Turn
from composer_plugins.conformance.ranks import of_rank, on_ranks, summed
from composer_plugins.conformance.real_model import gradient_of, model_of, norm_of
from composer_plugins.conformance.table_model import token_logprobs
from composer_plugins.errors import UnsupportedError

GARBAGE = "prime-rl's own ref_kl component multiplies by its mask, and 0 * nan is nan"
TOKENS = "prime-rl divides by the tokens of the step; `tokens_per_sample` approximates it"
SAMPLING = "vLLM scores prompts at temperature 1 only, so the environment stamps nothing at another one"


class TestPrimeRL(AdapterConformance):
    """prime-rl's `compute_loss` with our loss and our streams (sdpo_route: ref_kl; pairs as signed ce weights)."""

    capabilities: ClassVar[frozenset] = frozenset(
        {
            Can.SAMPLED, Can.ACCUMULATION, Can.PACKED, Can.ADVANTAGE_FORM, Can.LIVE_TEACHER, Can.RESUME, Can.MONITOR,
            Can.BF16, Can.MULTI_RANK,
        }
    )  # fmt: skip
    reasons: ClassVar[dict[Any, str]] = {
        **dict.fromkeys((Can.TOPK, Can.FULL), "one log-prob per token reaches prime-rl's trainer"),
        **dict.fromkeys((Can.EMA_TEACHER, Can.REFERENCE_TEACHER), "the inference server holds the policy and nothing else"),
        **dict.fromkeys(("objective grpo", "objective gspo", "objective dr_grpo", "objective bnpo"), TOKENS),
        Can.OFF_POLICY_SDPO: "prime-rl's ref_kl component has an uncapped ratio and a term of its own (docs/parity.md)",
        Can.PADDED: "prime-rl packs samples and never pads",
        Can.PAIRWISE: "compute_loss is given one sample at a time",
        Can.FORWARDS: "the model runs in prime-rl's trainer and inference server, not in compute_loss",
    }  # fmt: skip
    #: Means over the step's tokens; prime-rl divides by tokens, so means over sequences are approximate
    #: (`tokens_per_sample`).
    objectives: ClassVar[tuple[str, ...]] = ("dapo", "cispo")
    loss_is_a_surrogate: ClassVar[bool] = True
    surrogate: ClassVar[str] = "`sdpo_route: ref_kl` reports prime-rl's own value of its component"
    deviations: ClassVar[dict[str, str]] = {
        "test_sdpo_at_a_temperature[sampled]": SAMPLING,
        "test_garbage_under_the_mask_reaches_nothing[nan]": GARBAGE,
        "test_garbage_under_the_mask_reaches_nothing[inf]": GARBAGE,
        "test_garbage_under_the_mask_reaches_nothing[-inf]": GARBAGE,
    }

    def evaluate(self, problem: Problem, composer: dict[str, Any], layout: Layout) -> Outcome:
        if layout.ranks > 1:  # prime-rl's trainer adds gradients up, its scales count the tokens of all ranks
            return summed(on_ranks(_on_rank, layout.ranks, problem, composer, layout))
        return self._step(model_of(problem, layout.dtype), problem, composer, layout)

    def run(
        self, problem: Problem, composer: dict[str, Any], layout: Layout, *, steps: int, learning_rate: float,
        resume_after: int | None = None,
    ) -> list[Outcome]:  # fmt: skip
        """Nothing of ours is in prime-rl's checkpoints: the live teacher follows from the weights."""
        from composer_prime_rl.silent_rollouts import SilentRollouts

        model, found = model_of(problem, layout.dtype), []
        silent = SilentRollouts(composer.get("monitor", {}).get("silent_after", 5) * len(problem.rows))
        for number in range(steps):
            if number == resume_after:
                saved, model = model.state_dict(), model_of(problem, layout.dtype)
                model.load_state_dict(saved)
            found.append(self._step(model, problem, composer, layout))
            with torch.no_grad():
                for parameter in (p for p in model.parameters() if p.grad is not None):
                    parameter -= learning_rate * parameter.grad
            model.zero_grad()
            for row in problem.rows:  # as the environment counts a rollout
                hinted = sum(sum(row.sampled[t.start : t.end]) for t in row.turns)
                silent.update(Counter(turns=1, hinted_turns=len(row.turns), active_tokens=hinted))
        return found

    @staticmethod
    def _step(model, problem: Problem, composer: dict[str, Any], layout: Layout, rank: int = 0) -> Outcome:
        from prime_rl.configs.trainer import CustomLossConfig
        from prime_rl.trainer.rl import loss as host

        sdpo, replay = composer.get("sdpo", {}), composer.get("replay_dpo", {})
        if sdpo.get("weight", 0) > 0 and problem.temperature != 1:
            raise UnsupportedError("The environment stamps no reference log-probs at another temperature than 1.")
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
        loss, metrics, seen, weights = 0.0, {}, Counter(), []
        for number, rows in enumerate(of_rank(layout, rank)):
            samples = [_rollout(problem, model, problem.rows[i], sdpo.get("weight", 0.0), seen) for i in rows]
            if number == rank == 0 and replay.get("weight", 0) > 0:
                for pair in problem.pairs:
                    samples += _pair(model, pair, replay, action_tokens / len(problem.pairs), weights)
            part, found = host.compute_loss(**_streams(samples), rl_loss_fn=rl_loss, **scales)
            part.backward()
            loss += float(part.detach())
            for name, values in found.items():
                metrics[name] = metrics.get(name, 0.0) + float(values.detach().float().sum())
        return Outcome(
            loss, *gradient_of(model), metrics | _orchestrator(sdpo, seen, weights, action_tokens), norm=norm_of(model)
        )


def _on_rank(problem: Problem, composer: dict[str, Any], layout: Layout) -> Outcome:
    rank = int(os.environ["RANK"])
    return TestPrimeRL._step(model_of(problem, layout.dtype), problem, composer, layout, rank)


def loss_kwargs(composer: dict[str, Any]) -> dict[str, Any]:
    """What `[trainer.loss.kwargs]` says: the section without what the orchestrator's side reads."""
    policy = {key: value for key, value in composer["policy"].items() if key != "length_constant"}
    sdpo = {key: value for key, value in composer.get("sdpo", {}).items() if key in ("weight", "level", "teacher")}
    if policy.get("weight") == 0 and not sdpo.get("weight"):
        sdpo = {"weight": 1.0, "teacher": {"kind": "live"}}  # a section in which nothing is trained is refused
    return {"composer": {"policy": policy, "sdpo": sdpo}, "sdpo_route": "ref_kl"}


def _streams(samples: list[dict[str, torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
    return {name: [sample[name] for sample in samples] for name in samples[0]}


def _orchestrator(sdpo: dict[str, Any], seen: Counter, weights: list, tokens: int) -> dict[str, float]:
    """What environment and pair sender report of the step."""
    from composer_prime_rl.pair_sender import _metrics
    from composer_prime_rl.stamping import _record

    found: dict[str, float] = {}
    if sdpo.get("weight", 0) > 0:
        _record(SimpleNamespace(record_metric=found.__setitem__), seen)
    return found | (_metrics(weights, tokens) if weights else {})


def _rollout(problem: Problem, model, row: Row, weight: float, seen: Counter) -> dict[str, torch.Tensor]:
    mask, reference = torch.tensor(row.sampled), torch.zeros(len(row.completion))
    kl_weights = torch.zeros(len(row.completion))
    for turn in row.turns if weight > 0 else ():
        span = slice(turn.start, turn.end)
        with torch.no_grad():
            taught = token_logprobs(model, row.hinted_context(turn), row.completion[span])
        node = _stamped(row, turn, taught.tolist(), weight, seen)
        reference[span][mask[span]] = torch.tensor(node.reference_logprobs)
        kl_weights[span] = torch.tensor(node.loss_weights["ref_kl"])
    logprobs = token_logprobs(model, row.prompt, row.completion, temperature=problem.temperature)
    return {
        "trainer_logprobs": logprobs,
        "inference_logprobs": torch.tensor(row.old_logprobs, dtype=torch.float32),
        "ref_logprobs": reference,
        "advantages": torch.full((len(row.completion),), row.advantage),
        "loss_mask": mask,
        "rl_weights": mask.float(),
        "ce_weights": torch.zeros(len(row.completion)),
        "ref_kl_weights": kl_weights,
    }


def _stamped(row: Row, turn: Turn, taught: list[float], weight: float, seen: Counter):
    """The turn's message node after the environment's stamper wrote on it."""
    import verifiers.v1 as vf

    from composer_plugins.config import SDPOConfig
    from composer_prime_rl.stamping import Stamper

    own = list(row.sampled[turn.start : turn.end])
    sampled = [value for value, kept in zip(row.old_logprobs[turn.start : turn.end].tolist(), own, strict=True) if kept]
    node = vf.MessageNode(
        parent=None, message={"role": "assistant", "content": ""}, sampled=True,
        token_ids=list(row.completion[turn.start : turn.end]), mask=own, logprobs=sampled,
    )  # fmt: skip
    config = SDPOConfig(weight=weight, level="sampled", teacher={"kind": "live"})
    seen.update(turns=1, hinted_turns=1, scored_turns=1)
    Stamper(config, "ref_kl", None, 0.0)._stamp(node, taught, 0, seen)
    return node


def _pair(
    model, pair: PairOfRows, replay: dict[str, Any], per_pair: float, weights: list
) -> list[dict[str, torch.Tensor]]:
    """Both actions as samples of the ce component: signed weights that undo its division by tokens."""
    from composer_plugins.config import ReplayDPOConfig
    from composer_prime_rl.pair_weights import pair_weights

    actions, references = (pair.chosen, pair.rejected), (pair.ref_chosen.tolist(), pair.ref_rejected.tolist())
    logprobs = [token_logprobs(model, pair.context, action) for action in actions]
    config = ReplayDPOConfig(**{k: v for k, v in replay.items() if k != "form"})
    found = pair_weights(config, *(values.tolist() for values in logprobs), *references)
    weights.append(found)
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
