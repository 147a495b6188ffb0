"""One fragment's exchange: torchft's fragment, plus a second chance when an exchange fails."""

from __future__ import annotations

import torch
from torchft.local_sgd import _StreamingDiLoCoFragment
from torchft.utils import get_stream_context, synchronize

from composer_plugins.config import OuterConfig
from composer_torchft.fingerprints import values_hash
from composer_torchft.fragments import ParameterFragment, all_finite


class IslandFragment(_StreamingDiLoCoFragment):
    """torchft's fragment: pseudo-gradient, all-reduce, commit, outer step (arXiv:2501.18512, algorithm 2).

    Two things are added. It owns its outer optimizer (one that fragments share diverges silently), and the
    local parameters survive a failed exchange, so that it can be tried again with nothing lost. Memory: one backup
    copy and one momentum copy; during an exchange two more, the pseudo-gradient and the local parameters.
    """

    def __init__(self, manager, part: ParameterFragment, number: int, inner, config: OuterConfig) -> None:
        outer = torch.optim.SGD(
            [p for _, p in part.named_parameters()],
            lr=config.lr, momentum=config.momentum, nesterov=config.nesterov,
            foreach=False,  # one tensor at a time: no third copy of all parameters
        )  # fmt: skip
        super().__init__(
            manager, part, number, config.sync_every * (number + 1) // config.fragments, inner, outer,
            config.sync_every, fragment_sync_delay=config.sync_delay, fragment_update_alpha=config.mixing_alpha,
        )  # fmt: skip
        self.number, self.part = number, part
        #: Inner steps since the parameters were the global ones.
        self.age = 0
        self._kept: dict[str, torch.Tensor] = {}
        self._digest: str | None = None
        self.save_parameters()
        self.register_state_dict_fn()

    def perform_sync(self) -> bool:
        """Wait for the exchange and make the outer step; False when it failed and nothing was changed."""
        with get_stream_context(self._stream):  # the accelerator's stream they were sent from: torchft insists on it
            for work in self._allreduce_work:
                work.wait()
                if self._manager.errored():
                    # closes the connections, so that peers which wait on us notice now and not after the time limit
                    self._manager._pg.abort()
                    break
        self._digest = None
        return super().perform_sync()

    def save_parameters(self) -> None:
        """Copy the parameters to the backup; torchft does not wait until a copy from an accelerator has arrived."""
        super().save_parameters()
        synchronize()

    def _merge_parameters(self) -> None:
        # torchft mixes also with a share of 0, and 0 times NaN is NaN
        if self._fragment_update_alpha and all_finite(self._local_parameters.values()):
            super()._merge_parameters()

    def _clear_local_parameters(self) -> None:
        # called at the end of every exchange, committed or not
        self._kept, self._local_parameters = self._local_parameters, {}

    def drop_kept(self) -> None:
        """Free the copy of the local parameters."""
        self._kept = {}

    def take_back(self) -> None:
        """Put the local parameters back that a failed exchange replaced by the global ones."""
        with torch.no_grad():
            for name, parameter in self.part.named_parameters():
                parameter.copy_(self._kept[name])
        self._kept = {}

    def cancel(self) -> None:
        """Forget an exchange that was prepared and is not to be applied."""
        self._allreduce_work, self._grads = [], {}

    def global_tensors(self) -> list[torch.Tensor]:
        """Return the global parameters, in order (this process's part of sharded ones)."""
        return list(self.original_parameters.values())

    def digest(self) -> str:
        """Return the hash of the global parameters; taken once per change, it is what a sync mostly costs locally."""
        if self._digest is None:
            self._digest = values_hash(self.global_tensors())
        return self._digest

    def changed(self) -> None:
        """Say that the global parameters were replaced."""
        self._digest = None

    def outer_state(self) -> dict:
        """Return global parameters and outer momentum."""
        return {
            "original_parameters": {k: v.clone() for k, v in self.original_parameters.items()},
            "outer_optimizer": self._outer_optimizer.state_dict(),
            "age": self.age,
        }

    def load_outer_state(self, state: dict) -> None:
        """Take over what `outer_state` returned."""
        for name, value in state["original_parameters"].items():
            self.original_parameters[name].copy_(value)
        self._outer_optimizer.load_state_dict(state["outer_optimizer"])
        self.age = state.get("age", 0)
        self.changed()
