"""`python -m jaxllm.doctor`: what it prints of this machine, and of kernels that fail."""

from __future__ import annotations

import platform

import jax
import pytest

from jaxllm import doctor
from jaxllm.model.kernels.self_check import Check


@pytest.fixture
def checked(monkeypatch):
    """A function that sets what the self-check finds, in both precisions."""
    monkeypatch.setattr(doctor, "measured_peak_tflops", lambda precision: 2.5 if precision == "float32" else 5.0)
    monkeypatch.setattr(doctor, "measured_memory_gb_per_s", lambda: 42.0)

    def find(*checks: Check) -> None:
        monkeypatch.setattr(doctor, "check_kernels", lambda *args: list(checks))

    return find


def test_it_prints_what_a_bug_report_needs(checked, capsys):
    checked(Check("routed", "output", 1.5e-3, None))
    assert doctor.main(["--preset", "tiny"]) == 0
    said = capsys.readouterr().out
    for part in (
        f"Python {platform.python_version()}", f"JAX {jax.__version__}", f"devices: {len(jax.devices())} x cpu",
        "bfloat16 in hardware: ", "--precision auto is ", "float32 product: 2.5 TFLOP/s (no data sheet)",
        "bfloat16 product: 5 TFLOP/s", "memory, read and written: 42 GB/s",
        "kernels of tiny: experts: loop over the experts that have tokens", "routed", "1.5e-03",
    ):  # fmt: skip
        assert part in said, part
    assert platform.node() not in said


def test_a_kernel_that_fails_is_named_and_ends_it_with_1(checked, capsys):
    checked(
        Check("routed", "output", 1e-3, None), Check("attention", "run", float("inf"), "it raises OSError: [cuDNN]")
    )
    assert doctor.main(["--preset", "tiny"]) == 1
    said = capsys.readouterr().out
    assert "inf FAILED" in said
    assert "bfloat16, attention: it raises OSError: [cuDNN]" in said


def test_an_unknown_preset_is_refused_in_one_line(capsys):
    assert doctor.main(["--preset", "huge"]) == 2
    assert "preset is 'huge': choose one of" in capsys.readouterr().err
