"""For the tests of both frameworks: PyTorch's peak speed is measured once, as `conftest.py` does it for JAX."""

from __future__ import annotations

import functools

import pytest

import torch_ref.train


@pytest.fixture(scope="session", autouse=True)
def _measure_once():
    with pytest.MonkeyPatch.context() as patch:
        measured = functools.cache(torch_ref.train.measured_peak_tflops)
        patch.setattr(torch_ref.train, "measured_peak_tflops", measured)
        yield
