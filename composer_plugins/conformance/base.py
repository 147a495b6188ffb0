"""What all contracts share: declared capabilities, declared deviations, and no silent removal of a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from composer_plugins.errors import ComposerError


class ConformanceError(ComposerError, TypeError):
    """A class says something about itself that the suite does not accept."""


def contract(*needs: Any) -> Callable[[Callable], Callable]:
    """Mark a test as a contract that holds for every implementer with the capabilities `needs`."""

    def mark(function: Callable) -> Callable:
        function.__contract__ = tuple(needs)
        return function

    return mark


class Conformance:
    """Base of the suites.

    A subclass is an ordinary pytest class (name it `Test...`). A contract that it cannot keep goes into `deviations`
    with the reason and is then expected to fail: if it passes after all, that is a failure too. Overriding or removing
    a contract is refused.
    """

    #: What the implementer can do, in words of the suite's vocabulary.
    capabilities: ClassVar[frozenset] = frozenset()
    #: Why a capability is not offered; shown wherever its contracts are left out.
    reasons: ClassVar[dict[Any, str]] = {}
    #: Name of a contract (with its parameters in brackets, or without for all of them) to the reason.
    deviations: ClassVar[dict[str, str]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        problems = broken_promises(cls)
        if problems:
            raise ConformanceError(f"{cls.__name__}: {' '.join(problems)}")

    @pytest.fixture(autouse=True)
    def _declared(self, request: pytest.FixtureRequest) -> None:
        """Skip what is not offered; expect a declared deviation to fail."""
        needs = getattr(request.function, "__contract__", ())
        missing = sorted(str(need) for need in needs if need not in self.capabilities)
        if missing:
            pytest.skip(f"not offered: {', '.join(self.why_not(word) for word in missing)}")
        for name in (request.node.name, request.node.originalname):
            if name in self.deviations:
                request.applymarker(pytest.mark.xfail(reason=f"deviation: {self.deviations[name]}", strict=True))
                break

    def why_not(self, word: str) -> str:
        """A capability that is not offered, with the reason where one is given."""
        return f"{word} ({self.reasons[word]})" if word in self.reasons else word


def contracts_of(cls: type) -> dict[str, Callable]:
    """Return the contracts of a suite by name, as its own base class defines them."""
    found: dict[str, Callable] = {}
    for base in reversed(cls.__mro__):
        for name, value in vars(base).items():
            if hasattr(value, "__contract__"):
                found.setdefault(name, value)
    return found


def broken_promises(cls: type) -> list[str]:
    """Return what a subclass may not say about itself, as sentences with the fix."""
    contracts, problems = contracts_of(cls), []
    for name, function in contracts.items():
        if getattr(cls, name, None) is not function:
            problems.append(
                f"{name} is a contract and may not be replaced or removed. Leave it as it is; if it cannot hold, put "
                "its name into `deviations` with the reason."
            )
    if cls.__dict__.get("__test__", True) is False:
        problems.append("__test__ = False would switch every contract off: remove it.")
    for word in cls.reasons:
        if word in cls.capabilities:
            problems.append(f"reasons says why {str(word)!r} is not offered, and capabilities offers it: take one out.")
    for name, reason in cls.deviations.items():
        if name.split("[")[0] not in contracts:
            problems.append(f"deviations names {name!r}, which is no contract: {', '.join(sorted(contracts))}.")
        elif not str(reason).strip():
            problems.append(f"deviations gives no reason for {name!r}.")
    return problems
