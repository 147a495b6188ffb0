"""Do the time limits fit together? Every rule says what would happen."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

from composer_plugins.config import OuterConfig

#: torchft's manager sends one every 0.1 s.
HEARTBEAT_INTERVAL = 0.1


@dataclass(frozen=True)
class LighthouseLimits:
    """The lighthouse's own settings, in seconds."""

    join_timeout: float = 30.0
    heartbeat_timeout: float = 5.0
    min_islands: int = 1

    def problems(self) -> list[str]:
        """Return what is wrong with them alone."""
        found = []
        if self.heartbeat_timeout < 10 * HEARTBEAT_INTERVAL:
            found.append(
                f"heartbeat_timeout {self.heartbeat_timeout:g} s is below ten heartbeats ({HEARTBEAT_INTERVAL:g} s each): "
                "a busy island would be taken for dead. Raise it to 1 s or more."
            )
        if self.join_timeout < 0.1:
            found.append(
                f"join_timeout {self.join_timeout:g} s is torchft's Python default for tests: islands that arrive a "
                "moment later are left out of the sync and lose their round. Raise it."
            )
        return found


#: Outer steps below which a high outer momentum is pointed out. The paper's runs have hundreds.
FEW_ROUNDS = 100


def problems(
    config: OuterConfig, lighthouse: LighthouseLimits, *, round_seconds: float | None = None, steps: int | None = None
) -> list[str]:
    """Return the combinations that will hurt, each with what happens and the fix.

    Args:
        config: `outer` of the recipe.
        lighthouse: how the lighthouse was started.
        round_seconds: time of `sync_every / fragments` inner steps on the slowest island.
        steps: inner steps of the whole run, where the recipe says it.
    """
    limits, found = config.timeouts, lighthouse.problems()
    if limits.quorum <= lighthouse.join_timeout:
        found.append(
            f"timeouts.quorum {limits.quorum:g} s is not above the lighthouse's join_timeout "
            f"{lighthouse.join_timeout:g} s: the island gives up before the lighthouse stops waiting for a slow one."
        )
    if round_seconds is not None and limits.quorum <= round_seconds:
        found.append(
            f"timeouts.quorum {limits.quorum:g} s is not above a round of {round_seconds:g} s: a joining island, or the "
            "fast one of two, gives up before the others reach their sync. Raise it above the slowest round."
        )
    if limits.allreduce <= lighthouse.heartbeat_timeout:
        found.append(
            f"timeouts.allreduce {limits.allreduce:g} s is not above the heartbeat timeout "
            f"{lighthouse.heartbeat_timeout:g} s: a failed exchange would be repeated with a peer that is still counted "
            "as alive. Raise it."
        )
    if limits.quorum_retries == 0:
        found.append("timeouts.quorum_retries 0: a restart of the lighthouse ends every island. Leave it out.")
    elif (
        limits.quorum_retries
        and (between := limits.quorum / (limits.quorum_retries + 1)) > lighthouse.heartbeat_timeout
    ):
        found.append(
            f"timeouts.quorum_retries {limits.quorum_retries} over timeouts.quorum {limits.quorum:g} s: islands notice that "
            f"the lighthouse is back up to {between:.0f} s late. Leave it out: then they call it once a second."
        )
    if config.min_islands < 2:
        found.append(
            "min_islands 1: an island that is cut off from the others, but not from the lighthouse, goes on alone and "
            "its rounds are lost when it comes back. This is wanted when one island must be able to survive; else set 2."
        )
    if config.start_with < 2:
        found.append(
            "start_with 1: islands that restart together, while the one that has the state is away, begin anew and lose "
            "that work when it comes back. Set it to the number of islands."
        )
    if lighthouse.min_islands < config.min_islands:
        found.append(
            f"the lighthouse forms a quorum of {lighthouse.min_islands} while the islands commit only with "
            f"{config.min_islands}: they would retry and give up rounds. Start it with --min-islands {config.min_islands}."
        )
    if steps is not None:
        found += _length(config, steps)
    local = config.interface.startswith("127.") or config.interface == "localhost"
    host = urlsplit(config.lighthouse or "").hostname
    if local and host and not host.startswith("127.") and host != "localhost":
        found.append(
            f"interface {config.interface} is this machine only, but the lighthouse is at {host}: other islands "
            "cannot reach this one. Set outer.interface to this machine's address in the private network."
        )
    return found


def _length(config: OuterConfig, steps: int) -> list[str]:
    """Return what is wrong with the run's length: few rounds, or a part of one at the end."""
    rounds, rest = divmod(steps, config.sync_every)
    found = []
    if rounds < FEW_ROUNDS and config.momentum >= 0.8:
        found.append(
            f"{rounds} rounds with outer momentum {config.momentum:g}: lr / (1 - momentum) lets the model move up to "
            f"{config.lr / (1 - config.momentum):.2g} times as far as the islands went. The paper's settings are meant for "
            "hundreds of rounds; in our GRPO test of 12 rounds 0.7 / 0.9 trained worse than one process. Try momentum "
            "0.5, or plain averaging (lr: 1, momentum: 0, nesterov: false)."
        )
    if rest:
        found.append(
            f"{steps} inner steps are no multiple of sync_every {config.sync_every}: the last {rest} of every island will "
            "be given up."
        )
    return found


def reach(address: str, timeout: float = 3.0) -> str | None:
    """Try to connect; return what failed, or None."""
    parts = urlsplit(address)
    if parts.scheme != "http" or not parts.hostname or not parts.port:
        return f"{address} is no lighthouse address: expected http://HOST:PORT."
    try:
        socket.create_connection((parts.hostname, parts.port), timeout=timeout).close()
    except OSError as error:
        return f"The lighthouse at {address} does not answer ({error}). Start it: composer-rl lighthouse."
    return None
