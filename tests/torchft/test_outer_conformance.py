"""The outer loop on torchft under the suite that any outer loop runs (`composer-rl conformance torchft`)."""

from composer_torchft.conformance import TestTorchFT

__all__ = ["TestTorchFT"]
