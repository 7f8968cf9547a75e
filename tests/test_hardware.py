"""What multiplies bfloat16 on the devices of a run, which decides its precision, and the reference of its MFU."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from jaxllm.errors import UserError
from jaxllm.run import processes
from jaxllm.run.hardware import bfloat16_hardware, cpu_bfloat16
from jaxllm.run.throughput import reference_peak


def gpu(capability: str) -> SimpleNamespace:
    return SimpleNamespace(platform="gpu", compute_capability=capability)


@pytest.mark.parametrize(
    ("devices", "wanted"),
    [
        ([gpu("9.0")], "the GPU"),
        ([gpu("8.0"), gpu("8.0")], "the GPU"),
        ([gpu("12.0")], "the GPU"),
        ([gpu("7.5")], None),
        ([gpu("9.0"), gpu("7.0")], None),  # a run may use both
        ([gpu("gfx942")], "the GPU"),
        ([gpu("gfx90a:sramecc+:xnack-")], "the GPU"),
        ([gpu("gfx1100")], "the GPU"),
        ([gpu("gfx906")], None),
        ([SimpleNamespace(platform="gpu")], None),  # it does not tell
        ([SimpleNamespace(platform="METAL")], None),
        ([SimpleNamespace(platform="tpu")], "the TPU"),
        ([SimpleNamespace(platform="cpu")], cpu_bfloat16()),
    ],
)
def test_a_device_counts_by_what_jax_tells_of_it(devices, wanted, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no nvidia-smi is asked
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert bfloat16_hardware() == wanted


@pytest.mark.parametrize(
    ("found", "wanted"), [(["the GPU", "the GPU"], "the GPU"), (["the GPU", None], None), ([None, "the GPU"], None)]
)
def test_processes_agree(found, wanted, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(processes, "_from_each", lambda local: found)
        assert processes.all_have(found[0]) == wanted
    assert processes.all_have(found[0]) == found[0]  # there is one process


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("flags\t\t: fpu avx512_bf16 sse\n", "avx512_bf16"),
        ("processor : 0\nflags : fpu avx512_bf16 amx_bf16\n", "amx_bf16"),
        ("flags : fpu avx512f\n", None),
        ("Features : bf16\n", None),
        ("", None),
        (None, None),  # no such file
    ],
)
def test_a_processor_counts_by_its_flags(flags, wanted, tmp_path):
    if flags is not None:
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc" / "cpuinfo").write_text(flags)
    assert cpu_bfloat16(tmp_path) == wanted


@pytest.mark.parametrize("module", ["jaxllm.run.hardware", "jaxllm.run.arguments"])
def test_jax_is_not_imported(module):
    code = f"import sys, {module}; assert not {{'jax', 'torch'}} & {{*sys.modules}}"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("device", "supported", "wanted"),
    [("cuda", True, "the GPU"), ("cuda", False, None), ("mps", True, None), ("cpu", True, cpu_bfloat16())],
)
def test_pytorch_names_what_its_own_device_has(device, supported, wanted, monkeypatch):
    import torch

    from torch_ref import device as of_torch

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert of_torch.bfloat16_hardware(torch.device(device)) == wanted


def test_pytorch_announces_its_own_device(narrow, tmp_path, monkeypatch, capsys):
    import torch

    import torch_ref.train

    def stop(*_):
        raise UserError("announced")

    monkeypatch.setattr(torch_ref.train, "choose_device", lambda config: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch_ref.train, "reference_peak", stop)
    assert torch_ref.train.main([*narrow, "--precision", "bfloat16", "--run-dir", str(tmp_path / "run")]) == 2
    assert "the GPU multiplies bfloat16 in hardware) on cuda;" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "kind", "tflops", "source"),
    [
        (5.0, "NVIDIA H200", 5.0, "given for bfloat16"),
        (None, "NVIDIA H200", 989.4, "the data sheet's of NVIDIA H200 SXM 141 GB, in dense bfloat16"),
        (None, "NVIDIA H200 MIG 1g.18gb", 7.0, "measured on bfloat16"),
        (None, None, 7.0, "measured on bfloat16"),
    ],
)
def test_the_reference_of_the_mfu(given, kind, tflops, source):
    assert reference_peak(given, "bfloat16", kind, lambda precision: 7.0) == (tflops, source)
    assert reference_peak(given, "bfloat16", kind, lambda precision: 7.0).of_devices(8) == (8 * tflops, source)
