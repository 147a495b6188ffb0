"""What a run says about its channels: metrics per optimizer step, gradient norms, silence, token views."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from composer_plugins.channels.base import Term
from composer_plugins.channels.levels import SignalLevel
from composer_plugins.channels.silence import SilenceMonitor
from composer_plugins.config import ComposerConfig
from composer_trl.step_metrics import GradientProbe, StepMetrics

if TYPE_CHECKING:
    from composer_trl.hinted_turns import HintedTurn
    from composer_trl.sdpo_channel import SDPOChannel
    from composer_trl.trainer import ComposerGRPOTrainer

logger = logging.getLogger(__name__)

STATE_FILE = "composer_state.json"
#: What each hint source found nothing of, for the warning.
LOOKED_FOR = {
    "recorded": "no `hint` in the dataset's rows",
    "rollout": "no tool result that classifies as a failure",
    "feedback": "no `feedback` logged by a reward function",
    "sibling": "no group with both a success and a failure",
}
CONTEXT_SHOWN = 6000  # characters of a context message kept in a token view


class StepMonitor(TrainerCallback):
    """Collects what the channels did in an optimizer step and closes the step.

    Args:
        config: the whole `composer` section.
        trainer: the trainer it watches.
    """

    def __init__(self, config: ComposerConfig, trainer: ComposerGRPOTrainer) -> None:
        self.config, self.trainer = config, trainer
        self.weights = {
            "policy": config.policy.weight, "sdpo": config.sdpo.weight, "replay_dpo": config.replay_dpo.weight,
            **{extra.name: extra.weight for extra in trainer.extra},
        }  # fmt: skip
        self.channels = [name for name, weight in self.weights.items() if weight > 0]
        totals = {f"{c}/loss" for c in self.channels} | {"policy/active_tokens"}
        means = set()
        if config.policy.objective != "host":
            means |= {"entropy", "policy/clip_fraction", "policy/ratio", "policy/kl"}
        if "sdpo" in self.channels:
            totals |= {"sdpo/tokens", "sdpo/active_tokens", "sdpo/hinted_turns", "sdpo/too_long"}
            means |= {"sdpo/divergence", "sdpo/is_weight"}
        if "replay_dpo" in self.channels:
            totals |= {"replay_dpo/pairs"}
            means |= {f"replay_dpo/{m}" for m in ("accuracy", "margin", "chosen_shift", "rejected_shift")}
        totals |= {extra.spec.activity for extra in trainer.extra}
        self.metrics = StepMetrics(totals, means)
        self.probe = GradientProbe(list(trainer.access.trainable().values()))
        self.silence = SilenceMonitor(config.monitor.silent_after, config.monitor.on_silence)
        self.notes: list[str] = []
        self._views_left = config.monitor.token_view

    # Called by the channels, per micro-batch

    def policy(self, term: Term, mask: torch.Tensor) -> None:
        """Record the policy term's own metrics."""
        self._means(term, ("policy/clip_fraction", "policy/ratio", "policy/kl"), float(mask.sum()))

    def sdpo(
        self, term: Term, turns: list[tuple[int, HintedTurn]], divergence: torch.Tensor, channel: SDPOChannel
    ) -> None:
        """Record an sdpo term, and the first few of its error turns token by token."""
        self.metrics.add("sdpo/hinted_turns", len(turns))
        for name in ("sdpo/tokens", "sdpo/active_tokens"):
            self.metrics.add(name, term.metrics[name])
        self._means(term, ("sdpo/divergence", "sdpo/is_weight"), term.metrics["sdpo/tokens"])
        if self.trainer.token_view_sink is not None:
            self._token_views(turns, divergence, channel)

    def pairs(self, term: Term, count: int) -> None:
        """Record a replay_dpo term."""
        self.metrics.add("replay_dpo/pairs", count)
        self._means(term, [f"replay_dpo/{m}" for m in ("accuracy", "margin", "chosen_shift", "rejected_shift")], count)

    def extra(self, term: Term, mask: torch.Tensor) -> None:
        """Record the term of a plugin's channel: its activity as a total, its other metrics as means over tokens."""
        for name, value in term.metrics.items():
            if self.metrics.knows_total(name):
                self.metrics.add(name, value)
            else:
                self.metrics.declare_mean(name)
                self.metrics.mean(name, value, float(mask.sum()))

    def micro_batch(self, parts: dict[str, torch.Tensor]) -> None:
        """Record the scaled loss of each channel; measure its gradient when this step is probed."""
        world = self.trainer.accelerator.num_processes
        for name, part in parts.items():
            if self.weights[name] > 0:
                self.metrics.add(f"{name}/loss", part.detach() / world / self.weights[name])
        if self._probing():
            for name, part in parts.items():
                if self.weights[name] > 0:
                    self.probe.add(name, part)

    def note(self, text: str, seconds: float) -> None:
        """Keep one line about what happened outside the steps."""
        self.notes.append(f"{text} in {seconds:.1f} s")
        logger.info("%s", self.notes[-1])

    def _means(self, term: Term, names, weight: float) -> None:
        for name in names:
            if name in term.metrics:
                self.metrics.mean(name, term.metrics[name], weight)

    def _probing(self) -> bool:
        every = self.config.monitor.grad_norms_every
        return every > 0 and self.trainer.state.global_step % every == 0

    # Called by the Trainer

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        if self.trainer.pair_channel is not None:
            self.trainer.pair_channel.begin()

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer.sdpo_channel is not None:
            trainer.sdpo_channel.teacher.update()
        if trainer.pair_channel is not None:
            trainer.pair_channel.step_end()
        values = self.metrics.reduce(trainer.accelerator)
        every = self.config.monitor.grad_norms_every
        if every > 0 and (state.global_step - 1) % every == 0:
            for name, norm in self.probe.norms(trainer.accelerator, self.channels).items():
                values[f"{name}/grad_norm"] = norm
        self._watch(values)
        for name, value in values.items():
            if not math.isnan(value):
                trainer._metrics["train"][name].append(value)
        self._views_left = self.config.monitor.token_view

    def _watch(self, values: dict[str, float]) -> None:
        if "policy" in self.channels:
            why = "every group of the step had equal rewards, so all advantages are zero"
            self.silence.update("policy", values["policy/active_tokens"], why=why)
        if "sdpo" in self.channels:
            turns = values["sdpo/hinted_turns"]
            why = f"{turns:.0f} turns had a hint, but it did not change the teacher (zero divergence)"
            if not turns:
                looked = "; ".join(LOOKED_FOR[source] for source in self.config.sdpo.hint.sources)
                why = f"no turn of the rollouts had a hint ({looked})"
            self.silence.update("sdpo", values["sdpo/active_tokens"], why=why)
        if "replay_dpo" in self.channels:
            self.silence.update("replay_dpo", values["replay_dpo/pairs"], why="no pair was drawn")
        for extra in self.trainer.extra:
            why = f"its metric {extra.spec.activity} was 0"
            self.silence.update(extra.name, values[extra.spec.activity], why=why)

    def _token_views(self, turns, divergence: torch.Tensor, channel: SDPOChannel) -> None:
        from composer_plugins.report.run_folder import TokenView, ViewMessage

        tokenizer, position = self.trainer._tokenizer, 0
        for _, turn in turns:
            active = sum(turn.mask)
            shown = divergence[position : position + active]
            # only the sampled log-ratio is signed; a divergence below 0 is rounding
            values = iter((shown if channel.level is SignalLevel.SAMPLED else shown.clamp(min=0)).tolist())
            position += active
            if self._views_left <= 0:
                return
            self._views_left -= 1
            self.trainer.token_view_sink(
                TokenView(
                    step=self.trainer.state.global_step + 1,
                    kind=turn.kind,
                    state_id=str(turn.row.get("state_id", "")),
                    tokens=[tokenizer.decode([i]) for i in turn.token_ids],
                    divergence=[next(values) if m else 0.0 for m in turn.mask],
                    mask=turn.mask,
                    hint=turn.hint,
                    error=turn.error,
                    error_class=turn.error_class,
                    teacher=self.config.sdpo.teacher.kind,
                    level=str(channel.level),
                    messages=[
                        ViewMessage(
                            role=m["role"],
                            content=str(m.get("content") or m.get("tool_calls"))[:CONTEXT_SHOWN],
                        )
                        for m in turn.messages
                    ],
                    action_turn=turn.label,
                    source_ref=turn.row.get("source_ref"),
                )
            )

    # Called by the trainer

    def save(self, folder: Path) -> None:
        """Write the silence counters into a checkpoint folder."""
        (folder / STATE_FILE).write_text(json.dumps(self.silence.state_dict()))

    def load(self, folder: Path) -> None:
        """Restore the silence counters; a checkpoint of plain TRL has none."""
        path = folder / STATE_FILE
        if path.exists():
            self.silence.load_state_dict(json.loads(path.read_text()))

    def close(self) -> None:
        """Forget a step that was interrupted half way."""
        self.metrics.reset()
