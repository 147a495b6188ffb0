"""The outer loop around an inner optimizer: count its steps, meet the others, exchange, go on.

Convention (torchft's, DiLoCo's algorithm 1): g = mean over islands of (theta_0 - theta_i); b = momentum * b + g;
theta = theta - lr * (g + momentum * b) with Nesterov. Nothing is negated.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from composer_plugins.config import OuterConfig
from composer_plugins.errors import OuterLoopError
from composer_plugins.first_step import is_rehearsal
from composer_plugins.outer import HostState
from composer_torchft.checks import inner_optimizer, same_run
from composer_torchft.exchange import IslandFragment
from composer_torchft.fingerprints import as_integer, config_hash, layout_hash
from composer_torchft.fragments import is_sharded, parameters_of, split_by_depth
from composer_torchft.handshake import PROTOCOL, Action, Card, Phase, exchange, exchange_id, judge, refusal
from composer_torchft.links import Link, bytes_of
from composer_torchft.rounds import Round, RoundLog

logger = logging.getLogger("composer_torchft")

#: Of the checkpoint format.
VERSION = 1
#: Seconds that a leaving island keeps its connections open for peers that are still reading.
LINGER = 1.0


def attach(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    config: OuterConfig,
    *,
    host_state: HostState | None = None,
    resume: dict[str, Any] | None = None,
    log: Path | None = None,
) -> DiLoCoLoop:
    """Put DiLoCo around an optimizer, see `composer_plugins.outer.AttachOuterLoop`."""
    if not config.sync_every:
        raise OuterLoopError("outer.sync_every is 0, which means no outer loop: set the inner steps between syncs.")
    loop = DiLoCoLoop(optimizer, named_parameters, config, host_state or HostState(), RoundLog(log))
    try:
        if resume is not None:
            loop.load_state_dict(resume)
        loop.meet()
    except BaseException:
        loop.close()
        raise
    return loop


class DiLoCoLoop:
    """DiLoCo (one fragment) and Streaming DiLoCo (several), see `composer_plugins.outer.OuterLoop`."""

    def __init__(self, optimizer, named_parameters, config: OuterConfig, host_state: HostState, log: RoundLog) -> None:
        self.config, self.host_state, self.log = config, host_state, log
        self.inner = inner_optimizer(optimizer)
        parameters = parameters_of(self.inner, named_parameters)
        #: Every process of the island holds a part of its own (FSDP2), and so a state of its own.
        self.sharded = any(is_sharded(p) for _, p in parameters)
        parts = split_by_depth(parameters, config.fragments)
        self._config, self._layout = config_hash(config), layout_hash(parts)
        self.link = Link(config)
        self.manager = self.link.manager
        self.fragments = [IslandFragment(self.manager, part, i, self.inner, config) for i, part in enumerate(parts)]
        # registered after the fragments', so it runs when their global parameters are there
        self.manager.register_state_dict_fn("island", self._take_over, self._hand_over)
        self._every = config.sync_every // config.fragments
        self._local_step, self._prepared, self._healed, self._inside = 0, False, False, False
        self.replaced = False
        #: Names of the current exchange and of the last one that was committed; the donor's place in its round.
        self._meeting = self._commit = self._donor_step = 0
        self._round: dict[str, Any] = {}
        self._hooks = [
            self.inner.register_step_pre_hook(lambda *_: self.manager.disallow_state_dict_read()),
            self.inner.register_step_post_hook(lambda *_: self._after_step()),
        ]

    # Every inner step

    def _after_step(self) -> None:
        self.manager.allow_state_dict_read()
        if is_rehearsal(self.inner):
            return
        self._local_step += 1
        for fragment in self.fragments:
            fragment.age += 1
        self._inside = True
        if self._local_step >= self._every - self.config.sync_delay and not self._prepared:
            self._begin_round()
            self._prepare()
        if self._local_step >= self._every:
            self._complete()
        self._inside = False

    def _begin_round(self) -> None:
        self._round = {"waited": 0.0, "stopped": 0.0, "retries": 0, "bytes": 0, "lost": 0, "not_finite": False}
        self._healed = False

    def _current(self) -> IslandFragment:
        return self.fragments[self.manager.current_step() % len(self.fragments)]

    def _prepare(self) -> None:
        """Meet the others, compare notes, send the fragment whose turn it is."""
        start = time.perf_counter()
        self._stay_finite()
        self._agree(Phase.SYNC)
        self._round["waited"] += time.perf_counter() - start
        self._send()
        self._round["stopped"] += time.perf_counter() - start

    def _send(self) -> None:
        fragment = self._current()
        fragment.prepare_sync()
        self._round["bytes"] += bytes_of(fragment.global_tensors())
        self._prepared = True

    def _stay_finite(self) -> None:
        """Go back to the global parameters when these are NaN or infinite: sent, they would take all islands along."""
        if self._is_finite():
            return
        lost = self._start_from_global()
        if not self._is_finite():
            raise OuterLoopError("The global parameters are not finite. Resume all islands from an earlier checkpoint.")
        self._round["not_finite"] = True
        logger.warning(
            "outer loop: the parameters of island %s were not finite. Its %d inner steps since they were the global ones are "
            "given up, and it goes on from those. Look at its loss, learning rate and data if this comes again.",
            self.link.island, lost,
        )  # fmt: skip

    def _is_finite(self) -> bool:
        return self.link.everywhere(all(f.part.is_finite() for f in self.fragments))

    def _agree(self, phase: Phase) -> list[Card]:
        """Return the cards of a quorum whose islands agree. Raises `OuterLoopError` when this one has to leave."""
        for _ in range(self.config.max_retries + 1):
            self.link.quorum()
            mine = self._card(phase)
            cards = exchange(self.manager, mine)
            if not self.link.everywhere(cards is not None):
                if cards is not None:  # another process of this island lacks them: each would wait in another place
                    self.manager.report_error(OuterLoopError("the cards did not arrive at all processes of the island"))
                    self.manager._pg.abort()
                self._meet_again()
                continue
            verdict = judge(cards, mine)
            if verdict.action is Action.GO_ON:
                self._meeting = exchange_id(cards)
                return cards
            if verdict.action is Action.LEAVE:
                raise refusal(verdict.what, cards)
            self.manager.report_error(OuterLoopError(verdict.what))
            self._meet_again()
            if verdict.action is Action.STEP_BACK:
                self._step_back()
            else:
                time.sleep(0.5)
        raise OuterLoopError(
            f"Island {self.link.island!r} met the others {self.config.max_retries + 1} times and every exchange failed: "
            f"{self.manager.errored()}. Check the network between the islands (outer.interface)."
        )

    def _meet_again(self) -> None:
        self._round["retries"] += 1
        self.manager.should_commit()  # counts the failure, so that the next quorum rebuilds the connections

    def _card(self, phase: Phase) -> Card:
        values = self.link.combined([f.digest() for f in self.fragments])
        return Card(
            PROTOCOL, phase, self.manager.current_step(), as_integer(self._config), as_integer(self._layout),
            as_integer(values), self._commit, secrets.randbits(62),
        )  # fmt: skip

    def _step_back(self) -> None:
        """Give up an outer step that the others made differently; the next quorum heals an island that is behind."""
        state = self.manager.state_dict()
        self.manager.load_state_dict({**state, "step": state["step"] - 1})

    def _complete(self, *, attach: bool = False) -> None:
        """Wait for the exchange and make the outer step; try again while it fails."""
        start = time.perf_counter()
        committed, fragment = False, self._current()
        for attempt in range(self.config.max_retries + 1):
            if attempt:
                self._round["retries"] += 1
                self._again(fragment)
                fragment = self._current()
            committed = fragment.perform_sync()
            self._prepared = False
            if committed:
                self._commit = self._meeting
                break
        fragment.drop_kept()
        self._round["stopped"] += time.perf_counter() - start
        if not committed:
            self._round["lost"] = max(self._round["lost"], fragment.age)
        self._local_step = fragment.age = 0
        self._record(fragment, committed, attach)

    def _again(self, fragment: IslandFragment) -> None:
        """Prepare a failed exchange once more, from the same local parameters."""
        before = self.manager.current_step()
        fragment.take_back()
        for part in self.fragments:
            part.cancel()
        self._prepare()
        if self.manager.current_step() != before:
            self._healed = True

    def _record(self, fragment: IslandFragment, committed: bool, attach: bool) -> None:
        self.log.add(
            Round(
                outer_step=self.manager.current_step(), fragment=fragment.number,
                participants=self.manager.num_participants(), committed=committed, healed=self._healed,
                retries=self._round["retries"], discarded_inner_steps=self._round["lost"], bytes=self._round["bytes"],
                seconds=round(self._round["stopped"], 4), waited=round(self._round["waited"], 4),
                theta=fragment.digest()[:16], attach=attach, not_finite=self._round["not_finite"],
            )
        )  # fmt: skip

    # Joining

    def meet(self) -> None:
        """Meet the other islands; when they are in the middle of a run, take over their state and their sync."""
        self._begin_round()
        start = time.perf_counter()
        cards = self._agree(Phase.ATTACH)
        while self._too_few_to_begin(cards):
            if time.perf_counter() - start > self.config.timeouts.quorum:
                raise OuterLoopError(
                    f"{len(cards)} islands are here and a run begins with {self.config.start_with} (outer.start_with). "
                    "Start the others, or resume this one from a checkpoint."
                )
            self.manager.report_error(OuterLoopError("too few islands to begin a run"))
            self.manager.should_commit()
            time.sleep(0.5)
            cards = self._agree(Phase.ATTACH)
        self._round["waited"] = time.perf_counter() - start
        self.replaced = self._healed
        if all(card.phase == Phase.ATTACH for card in cards):
            if self._healed:  # all resume, this one from an older checkpoint: be where the others are in the round
                self._local_step = self._donor_step
            if self._local_step >= self._every - self.config.sync_delay:
                self._begin_round()
                self._prepare()  # it was under way when the checkpoint was written
            return
        # the others sync right now: take part with a pseudo-gradient of zero, then the rounds are aligned
        self.replaced = True
        self._send()
        self._local_step = 0
        start_step = self.manager.current_step()
        self._complete(attach=True)
        if self.manager.current_step() == start_step:
            raise OuterLoopError("The island joined a sync that failed. Start it again.")

    def _too_few_to_begin(self, cards: list[Card]) -> bool:
        begins = all(c.phase == Phase.ATTACH and c.step == 0 for c in cards)
        return begins and len(cards) < self.config.start_with

    # What a healing island takes over

    def _hand_over(self) -> dict[str, Any]:
        return {
            "local_step": self._local_step, "inside": self._inside, "commit": self._commit,
            "host": self.host_state.read(),
        }  # fmt: skip

    def _take_over(self, state: dict[str, Any]) -> None:
        """Start from the global parameters, which have just been replaced, with the donor's schedule."""
        for fragment in self.fragments:
            fragment.changed()
        self._start_from_global()
        # a donor inside an optimizer step counts that step a moment later; a joiner that stands before one must add it
        self.host_state.write(state["host"], int(state["inside"]) - int(self._inside))
        self._commit, self._donor_step, self._healed = state["commit"], state["local_step"], True

    def _start_from_global(self) -> int:
        """Go to the global parameters, with a fresh inner optimizer. Returns the inner steps that a fragment loses at most."""
        lost = max(f.age for f in self.fragments)
        self._round["lost"] = max(self._round["lost"], lost)
        for fragment in self.fragments:
            fragment.cancel()
            fragment.restore_parameters()
            fragment.age = 0
        self.inner.state.clear()
        return lost

    # Checkpoints and the end

    def state_dict(self) -> dict[str, Any]:
        """Return tensors, numbers and strings only (`torch.load(weights_only=True)` reads them)."""
        return {
            "version": VERSION,
            "config": self._config,
            "layout": self._layout,
            "manager": self.manager.state_dict(),
            "local_step": self._local_step,
            "commit": self._commit,
            "fragments": [f.outer_state() for f in self.fragments],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue; an exchange that was under way when the checkpoint was written is made again.

        It is made from the checkpoint's parameters, which are those that were sent unless steps of `sync_delay` lay
        between.
        """
        same_run(state, version=VERSION, config=self._config, layout=self._layout)
        self.manager.load_state_dict(state["manager"])
        for fragment, saved in zip(self.fragments, state["fragments"], strict=True):
            fragment.load_outer_state(saved)
        self._commit = state["commit"]
        self._local_step = state["local_step"]

    def metrics(self) -> dict[str, float]:
        """Return the last round's figures."""
        return self.log.metrics()

    def table(self):
        """Return a rich table of all rounds."""
        return self.log.table(self.link.island)

    def finish(self) -> int:
        """Leave; the parameters are the last global ones. Returns the number of inner steps that were given up."""
        lost = self._local_step
        for fragment in self.fragments:
            fragment.cancel()
            fragment.restore_parameters()
        if self.log.rounds and self.log.rounds[-1].participants > 1:
            time.sleep(LINGER)
        self.close()
        self._local_step = 0
        return lost

    def close(self) -> None:
        """Remove the hooks and stop the connections; parameters stay as they are."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.link.close()
