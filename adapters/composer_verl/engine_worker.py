"""verl's real training worker for the conformance suite: built on a model folder, watched, and called like a group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch


class Group:
    """verl's worker group for a worker in this process, every rank being its own driver: chunk, run, collect."""

    def __init__(self, worker) -> None:
        self.worker = worker
        self._dispatch_info = {"actor": list(range(world())), "ref": list(range(world()))}

    def compute_log_prob(self, batch):
        from tensordict import TensorDict

        found = self.worker.infer_batch(self.part(batch))
        output = {k: list(v.unbind()) for k, v in found.items() if isinstance(v, torch.Tensor) and v.is_nested}
        gathered: list[Any] = [None] * world()
        torch.distributed.all_gather_object(gathered, output)
        whole = {
            name: torch.nested.as_nested_tensor([row for own in gathered for row in own[name]], layout=torch.jagged)
            for name in output
        }
        return TensorDict(whole, batch_size=len(batch))

    compute_ref_log_prob = compute_log_prob

    @staticmethod
    def part(batch):
        """This rank's part, as verl's dispatch cuts it."""
        from tensordict import TensorDict
        from verl.protocol import BatchData

        own = BatchData(batch).chunk(world())[torch.distributed.get_rank()]
        return TensorDict(dict(own.items()), batch_size=len(own))


def build(model: Path, *, micro: int, packed: bool, dtype: str, lr: float, strategy: str = "fsdp2"):
    """Return verl's training worker on a model folder, with plain SGD."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, TrainingWorkerConfig
    from verl.workers.engine_workers import TrainingWorker

    if strategy != "fsdp2":
        import composer_verl.ema_engine  # noqa: F401  registers the engine

    short = {"float32": "fp32", "bfloat16": "bf16"}[dtype]
    engine = FSDPEngineConfig(
        strategy="fsdp2", model_dtype=short, dtype=dtype, use_torch_compile=False, fsdp_size=-1, use_dynamic_bsz=False,
        mixed_precision={"param_dtype": short, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
        micro_batch_size_per_gpu=micro, infer_micro_batch_size_per_gpu=micro,
    )  # fmt: skip
    object.__setattr__(engine, "strategy", strategy)  # as verl's FSDPActorConfig does
    worker = TrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=HFModelConfig(
                path=str(model), use_remove_padding=packed, enable_gradient_checkpointing=False,
                override_config={"attn_implementation": "sdpa"},
            ),
            engine_config=engine,
            optimizer_config=FSDPOptimizerConfig(
                optimizer="SGD", optimizer_impl="torch.optim", lr=lr, weight_decay=0.0, clip_grad=1e9, total_training_steps=100,
                override_optimizer_config={"foreach": False},
            ),
            checkpoint_config=CheckpointConfig(),
        )
    )  # fmt: skip
    worker.reset()
    worker.engine.module.lm_head.weight.requires_grad_(False)  # loading a model makes every parameter trainable
    return worker


def watch(engine, gradient: dict[str, np.ndarray]) -> None:
    """Keep the whole gradient of an optimizer step, as the optimizer sees it."""
    step = engine.optimizer_step

    def watched():
        for name, parameter in engine.module.named_parameters():
            if parameter.grad is not None:
                whole = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
                gradient[name] = whole.detach().double().cpu().numpy().copy()
        return step()

    engine.optimizer_step = watched


def world() -> int:
    """Number of ranks."""
    return torch.distributed.get_world_size()
