"""Shared by the loss tests."""

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def oracle():
    """The formulas in float64 NumPy, which share no code with the losses."""
    from composer_plugins.conformance import oracle

    return oracle


@pytest.fixture
def rng():
    return np.random.default_rng(0)
