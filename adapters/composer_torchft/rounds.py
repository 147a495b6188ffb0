"""What a person can read about the rounds: one record each, one table at the end."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from composer_plugins.errors import OuterLoopError

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class Round:
    """One exchange of one fragment.

    `retries` counts the meetings and exchanges that failed. `discarded_inner_steps`: of several fragments, which are synced
    in turn, those of the one that lost the most. `bytes` is what this island sent of the parameters, `seconds` the whole
    stop of the training, `waited` the part of it until the others were there. `theta` is the start of the hash of the global parameters of the fragment afterwards. `not_finite`:
    the island's parameters were NaN or infinite, and it went back to the global ones before it sent anything.
    """

    outer_step: int
    fragment: int
    participants: int
    committed: bool
    healed: bool
    retries: int
    discarded_inner_steps: int
    bytes: int
    seconds: float
    waited: float
    theta: str
    attach: bool = False
    not_finite: bool = False


class RoundLog:
    """Keeps all rounds of this process and writes them to a JSONL file."""

    def __init__(self, path: Path | None) -> None:
        self.rounds: list[Round] = []
        self._path = path
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, record: Round) -> None:
        """Keep and write one round."""
        self.rounds.append(record)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(asdict(record)) + "\n")

    def metrics(self) -> dict[str, float]:
        """Return the last round's figures under `outer/`."""
        if not self.rounds:
            return {}
        last = self.rounds[-1]
        names = ("outer_step", "participants", "seconds", "waited", "bytes", "retries", "discarded_inner_steps")
        return {f"outer/{name.removeprefix('outer_')}": float(getattr(last, name)) for name in names}

    def table(self, island: str) -> Table:
        """Return a rich table of all rounds."""
        return table(self.rounds, f"outer loop of island {island}")


def read(path: Path) -> list[Round]:
    """Return what a `RoundLog` wrote; a last line that was cut off (the island was killed) is left out.

    Raises:
        OuterLoopError: there is no such file, or it is none of an outer loop's.
    """
    try:
        lines = path.read_text().splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise OuterLoopError(f"{path}: {error}. Expected the outer.jsonl of an island's run folder.") from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(Round(**json.loads(line)))
        except (ValueError, TypeError) as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise OuterLoopError(f"{path}:{number} is no record of an outer loop: {error}.") from error
    return found


def table(rounds: list[Round], title: str) -> Table:
    """Return a rich table of rounds; it fits 80 columns."""
    from rich.table import Table

    found = Table(title=title, padding=(0, 0), caption="MB sent, seconds, inner steps lost")
    for column in ("step", "part", "islands", "MB", "s", "waited", "retries", "lost", "healed", "parameters"):
        found.add_column(column, justify="right")
    for r in rounds:
        found.add_row(
            str(r.outer_step) if r.committed else f"{r.outer_step} (given up)", str(r.fragment), str(r.participants),
            f"{r.bytes / 1e6:.2f}", f"{r.seconds:.2f}", f"{r.waited:.2f}", str(r.retries),
            str(r.discarded_inner_steps), "not finite" if r.not_finite else "yes" if r.healed else "", r.theta[:10],
        )  # fmt: skip
    return found
