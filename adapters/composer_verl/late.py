"""Importing a module of ours right after one of verl's.

verl imports our entry point in every process, before its own trainers and engines exist; importing those from there
would make every process load all of verl, and would end in an import cycle where a module of ours comes first. So
our trainer and our engine are imported when verl itself has imported what they build on, and not at all elsewhere.
"""

from __future__ import annotations

import importlib
import importlib.abc
import logging
import sys
from types import ModuleType

logger = logging.getLogger("composer_verl")

#: verl's module, and ours that registers something with it.
LATE = {
    "verl.trainer.ppo.v1": "composer_verl.trainer",
    "verl.workers.engine": "composer_verl.ema_engine",
}


def register_late() -> None:
    """Import each of our modules of `LATE` now if verl's is there already, else as soon as it is."""
    waiting = {}
    for theirs, ours in LATE.items():
        if theirs in sys.modules:
            _import(ours)
        else:
            waiting[theirs] = ours
    if waiting:
        sys.meta_path.insert(0, _After(waiting))


def _import(ours: str) -> None:
    try:
        importlib.import_module(ours)
    except Exception as error:  # verl's own trainers must keep working
        logger.error(
            "composer-plugins could not register %s with verl: %s: %s. A recipe that needs it will not run; "
            "composer_verl is tested with verl 0.9.1.",
            ours, type(error).__name__, error,
        )  # fmt: skip


class _After(importlib.abc.MetaPathFinder):
    """Finds nothing itself; has the loader of an awaited module import ours when it is done."""

    def __init__(self, waiting: dict[str, str]) -> None:
        self.waiting = waiting

    def find_spec(self, name: str, path=None, target: ModuleType | None = None):
        if name not in self.waiting:
            return None
        ours = self.waiting.pop(name)
        if not self.waiting:
            sys.meta_path.remove(self)
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                spec.loader = _ThenOurs(spec.loader, ours)
                return spec
        return None


class _ThenOurs(importlib.abc.Loader):
    """verl's own loader, and then an import of ours."""

    def __init__(self, loader, ours: str) -> None:
        self.loader, self.ours = loader, ours

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _import(self.ours)
