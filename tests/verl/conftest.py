"""verl's own calling convention around a policy loss: nested batches, its micro-batching, its `ppo_loss`."""

import os
import sys

import numpy as np
import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")


@pytest.fixture(scope="session")
def oracle():
    """The formulas in float64 NumPy, which share no code with the losses."""
    from composer_plugins.conformance import oracle

    return oracle


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="module", autouse=True)
def _tools_of_one_file():
    """verl keeps function tools by name for the whole process, and refuses another file's tool of the same name."""
    yield
    if "verl.tools.function_tool" in sys.modules:
        sys.modules["verl.tools.function_tool"].FUNCTION_TOOL_REGISTRY.clear()


class Batch:
    """A mini-batch of a run: rows of different lengths, tool tokens masked inside them.

    `logp`, `old`, `adv` are (B, T) float64, `mask` (B, T) bool, `lengths` (B,) with the mask False beyond.
    """

    def __init__(self, rng, rows=8, width=9, spread=0.4, prompt=3):
        self.rows, self.width, self.prompt = rows, width, prompt
        self.lengths = rng.integers(2, width + 1, size=rows)
        self.lengths[0] = width
        inside = np.arange(width)[None] < self.lengths[:, None]
        self.mask = inside & (rng.random((rows, width)) < 0.8)
        self.mask[:, 0] = True
        self.logp = np.where(inside, -rng.random((rows, width)) * 3, 0.0)
        self.old = np.where(inside, self.logp + rng.normal(size=(rows, width)) * spread, 0.0)
        self.adv = np.where(inside, rng.normal(size=(rows, 1)), 0.0)
        self.weights = None

    def nested(self, values, dtype):
        """The responses of all rows as verl keeps them: one jagged tensor without padding."""
        import torch

        rows = [torch.tensor(values[i, :n], dtype=dtype) for i, n in enumerate(self.lengths)]
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    def tensordict(self, rows, log_probs, dtype):
        """The TensorDict of some rows as verl's engine hands it to micro-batching, prompts included."""
        import torch
        from tensordict import TensorDict

        def jagged(tensors):
            return torch.nested.as_nested_tensor(tensors, layout=torch.jagged)

        fields = {"response_mask": self.mask, "old_log_probs": self.old, "advantages": self.adv}
        if self.weights is not None:
            fields["rollout_is_weights"] = self.weights
        data = {
            "prompts": jagged([torch.ones(self.prompt, dtype=torch.long) for _ in rows]),
            "responses": jagged([torch.ones(int(self.lengths[i]), dtype=torch.long) for i in rows]),
            "input_ids": jagged([torch.ones(int(self.lengths[i]) + self.prompt, dtype=torch.long) for i in rows]),
            "row": torch.tensor(list(rows)),
        }
        for name, values in fields.items():
            kind = torch.long if name == "response_mask" else dtype
            data[name] = jagged([torch.tensor(values[i, : self.lengths[i]], dtype=kind) for i in rows])
        return TensorDict(data, batch_size=len(rows))

    def model_output(self, rows, log_probs):
        """Log-probs of prompt and response tokens, shifted by one to the left, as verl's engine returns them."""
        import torch

        parts = []
        for i in rows:
            n = int(self.lengths[i])
            zeros = log_probs.new_zeros(self.prompt - 1)
            parts.append(torch.cat([zeros, log_probs[i, :n], log_probs.new_zeros(1)]))
        return {"log_probs": torch.nested.as_nested_tensor(parts, layout=torch.jagged)}


@pytest.fixture
def batch(rng):
    return Batch(rng)


@pytest.fixture
def make_batch(rng):
    return lambda **options: Batch(rng, **options)


@pytest.fixture
def actor():
    """Build verl's actor configuration: `actor("composer_grpo", composer={...}, clip_ratio_low=0.1)`."""

    def build(loss_mode, *, composer=None, aggregation="objective", **options):
        from composer_verl.options import ComposerPolicyLossConfig
        from verl.workers.config import ActorConfig, PolicyLossConfig

        if composer is None and aggregation == "objective":
            loss = PolicyLossConfig(loss_mode=loss_mode)
        else:
            loss = ComposerPolicyLossConfig(loss_mode=loss_mode, composer=composer or {}, aggregation=aggregation)
        return ActorConfig(strategy="fsdp2", rollout_n=4, ppo_micro_batch_size_per_gpu=2, policy_loss=loss, **options)

    return build


@pytest.fixture
def step():
    """One optimizer step through verl's `prepare_micro_batches` and `ppo_loss`: (value, gradient (B, T), metrics).

    `micro` rows per micro-batch, or `tokens` per dynamic micro-batch; `ranks` takes the rows in turn. As in verl the
    losses of micro-batches add up and the gradients of ranks are averaged.
    """

    def run(batch, config, *, micro=None, tokens=None, ranks=1, dtype=None):
        import torch
        from verl.utils import tensordict_utils as tu
        from verl.workers.engine.utils import prepare_micro_batches
        from verl.workers.utils.losses import ppo_loss

        dtype = dtype or torch.float64
        log_probs = torch.tensor(batch.logp, dtype=dtype, requires_grad=True)
        value, seen = 0.0, []
        for rank in range(ranks):
            rows = list(range(rank, batch.rows, ranks))
            data = batch.tensordict(rows, log_probs, dtype)
            tu.assign_non_tensor(
                data,
                use_dynamic_bsz=tokens is not None,
                max_token_len_per_gpu=tokens,
                micro_batch_size_per_gpu=micro or len(rows),
                dp_size=ranks,
                batch_num_tokens=int(batch.mask.sum()),
                global_batch_size=batch.rows,
            )
            micro_batches, _ = prepare_micro_batches(data)
            for part in micro_batches:
                loss, metrics = ppo_loss(config, batch.model_output(part["row"].tolist(), log_probs), part)
                (loss / ranks).backward()
                value += float(loss) / ranks
                seen.append({k: v.aggregate() if hasattr(v, "aggregate") else v for k, v in metrics.items()})
        return value, log_probs.grad.numpy().copy(), seen

    return run


def relative(got, expected):
    """Relative L2 distance."""
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.fixture
def distance():
    return relative
