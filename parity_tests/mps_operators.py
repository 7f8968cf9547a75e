"""Records the operators that a run dispatches and checks, without a Mac, that PyTorch's MPS backend has their kernels.

The installed torch contains `native_functions.yaml`, the table from which its dispatcher is generated for all
platforms. `Recorder` looks up each dispatched operator as an MPS build would: an MPS kernel, the MPS kernel of its
structured operator, or a composite. A composite runs as on MPS: its parts run on CPU tensors, even if the CPU has a
kernel for the whole operator. The parts are recorded and checked too. In this model, only `linear` is the reverse case:
MPS has one kernel for it, the CPU runs it in parts, and the parts are recorded.

An `MpsTensor` reports the device `mps:0` to Python and to the dispatcher, and holds its values on the CPU. Decisions
that depend on the device (autocast's lists, branches in transformers, torch.optim and clip_grad_norm_) are therefore
the same as on a Mac. Autograd does not run on it, because the engine asks the accelerator for its stream. A
FakeTensorMode with a fake `mps` device ends the process for a similar reason. `parity_tests.mps_runs` describes how
training is recorded.

A breach is one of two things. The first is an operator without a kernel: on a Mac it is an error, or a fallback to the
CPU under PYTORCH_ENABLE_MPS_FALLBACK. (Operators that MPSFallback.mm lets fall back silently have no kernel in the
table either.) The second is a float64 or complex input or output, zero-dimensional tensors included. This method cannot
show whether a Metal kernel is correct, or which dtypes and sizes it refuses at run time.
"""

from __future__ import annotations

import copy
import ctypes
import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import torchgen
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torchgen.gen import ParsedYaml, parse_native_yaml
from torchgen.model import DispatchKey

COMPOSITES = ("CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional", "CompositeImplicitAutograd")
LEAVES = ("copy_", "detach")
"""Composites in the table that have no parts: the kernel of copy_ has a branch for MPS."""
FORBIDDEN = (torch.float64, torch.complex32, torch.complex64, torch.complex128)


@functools.cache
def _table() -> tuple[ParsedYaml, dict[str, object]]:
    folder = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native"
    parsed = parse_native_yaml(str(folder / "native_functions.yaml"), str(folder / "tags.yaml"))  # with autogen
    return parsed, {str(function.func.name): function for function in parsed.native_functions}


@functools.cache
def mps_kernel(name: str) -> str | None:
    """The kernel that runs `name` (such as "add.Tensor", without a namespace) on MPS.

    Returns:
        "MPS" for an MPS kernel, the dispatch key of a composite, or None: no kernel, a fallback to the CPU.
    """
    parsed, functions = _table()
    function = functions.get(name)
    if function is None:
        return None
    mps = parsed.backend_indices[DispatchKey.MPS]
    structured = function.structured_delegate and functions[str(function.structured_delegate)]
    if mps.has_kernel(function) or (structured and mps.has_kernel(structured)):
        return "MPS"
    for key in COMPOSITES:
        if parsed.backend_indices[DispatchKey[key]].has_kernel(function):
            return key
    return None


