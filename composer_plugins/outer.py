"""What an outer loop is: islands that train by themselves and exchange parameters every N inner steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from composer_plugins.config import OuterConfig

if TYPE_CHECKING:
    import torch

#: The `outer` section for hosts that hand us no configuration in time, as one YAML mapping: `{sync_every: 20}`.
OUTER_ENV = "COMPOSER_OUTER"
#: Where the lighthouse is, when `outer.lighthouse` does not say it.
LIGHTHOUSE_ENV = "TORCHFT_LIGHTHOUSE"
#: Name of this island, when `outer.island` does not say it.
ISLAND_ENV = "COMPOSER_ISLAND"


@dataclass
class HostState:
    """What an island that joins late takes over from the others besides the parameters.

    Args:
        read: returns plain numbers, strings, lists and dictionaries (e.g. of a learning-rate schedule).
        write: takes what another island's `read` returned, and by how many inner steps this one has to count further
            than it says (1 for a joiner that stands before a step while the other was inside one, else 0; -1 the
            other way round).
    """

    read: Callable[[], dict[str, Any]] = field(default=dict)
    write: Callable[[dict[str, Any], int], None] = field(default=lambda state, ahead: None)


class OuterLoop(Protocol):
    """An attached outer loop. It works inside the inner optimizer's `step`."""

    #: Whether attaching replaced the parameters (the island joined late), so that gradients at hand are of others.
    replaced: bool

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint of this island needs: global parameters, outer momentum, counters."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`. Raises `OuterLoopError` when it is of another model or configuration."""

    def metrics(self) -> dict[str, float]:
        """Return the figures of the last round, named `outer/...`; empty before the first."""

    def table(self) -> Any:
        """Return what was exchanged so far, one row per round, as something that `rich` prints."""

    def finish(self) -> int:
        """Leave the other islands; the parameters are then the last global ones, never an unsynced island's.

        Returns the number of inner steps since the last sync, which are given up.
        """


def report_end(loop: OuterLoop, lost: int) -> None:
    """Print the table of all rounds, and what became of the steps after the last one.

    Args:
        loop: an outer loop that was left.
        lost: what its `finish` returned.
    """
    from rich.console import Console

    console = Console()
    console.print(loop.table())
    note = f" ({lost} inner steps since the last sync were given up)" if lost else ""
    console.print(f"outer loop: the model now has the global parameters{note}", highlight=False, soft_wrap=True)


class AttachOuterLoop(Protocol):
    """What `register_outer_loops` names: puts an outer loop around an inner optimizer."""

    def __call__(
        self,
        optimizer: torch.optim.Optimizer,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        config: OuterConfig,
        *,
        host_state: HostState | None = None,
        resume: dict[str, Any] | None = None,
        log: Path | None = None,
    ) -> OuterLoop:
        """Attach and meet the other islands.

        Args:
            optimizer: the inner optimizer; wrappers that are known are unwrapped.
            named_parameters: the model's parameters in module order, at least all that the optimizer has.
            config: `outer` of the recipe, with `sync_every` above 0.
            host_state: what a late joiner takes over besides the parameters.
            resume: `state_dict()` of this island's checkpoint.
            log: JSONL file that gets one record per round.

        Raises:
            OuterLoopError: it cannot be attached, or the islands do not agree; the message says why.
        """
