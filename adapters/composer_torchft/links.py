"""The connection to the other islands: torchft's manager, with time limits that fit together."""

from __future__ import annotations

import hashlib
import math
import os
import socket
import threading
import time
import warnings
from datetime import timedelta
from http.server import ThreadingHTTPServer
from typing import Any

import torch
import torch.distributed as dist
from torchft import Manager
from torchft.checkpointing import http_transport
from torchft.checkpointing.http_transport import HTTPTransport

from composer_plugins.config import OuterConfig
from composer_plugins.errors import OuterLoopError
from composer_plugins.outer import ISLAND_ENV, LIGHTHOUSE_ENV
from composer_torchft.meeting import IslandGroup

#: Longest wait for an island that has just been in the quorum; one that died since costs the others this much. (One whose
#: store is the meeting place, and that is frozen, can cost more: torch's store waits for its reply.)
MEETING = timedelta(seconds=10)
#: Longest series of attempts to connect. torchft waits longer and longer between two, which must begin anew: an island
#: would otherwise call a lighthouse that is back only half a minute later.
CONNECT = timedelta(seconds=2)


class _Server(ThreadingHTTPServer):
    daemon_threads = True


class HealTransport(HTTPTransport):
    """torchft's HTTP transport, bound to one address, and without unpickling what arrives.

    The stock transport listens on every interface and loads with `weights_only=False`, which runs code that a
    stranger sends.
    """

    def __init__(self, timeout: timedelta, interface: str) -> None:
        self._interface = interface
        super().__init__(timeout=timeout, num_chunks=0)
        handler = self._server.RequestHandlerClass
        handler.log_message = lambda *_: None  # no line on stderr for every joining island
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._server = _Server((interface, 0), handler)
        self._thread = threading.Thread(target=self._serve, daemon=True, name="outer-heal")
        self._thread.start()

    def address(self) -> str:
        """Return where a checkpoint is fetched, without the step."""
        return f"http://{self._interface}:{self._server.server_address[1]}/checkpoint/"

    def disallow_checkpoint(self) -> None:
        """Stop serving, unless an island still reads: what it gets is a copy, so nobody has to wait for it or to fail."""
        try:
            super().disallow_checkpoint()
        except TimeoutError:
            self._disallowed = False

    @classmethod
    def _load_from_address(cls, address: str, timeout: timedelta) -> object:
        import urllib.request

        with warnings.catch_warnings(), urllib.request.urlopen(address, timeout=timeout.total_seconds()) as file:
            warnings.filterwarnings("ignore", message="The given buffer is not writable")  # it is copied from
            return http_transport._streaming_load(file, weights_only=True)


def island_name(config: OuterConfig) -> str:
    """Return this island's unique name."""
    return config.island or os.environ.get(ISLAND_ENV) or f"{socket.gethostname()}-{os.getpid()}"


def lighthouse_address(config: OuterConfig) -> str:
    """Return where the lighthouse is. Raises `OuterLoopError` when nothing says so."""
    address = config.lighthouse or os.environ.get(LIGHTHOUSE_ENV)
    if not address:
        raise OuterLoopError(
            "The outer loop needs a lighthouse and found no address: start `composer-rl lighthouse`, and put the "
            f"address it prints into outer.lighthouse or the environment variable {LIGHTHOUSE_ENV}."
        )
    return address


class CommitClient:
    """torchft's client of the island's own server, in which a question for the commit that gets no answer is a no."""

    def __init__(self, client: Any) -> None:
        self._client = client
        #: Why the last question got no answer; None when it got one.
        self.failed: Exception | None = None

    def should_commit(self, *args: Any, **options: Any) -> bool:
        """Return the answer."""
        self.failed = None
        try:
            return self._client.should_commit(*args, **options)
        except (TimeoutError, RuntimeError) as error:  # torchft's two, of its Rust part
            self.failed = error
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


