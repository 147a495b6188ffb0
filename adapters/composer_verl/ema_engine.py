"""An FSDP2 engine of verl that keeps a moving average of its weights, for the self-teacher of kind `ema`.

It is verl's own engine in everything else. `ComposerTrainer` selects it (`actor.strategy: composer_fsdp2`) when the
teacher is `ema`; it lives in verl's registry of engines, so no worker or engine class of verl is touched.

**Where the weights live.** Each rank averages its own shard of the trained parameters, in fp32: 4 bytes per trained
parameter / ranks (a 7B model on 8 ranks: 3.5 GB each; LoRA: a few MB). They lie on the device; with
`fsdp_config.param_offload` or `offload_policy` in host memory. While the teacher reads, the average stands in the
place of the weights and the weights in a second copy of the shard (in their own dtype); no gradients exist then, so
the peak of the step does not grow. Each optimizer step costs one pass over the shard, the teacher two.

**Checkpoints.** One file per rank beside verl's own (`composer_ema_world_size_8_rank_0.pt`); resuming needs the same
number of ranks and raises without the files. They stay local: verl's copy to `default_hdfs_dir` is made before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from verl.utils import tensordict_utils as tu
from verl.utils.metric import Metric
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from composer_plugins.errors import ConfigError
from composer_verl.fields import EMA_RATE, EMA_TEACHER, TEACHER

#: The value of `actor.strategy` that selects this engine; it stands for verl's `fsdp2`.
STRATEGY = "composer_fsdp2"
METRIC = "sdpo/teacher_weights_gb"


class AveragingEngine(FSDPEngineWithLMHead):
    """FSDP2 engine with an exponential moving average of the trained parameters."""

    def __init__(self, *args: Any, engine_config, **kwargs: Any) -> None:
        object.__setattr__(engine_config, "strategy", "fsdp2")
        super().__init__(*args, engine_config=engine_config, **kwargs)
        self._average: dict[str, torch.Tensor] = {}

    def initialize(self) -> None:
        """Build the model as verl does; the average begins as a copy of its weights."""
        super().initialize()
        on_host = self._is_offload_param or self._uses_fsdp2_cpu_offload_policy
        for name, local in self._trained():
            device = "cpu" if on_host else local.device
            self._average[name] = local.to(device=device, dtype=torch.float32, copy=True)

    def train_batch(self, data, loss_function) -> Any:
        """One optimizer step of verl's, then average += rate * (weights - average)."""
        rate = tu.get(data, EMA_RATE)
        outputs = super().train_batch(data, loss_function)
        if rate is not None:
            self.update_average(float(rate))
            if self.is_mp_src_rank_with_outputs():
                size = sum(t.numel() * t.element_size() for t in self._average.values()) / 1e9
                outputs["metrics"][METRIC] = Metric("max", size)
        return outputs

    def infer_batch(self, data, loss_function=None) -> Any:
        """verl's forward; with the averaged weights when the batch asks for them."""
        if tu.pop(data, TEACHER) != EMA_TEACHER:
            return super().infer_batch(data, loss_function)
        with self.averaged():
            return super().infer_batch(data, loss_function)

    @torch.no_grad()
    def update_average(self, rate: float) -> None:
        """Move the average towards the weights by `rate`, in (0, 1]."""
        for name, local in self._trained():
            average = self._average[name]
            average.lerp_(local.to(average), rate)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the average in the place of the weights, and the very same weights back."""
        self._reshard()
        kept = {}
        for name, local in self._trained():
            kept[name] = local.clone()
            local.copy_(self._average[name])
        try:
            yield
        finally:
            self._reshard()
            for name, local in self._trained():
                local.copy_(kept.pop(name))

    def _reshard(self) -> None:
        """Free gathered parameters: FSDP2 keeps those of the root until the next backward, and would use them again."""
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _trained(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, this rank's shard) of every trained parameter; the shard shares the parameter's memory."""
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                data = parameter.detach()
                yield name, data._local_tensor if isinstance(data, DTensor) else data

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """verl's checkpoint, and this rank's average beside it."""
        super().save_checkpoint(local_path, *args, **kwargs)
        torch.save({name: tensor.cpu() for name, tensor in self._average.items()}, self._file(local_path))
        torch.distributed.barrier()

    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """verl's checkpoint, and this rank's average. Raises `ConfigError` when it is not there or does not fit."""
        super().load_checkpoint(local_path, *args, **kwargs)
        path = self._file(local_path)
        if not path.exists():
            raise ConfigError(
                f"{path} is missing, so the EMA self-teacher cannot be resumed exactly: the checkpoint was saved with "
                "another sdpo.teacher.kind, or by another number of ranks. Resume with the recipe and the ranks that "
                "made it, or start a new run from its weights."
            )
        saved = torch.load(path, weights_only=True)
        shapes = {name: tensor.shape for name, tensor in self._average.items()}
        if {name: tensor.shape for name, tensor in saved.items()} != shapes:
            raise ConfigError(f"{path} holds other parameters than this rank trains: resume with the same model.")
        for name, tensor in saved.items():
            self._average[name].copy_(tensor)

    @staticmethod
    def _file(local_path: str) -> Path:
        size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        return Path(local_path) / f"composer_ema_world_size_{size}_rank_{rank}.pt"


def register() -> None:
    """Put the engine into verl's registry, once."""
    known = EngineRegistry._engines.get("language_model", {})
    if STRATEGY not in known:
        EngineRegistry.register(model_type="language_model", backend=STRATEGY, device=["cuda", "npu", "cpu"])(
            AveragingEngine
        )


register()
