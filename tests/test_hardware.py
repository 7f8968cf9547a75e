"""What multiplies bfloat16 where JAX will compute, as a machine's files and variables tell before JAX starts."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import util
from importlib.metadata import EntryPoint

import pytest

from jaxllm.errors import UserError
from jaxllm.run import hardware
from jaxllm.run.hardware import bfloat16_hardware, cpu_bfloat16
from jaxllm.run.throughput import reference_peak

CPU = "avx512_bf16"
CUDA = ("jax_cuda13_plugin",)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that makes a machine, and returns what multiplies bfloat16 on it. Its processor does."""
    for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_text(f"flags : fpu {CPU}\n")

    def found(devices=(), packages=(), capabilities=None, plugins=(), **environment) -> str | None:
        for device in devices:
            (tmp_path / "dev" / device).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "dev" / device).touch()
        program = tmp_path / "nvidia-smi"
        if capabilities is not None:
            program.write_text(f"#!/bin/sh\nprintf '{capabilities}'\n")
            program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        find_spec = util.find_spec
        monkeypatch.setattr(
            "importlib.util.find_spec",
            lambda name: (name in packages or None) if "plugin" in name or name == "libtpu" else find_spec(name),
        )
        monkeypatch.setattr(
            hardware, "entry_points", lambda group: [EntryPoint(name, "", group) for name in (*plugins, "xla_cuda13")]
        )
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return bfloat16_hardware(tmp_path)

    return found


@pytest.mark.parametrize(
    ("devices", "capabilities", "wanted"),
    [
        (["nvidia0", "nvidiactl"], "9.0\\n", "the GPU"),
        (["nvidia3", "nvidiactl"], "8.0\\n", "the GPU"),  # a container that has only the fourth
        (["dxg"], "8.9\\n", "the GPU"),  # WSL
        (["nvidia0", "nvidiactl"], "7.5\\n", None),
        (["nvidia0", "nvidia1", "nvidiactl"], "9.0\\n7.0\\n", None),  # CUDA may take either
        (["nvidia0", "nvidiactl"], None, None),  # no nvidia-smi
        (["nvidia0", "nvidiactl"], 'Field "compute_cap" is not a valid field to query.', None),
        (["nvidia0", "nvidiactl"], "", None),
        ([], "9.0\\n", CPU),
    ],
)
def test_a_gpu_counts_by_its_compute_capability(machine, devices, capabilities, wanted):
    assert machine(devices, CUDA, capabilities) == wanted


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({"CUDA_VISIBLE_DEVICES": ""}, CPU),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, CPU),
        ({"CUDA_VISIBLE_DEVICES": "none"}, CPU),
        ({"CUDA_VISIBLE_DEVICES": "1,0"}, "the GPU"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8932f937"}, "the GPU"),
        ({"JAX_PLATFORMS": "cpu"}, CPU),
        ({"JAX_PLATFORMS": "cpu,cuda"}, CPU),
        ({"JAX_PLATFORM_NAME": "CPU"}, CPU),
        ({"JAX_PLATFORM_NAME": "cpu", "JAX_PLATFORMS": "cuda,cpu"}, CPU),
        ({"JAX_PLATFORMS": "cuda,cpu"}, "the GPU"),
        ({"JAX_PLATFORMS": "gpu"}, "the GPU"),
        ({"JAX_PLATFORMS": ""}, "the GPU"),
        ({"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": ""}, None),  # JAX will refuse it
        ({"JAX_PLATFORMS": "rocm"}, None),
        ({"JAX_PLATFORMS": "tpu"}, None),
    ],
)
def test_variables_choose_the_device(machine, environment, wanted):
    assert machine(["nvidia0", "nvidiactl"], CUDA, "9.0\\n", **environment) == wanted


def test_a_device_counts_with_its_plugin_only(machine):
    assert machine(["nvidia0", "nvidiactl", "accel0", "vfio/0"], (), "9.0\\n") == CPU


@pytest.mark.parametrize("device", ["accel0", "accel3", "vfio/1"])
def test_a_tpu(machine, device):
    assert machine([device], ("libtpu",)) == "the TPU"
    assert machine(packages=("libtpu",), JAX_PLATFORMS="cpu") == CPU


def test_an_accelerator_of_another_maker_is_not_known(machine):
    assert machine(plugins=("xla_rocm7",)) is None
    assert machine(plugins=("xla_rocm7",), JAX_PLATFORMS="cpu") == CPU


def test_jax_is_not_started(tmp_path):
    code = "from jaxllm.run.hardware import bfloat16_hardware as f; import sys; f(); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"JAX_PLATFORMS": ""})


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
