"""prime-rl's adapter under the suite that any adapter runs (`composer-rl conformance prime_rl`)."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from composer_prime_rl.conformance import TestPrimeRL as Suite


@pytest.mark.prime_rl
class TestPrimeRL(Suite):
    """Skipped, with the reason, where there is no prime-rl."""
