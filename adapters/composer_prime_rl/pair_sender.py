"""Sends recorded pairs straight to prime-rl's trainer through its filesystem transport: channel 3 alone (our addition).

No orchestrator and no inference server: each step's pairs are scored under the very weights that the trainer broadcast
before it, so DPO is exact at every step. prime-rl divides the ce component by its token count, which the sender knows, so
the step's loss is `weight` times the mean over its pairs. The trainer needs `rollout_transport.type = "filesystem"`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from prime_rl.trainer.batch import build_bin_cost, prepare_batch
from prime_rl.transports.rollouts import FileSystemMicroBatchSender, TrainingSample

from composer_plugins.channels.pair_stream import PairStream, TokenizedPair
from composer_plugins.config import ReplayDPOConfig
from composer_plugins.errors import ConfigError, ModelError
from composer_prime_rl.pair_weights import PairWeights, pair_weights

#: (token ids, position of the first scored token) -> log-probs from there on, nats at temperature 1.
Scorer = Callable[[list[int], int], list[float]]
Scored = tuple[list[float], list[float]]


class PairSender:
    """Deals out the pairs of a run, one file per data rank and step.

    Args:
        config: the `replay_dpo` section.
        stream: its pairs, with reference log-probs for all that are drawn.
        output_dir: of the trainer.
        seq_len: the trainer's `model.seq_len`; a longer pair would be cut, so it is refused.
        data_world_size: data-parallel ranks of the trainer.
        first_step: the trainer's first step.

    Raises:
        ConfigError: a pair is longer than `seq_len`.
    """

    def __init__(
        self, config: ReplayDPOConfig, stream: PairStream, output_dir: Path, *, seq_len: int, data_world_size: int = 1,
        first_step: int = 1,
    ) -> None:  # fmt: skip
        self.config, self.stream, self.seq_len, self.ranks = config, stream, seq_len, data_world_size
        longest = max(len(p.context) + max(len(p.chosen), len(p.rejected)) for p in stream.pairs)
        if longest > seq_len:
            raise ConfigError(
                f"The longest pair has {longest} tokens and the trainer's seq_len is {seq_len}: prime-rl would cut it, and a "
                "cut action has another gradient. Lower replay_dpo.max_length or raise seq_len."
            )
        self.step = first_step
        self._sender = FileSystemMicroBatchSender(output_dir, data_world_size, first_step)

    def samples(self, score: Scorer) -> tuple[list[TrainingSample], dict[str, float]]:
        """Return the present step's samples (two per pair), and what to log.

        Args:
            score: under the weights that this step trains.

        Raises:
            ModelError: a drawn pair has no reference log-probs.
        """
        indices = self.stream.indices(self.step - 1)
        pairs = [self.stream.pairs[i] for i in indices]
        live = [_score(score, pair) for pair in pairs]
        missing = [i for i in indices if i not in self.stream.reference]
        if missing:
            raise ModelError(
                f"{len(missing)} pairs of step {self.step} have no reference log-probs; record them first."
            )
        weights = [
            pair_weights(self.config, *scores, *self.stream.reference[i])
            for i, scores in zip(indices, live, strict=True)
        ]
        tokens = sum(len(p.chosen) + len(p.rejected) for p in pairs)
        scale = (
            self.config.weight * tokens / len(pairs)
        )  # undoes prime-rl's division by tokens: a mean over pairs is left
        found = [
            sample
            for pair, scores, weight in zip(pairs, live, weights, strict=True)
            for sample in _samples(pair, scores, weight, scale * pair.weight)
        ]
        return found, _metrics(weights, tokens)

    async def send(self, score: Scorer) -> dict[str, float]:
        """Score, weigh and write the present step; return what to log. Arguments and errors as `samples`."""
        samples, metrics = self.samples(score)
        grid = prepare_batch(samples, self.seq_len, self.ranks, build_bin_cost(None))
        await self._sender.send(grid)
        self.step += 1
        return metrics


class BroadcastWeights:
    """The trainer's weights on this machine, as it broadcasts them to the inference server through the filesystem.

    Args:
        model: a transformers causal language model of the same architecture; its weights are overwritten.
        output_dir: of the trainer.
        timeout: longest wait for a broadcast, seconds.
    """

    def __init__(self, model, output_dir: Path, *, timeout: float = 3600.0) -> None:
        self.model, self.folder, self.timeout = model.eval(), Path(output_dir) / "broadcasts", timeout

    def load(self, version: int, poll: float = 0.5) -> None:
        """Wait for policy `version` (0: the initial one) and load it.

        Raises:
            ModelError: it does not come in time, or its tensors do not fit.
        """
        folder, end = self.folder / f"step_{version}", time.monotonic() + self.timeout
        while not (folder / "STABLE").exists():
            if time.monotonic() > end:
                raise ModelError(f"The trainer has not broadcast {folder} in {self.timeout:g} s. Is it running?")
            time.sleep(poll)
        from safetensors.torch import load_file

        tensors = {
            name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()
        }
        report = self.model.load_state_dict(tensors, strict=False)
        tied = set(getattr(self.model, "_tied_weights_keys", None) or ())
        lacking = [name for name in report.missing_keys if name not in tied]
        if lacking or report.unexpected_keys:
            raise ModelError(
                f"{folder} does not fit the model: missing {lacking[:3]}, unknown {report.unexpected_keys[:3]}."
            )

    def score(self, token_ids: Sequence[int], start: int) -> list[float]:
        """Return log p(token_ids[i] | before) for i >= start, nats at temperature 1, computed in float32."""
        import torch

        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([list(token_ids)], device=self.model.device)).logits[0].float()
        logprobs = logits[start - 1 : -1].log_softmax(-1)
        targets = torch.tensor(list(token_ids)[start:], device=logprobs.device)
        return logprobs.gather(-1, targets[:, None])[:, 0].tolist()


def record_reference(stream: PairStream, score: Scorer) -> None:
    """Score every pair under the initial weights."""
    stream.reference = {index: _score(score, pair) for index, pair in enumerate(stream.pairs)}


def _score(score: Scorer, pair: TokenizedPair) -> Scored:
    start = len(pair.context)
    return score(pair.context + pair.chosen, start), score(pair.context + pair.rejected, start)


def _samples(pair: TokenizedPair, scores: Scored, weights: PairWeights, scale: float):
    for ids, logprobs, weight in zip(
        (pair.chosen, pair.rejected), scores, (weights.chosen, weights.rejected), strict=True
    ):
        before, size = len(pair.context), len(pair.context) + len(ids)
        yield TrainingSample(
            token_ids=[*pair.context, *ids],
            mask=[False] * before + [True] * len(ids),
            logprobs=[0.0] * before + list(logprobs),
            temperatures=[1.0] * size,
            env_name="replay_dpo",
            rl_weights=[0.0] * size,  # not a policy token: neither in its loss nor in its denominator
            ce_weights=[0.0] * before + [weight * scale] * len(ids),
        )


def _metrics(weights: list[PairWeights], tokens: int) -> dict[str, float]:
    count = len(weights)
    return {
        "replay_dpo/pairs": float(count),
        "replay_dpo/tokens": float(tokens),
        "replay_dpo/margin": sum(w.margin for w in weights) / count,
        "replay_dpo/accuracy": sum(w.margin > 0 for w in weights) / count,
        "replay_dpo/chosen_shift": sum(w.chosen_shift for w in weights) / count,
        "replay_dpo/rejected_shift": sum(w.rejected_shift for w in weights) / count,
    }