class IslandManager(Manager):
    """torchft's manager, in which a commit that got no answer is one that failed, and not the end of the island.

    The question goes to the island's own server and has a time limit. A process that is stopped while it waits, and goes
    on after the limit, finds it passed.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._client = CommitClient(self._client)

    def should_commit(self, timeout: timedelta | None = None) -> bool:
        """Return whether the exchange succeeded on all processes of this island.

        Raises:
            OuterLoopError: some of them got a yes and others no answer.
        """
        answer: bool | None = super().should_commit(timeout)
        if error := self._client.failed:
            self.report_error(error)
            answer = None
        answers = gathered(answer, self._group_world_size)
        if True in answers and set(answers) != {True}:
            raise OuterLoopError(
                f"The processes of this island do not agree whether the exchange succeeded ({answers}; None: no answer in "
                "time). One of them was stopped or cut off. Start the island again: it takes over the others' state."
            )
        return bool(answer)


def gathered(mine: Any, world: int) -> list[Any]:
    """Return what each process of the island gave, by rank."""
    if world == 1:
        return [mine]
    found: list[Any] = [None] * world
    dist.all_gather_object(found, mine)
    return found


class Link:
    """One process's manager, and the store it meets the other processes of its island in."""

    def __init__(self, config: OuterConfig) -> None:
        self.config, self.island = config, island_name(config)
        address = lighthouse_address(config)
        distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.world = dist.get_world_size() if distributed else 1
        host, port = self._store()
        transport = HealTransport(timedelta(seconds=config.timeouts.allreduce), config.interface)
        deadline = time.monotonic() + config.timeouts.connect
        while True:
            try:
                self.manager = self._manager(address, host, port, transport)
                return
            except Exception as error:
                if time.monotonic() < deadline:
                    time.sleep(0.2)
                    continue
                transport.shutdown(wait=False)
                raise OuterLoopError(
                    f"The lighthouse at {address} cannot be reached within {config.timeouts.connect:g} s "
                    f"({type(error).__name__}: {error}). Start `composer-rl lighthouse`, or correct the address."
                ) from error

    def _manager(self, address: str, host: str, port: int, transport: HealTransport) -> IslandManager:
        """Return a manager. Raises whatever torchft raises when the lighthouse cannot be reached."""
        limits = self.config.timeouts
        limit, connect = (timedelta(seconds=s) for s in (limits.allreduce, limits.connect))
        retries = math.ceil(limits.quorum) if limits.quorum_retries is None else limits.quorum_retries
        return IslandManager(
            pg=IslandGroup(limit, min(connect, MEETING)),
            load_state_dict=None, state_dict=None,
            min_replica_size=self.config.min_islands,
            use_async_quorum=False,
            timeout=limit,
            quorum_timeout=timedelta(seconds=limits.quorum),
            connect_timeout=min(connect, CONNECT),
            quorum_retries=retries,  # torchft waits quorum_timeout / (retries + 1) between two
            rank=self.rank, world_size=self.world,
            store_addr=host, store_port=port,
            lighthouse_addr=address, replica_id=self.island, hostname=self.config.interface,
            checkpoint_transport=transport,
            # every island starts from the same weights, which the handshake checks: nothing to copy at step 0
            init_sync=False,
        )  # fmt: skip

    def _store(self) -> tuple[str, int]:
        """Return a store that all processes of the island share."""
        store = dist.TCPStore(
            self.config.interface, 0, is_master=True, wait_for_workers=False
        ) if self.rank == 0 else None  # fmt: skip
        self._own_store = store  # lives as long as the link
        if self.world == 1:
            return self.config.interface, store.port
        place: list[Any] = [(self.config.interface, store.port) if store else None]
        dist.broadcast_object_list(place, src=0)
        return place[0]

    def quorum(self) -> None:
        """Meet the islands that are ready.

        Raises:
            OuterLoopError: nobody came, or the lighthouse stayed away, within the time limits.
        """
        manager = self.manager
        # a number that torchft takes for a new quorum's: connect anew for every exchange, see `meeting`
        manager._quorum_id = -1
        steps = gathered(manager.current_step(), self.world)
        if len(set(steps)) > 1:  # it was healed on some of the island's processes only: once more, all of them
            manager.load_state_dict({**manager.state_dict(), "step": min(steps)})
        try:
            manager.start_quorum()
        except Exception as error:
            manager._quorum_future = None  # torchft would raise the old error again at the next attempt
            raise OuterLoopError(
                f"Island {self.island!r} found no quorum within {self.config.timeouts.quorum:g} s "
                f"({type(error).__name__}: {error}). The lighthouse is down, fewer than its --min-islands are there, "
                "or half of the islands are stuck but alive. `composer-rl islands doctor` explains the time limits."
            ) from error

    def combined(self, digests: list[str]) -> str:
        """Return one hash for the whole island: of the parts that all its processes hold."""
        digests = [d for part in gathered(digests, self.world) for d in part]
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    def everywhere(self, holds: bool) -> bool:
        """Return whether it holds on all processes of the island."""
        return all(gathered(holds, self.world))

    def close(self) -> None:
        """Stop heartbeats and servers."""
        self.manager.shutdown(wait=False)
        self.manager._pg.abort(errored=False)


def bytes_of(parameters: list[torch.Tensor]) -> int:
    """Return the size of one exchange: what this island sends of a fragment."""
    return sum(p.numel() * p.element_size() for p in parameters)