@contextmanager
def mps_device() -> Iterator[None]:
    """A context in which a torch without MPS accepts the device `mps:0`.

    Indexing a tensor asks the device guard for the current device. The guard of the meta device, which does nothing, is
    used instead. The device needs its index, because this guard reports the meta device as the current one.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    mps, meta = (getattr(torch._C._autograd.DeviceType, name).value for name in ("MPS", "Meta"))
    guards = (ctypes.c_void_p * (max(mps, meta) + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    lifts_cpu = torch._C._only_lift_cpu_tensors()
    guards[mps] = guards[meta]
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(list, device=...): made on the CPU and moved, as on a Mac
    try:
        with mock.patch("torch.Event"):  # on MPS only, transformers' generate checks the stop one token later
            yield
    finally:
        guards[mps] = None
        torch._C._set_only_lift_cpu_tensors(lifts_cpu)


class MpsTensor(Tensor):
    """A tensor that reports `mps:0` and holds its values in a CPU tensor. Without autograd."""

    @staticmethod
    def __new__(cls, values: Tensor):
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        return Tensor._make_wrapper_subclass(cls, values.shape, device="mps:0", **layout)

    def __init__(self, values: Tensor):
        self.values_on_cpu = values

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"MpsTensor({self.values_on_cpu})"

    def tolist(self) -> list:
        return self.to("cpu").tolist()  # torch's method does the same but refuses subclasses

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run_on_values(func, func, args, kwargs or {})


def _run_on_values(func, kernel, args: tuple, kwargs: dict):
    """Compute the results of operator `func` by `kernel` on the CPU, and return them on the device of `func`."""
    out = kernel(*tree_map(_to_cpu, args), **tree_map(_to_cpu, kwargs))
    if not _goes_to_mps(args, kwargs):
        return out
    out = tree_map(lambda leaf: MpsTensor(leaf) if isinstance(leaf, Tensor) else leaf, out)
    return return_and_correct_aliasing(func, args, kwargs, out)


def on_mps(model: nn.Module) -> nn.Module:
    """A copy of the model whose parameters and buffers are `MpsTensor`s."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(MpsTensor(parameter.detach()), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = MpsTensor(buffer)
    return model


def _to_cpu(leaf):
    if isinstance(leaf, MpsTensor):
        return leaf.values_on_cpu
    return torch.device("cpu") if isinstance(leaf, torch.device) else leaf


def _goes_to_mps(args: tuple, kwargs: dict) -> bool:
    """Whether the results of an operator are on MPS: from its `device` argument, else from its tensors."""
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"]).type == "mps"
    return any(isinstance(leaf, MpsTensor) for leaf in tree_leaves((args, kwargs)))


class Recorder(TorchDispatchMode):
    """Counts the operators that MPS would run, by name, and collects those that it would refuse.

    Args:
        everything: treat CPU tensors as on the device; else record only operators with an `MpsTensor`.
    """

    def __init__(self, everything: bool = False):
        super().__init__()
        self.everything = everything
        self.calls: Counter[str] = Counter()
        self.breaches: dict[str, str] = {}  # operator -> why

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        touches_mps = _goes_to_mps(args, kwargs) or any(issubclass(t, MpsTensor) for t in types)
        if not (touches_mps or self.everything):
            return func(*args, **kwargs)
        name = func.name().removeprefix("aten::")
        kernel = mps_kernel(name)
        self.calls[name] += 1
        call = functools.partial(self._parts, func, kernel) if kernel in COMPOSITES and name not in LEAVES else func
        out = _run_on_values(func, call, args, kwargs) if touches_mps else call(*args, **kwargs)
        self._check(name, kernel, tree_leaves((args, kwargs, out)))
        return out

    def _parts(self, func, kernel: str, *args, **kwargs):
        """Run the composite on CPU tensors and record its parts."""
        outer, self.everything = self.everything, True
        try:
            with self:
                return func._op_dk(getattr(torch._C.DispatchKey, kernel), *args, **kwargs)
        finally:
            self.everything = outer

    def _check(self, name: str, kernel: str | None, leaves: list) -> None:
        if kernel is None:
            self.breaches[name] = "has no MPS kernel"
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.dtype in FORBIDDEN:
                self.breaches[name] = f"has a {str(leaf.dtype).removeprefix('torch.')} tensor"

    def summary(self) -> str:
        """One line for each kind of kernel: the number of operators and their names."""
        kinds: dict[str, list[str]] = {}
        for name in sorted(self.calls):
            kinds.setdefault(mps_kernel(name) or "no kernel", []).append(name)
        lines = [f"{len(self.calls)} operators, {self.calls.total()} calls"]
        lines += [f"  {kind} ({len(names)}): {' '.join(names)}" for kind, names in sorted(kinds.items(), reverse=True)]
        return "\n".join(lines + [f"  BREACH {name} {why}" for name, why in self.breaches.items()])
