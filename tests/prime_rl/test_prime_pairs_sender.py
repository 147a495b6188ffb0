"""Recorded pairs straight into prime-rl's trainer: exact DPO on the weights that are trained."""

import asyncio
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("verifiers.v1", reason="verifiers is not installed (make test-prime-rl)")
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "plugins"))

from prime_fixtures import smollm2, tokenizer_dir  # noqa: F401
from prime_wire_tools import _logprobs, backward, gradient, micro_batches, scales

from composer_plugins.config import ReplayDPOConfig
from composer_plugins.errors import ConfigError, ModelError

pytestmark = [pytest.mark.prime_rl, pytest.mark.model]


POLICY = "tiny"


class Pairs:
    """What the sender uses of a `PairStream`, with ids made up: four pairs of different lengths."""

    def __init__(self) -> None:
        from composer_plugins.channels.pair_stream import TokenizedPair

        torch.manual_seed(0)
        ids = lambda n: torch.randint(10, 4000, (n,)).tolist()  # noqa: E731
        sizes = [(6, 9, 3), (4, 2, 8), (7, 5, 5), (3, 4, 12)]
        self.pairs = [TokenizedPair(f"p{i}", ids(c), ids(a), ids(b), 1.0 + i) for i, (c, a, b) in enumerate(sizes)]
        self.reference = {}

    def indices(self, step, *, slot=0, slots=1):
        return [(2 * step + j) % 4 for j in range(2)]


def scorer(model):
    def score(ids, start):
        with torch.no_grad():
            return _logprobs(model, torch.tensor(ids), torch.ones(len(ids)))[start:].tolist()

    return score


def expected_gradient(model, stream, indices, config):
    """weight x mean over the pairs of pair weight x (direct DPO - nll x mean log-prob of the chosen action)."""
    model.zero_grad()
    total = 0.0
    for i in indices:
        item, rows = stream.pairs[i], []
        for ids in (item.chosen, item.rejected):
            row = torch.tensor([*item.context, *ids])
            rows.append(_logprobs(model, row, torch.ones(len(row)))[len(item.context) :].double())
        shifts = [
            (row - torch.tensor(r, dtype=torch.float64)).sum() / (len(row) if config.length_normalized else 1)
            for row, r in zip(rows, stream.reference[i], strict=True)
        ]
        delta = config.beta * (shifts[0] - shifts[1])
        loss = -(1 - config.label_smoothing) * torch.nn.functional.logsigmoid(delta)
        loss = (
            loss - config.label_smoothing * torch.nn.functional.logsigmoid(-delta) - config.nll_weight * rows[0].mean()
        )
        total = total + item.weight * loss
    (config.weight * total / len(indices)).backward()
    return gradient(model).clone()


@pytest.mark.parametrize(
    "options",
    [{}, {"length_normalized": True, "nll_weight": 0.2, "label_smoothing": 0.1}],
    ids=["dpo", "normalized_nll_smoothed"],
)
@pytest.mark.parametrize("seq_len", [512, 24])
def test_the_gradient_is_that_of_the_mean_pairwise_dpo(smollm2, tmp_path, prime_tree, options, seq_len):  # noqa: F811
    from composer_prime_rl.pair_sender import PairSender, record_reference
    from prime_rl.configs.trainer import DefaultLossConfig

    model, stream = smollm2[0], Pairs()
    config = ReplayDPOConfig(weight=0.3, beta=0.4, pairs_per_step=2, **options)
    record_reference(stream, scorer(model))
    for i, (chosen, rejected) in stream.reference.items():  # as if the policy had moved since
        stream.reference[i] = ([x - 0.2 for x in chosen], [x + 0.1 for x in rejected])
    sender = PairSender(config, stream, tmp_path, seq_len=seq_len, first_step=2)
    metrics = asyncio.run(sender.send(scorer(model)))
    expected = expected_gradient(model, stream, stream.indices(1), config)
    model.zero_grad()
    batches = micro_batches(tmp_path, step=2)
    backward(model, batches, DefaultLossConfig())
    error = float((gradient(model).double() - expected.double()).norm() / expected.double().norm())
    print(f"pair sender, {len(batches)} micro-batches, relative gradient error {error:.2e}")
    assert error < 1e-5
    assert metrics["replay_dpo/pairs"] == 2 and scales(batches)[:2] == (1, int(metrics["replay_dpo/tokens"]))
    model.zero_grad()


def test_a_pair_that_prime_rl_would_cut_is_refused(tmp_path, prime_tree):
    from composer_prime_rl.pair_sender import PairSender

    with pytest.raises(ConfigError, match="longest pair has 15 tokens and the trainer's seq_len is 14"):
        PairSender(ReplayDPOConfig(), Pairs(), tmp_path, seq_len=14)


def test_pairs_without_a_reference_are_refused(tmp_path, prime_tree):
    from composer_prime_rl.pair_sender import PairSender

    sender = PairSender(ReplayDPOConfig(), Pairs(), tmp_path, seq_len=64)
    with pytest.raises(ModelError, match="no reference log-probs"):
        sender.samples(lambda ids, start: [-1.0] * (len(ids) - start))


def test_a_trainer_that_does_not_broadcast_is_reported(tmp_path, prime_tree):
    from composer_prime_rl.pair_sender import BroadcastWeights

    weights = BroadcastWeights(torch.nn.Linear(1, 1), tmp_path, timeout=0.05)
    with pytest.raises(ModelError, match="has not broadcast"):
        weights.load(0, poll=0.01)
