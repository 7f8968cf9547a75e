"""The plan of one step, from its compiled program, and the search for the largest batch that fits."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.config import TrainConfig
from jaxllm.config.groups import MeshConfig
from jaxllm.devices import Target
from jaxllm.errors import UserError
from jaxllm.files import read_json, write_json
from jaxllm.model import flops
from jaxllm.plan.hlo_cost import Collective, Kernel, Product
from jaxllm.plan.roofline import Roofline, roofline
from jaxllm.run.throughput import GIB

USABLE_MEMORY = {"cuda": 0.92, "tpu": 0.98}
"""The share of a device's memory that a program can use; a GPU's context, libraries and fragmentation take the rest."""

EXTRAS = {
    "cuda": (("jax_cuda13_plugin", "jax_cuda12_plugin"), "an NVIDIA GPU needs its plugin: pip install 'jax[cuda13]'"),
    "tpu": (("libtpu",), "a TPU needs libtpu: pip install 'jax[tpu]'"),
}
"""The packages of which one must be installed to compile for a platform."""

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "XLA_FLAGS": "",
}
"""Environment of the process that compiles; it hides all devices."""

MAX_COMPILATIONS = 12
"""Of a search for one mesh, with or without recomputation."""


class Refused(NamedTuple):
    """A step that the compiler refused: it does not fit into the device's memory."""

    config: TrainConfig
    target: Target
    message: str

    fits = False
    peak = None

    @property
    def devices(self) -> int:
        return self.config.mesh.devices


@dataclass(frozen=True)
class Plan:
    """The resources of one compiled step, on each device."""

    config: TrainConfig
    target: Target
    memory: dict[str, int]
    """Bytes: arguments, temporaries, outputs not in the place of an argument, and the program."""
    products: list[Product]
    collectives: list[Collective]
    roofline: Roofline
    touched: float
    """Bytes of memory that the kernels read and write."""
    unknown_loops: int
    compile_seconds: float
    jax: str

    @property
    def devices(self) -> int:
        return self.config.mesh.devices

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    @property
    def usable(self) -> float:
        return usable_bytes(self.target)

    @property
    def fits(self) -> bool:
        return self.peak <= self.usable

    @property
    def program_flops(self) -> float:
        return sum(product.flops for product in self.products)

    def model_flops(self, attention: flops.Attention) -> float:
        """Of one step, on all devices."""
        return self.config.tokens_per_step * flops.training_flops_per_token(
            self.config.model, self.config.data.seq_len, attention, frozen=self.config.adapters is not None
        )

    def mfu(self, seconds: float, attention: flops.Attention) -> float:
        peak = self.target.peak_tflops[self.config.decided_precision] * 1e12
        return self.model_flops(attention) / (seconds * peak * self.devices)


def usable_bytes(target: Target) -> float:
    return USABLE_MEMORY[target.platform] * target.memory_gib * GIB


def read_plan(config: TrainConfig, target: Target, reply: dict[str, Any]) -> Plan | Refused:
    """The plan from the reply of the compiling process."""
    if "out_of_memory" in reply:
        return Refused(config, target, reply["out_of_memory"])
    kernels = [Kernel(*kernel) for kernel in reply["kernels"]]
    products = [Product(*product) for product in reply["products"]]
    collectives = [Collective(*collective) for collective in reply["collectives"]]
    # count only the rows that a device's experts get with balanced routing, not all for which it reserves memory
    share = 1 / config.mesh.sizes.get("expert", 1)
    products = [p._replace(flops=p.flops * share) if p.kind == "grouped" else p for p in products]
    kernels = [k._replace(flops=k.flops * share) if k.kind == "grouped" else k for k in kernels]
    if reply["unknown_loops"]:  # not all products are known: use the model's FLOPs instead
        length, frozen = config.data.seq_len, config.adapters is not None
        per_token = flops.training_flops_per_token(config.model, length, "full", frozen=frozen)
        again = 1 + config.remat * sum(flops.forward_flops(config.model, length, "full").values()) / per_token
        kernels = [kernel._replace(kind=None, flops=0.0) for kernel in kernels]
        kernels.append(Kernel("dot", again * per_token * config.tokens_per_step / config.mesh.devices, 0.0))
    return Plan(
        config=config,
        target=target,
        memory=reply["memory"],
        products=products,
        collectives=collectives,
        roofline=roofline(target, config.decided_precision, kernels, collectives),
        touched=sum(kernel.bytes for kernel in kernels),
        unknown_loops=reply["unknown_loops"],
        compile_seconds=reply["compile_seconds"],
        jax=reply["jax"],
    )


def check_extra(name: str, target: Target) -> None:
    """Raise a UserError if XLA cannot compile for the target, or lacks a package for it."""
    if not target.compilable:
        raise UserError(f"target is {name!r}: its data sheet is known, but not the description that XLA compiles for")
    modules, needs = EXTRAS[target.platform]
    if not any(importlib.util.find_spec(module) for module in modules):
        raise UserError(f"target is {name!r}: compiling for {needs}")


def compile_plan(config: TrainConfig, target: Target) -> Plan | Refused:
    """Compile the step of a run in a process that sees no device; raises a UserError if the compiler fails."""
    again = (", remat" if config.remat else "") + (f", {config.mesh.axes}" if config.mesh.axes else "")
    print(f"compiling batch size {config.data.batch_size}{again} for {target.name} ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        request, reply = Path(folder) / "request.json", Path(folder) / "reply.json"
        write_json(request, {"config": config.to_dict(), "target": dataclasses.asdict(target)})
        command = [sys.executable, "-m", "jaxllm.plan.compile", str(request), str(reply)]
        done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, errors="replace")
        if done.returncode or not reply.exists():
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            reason = lines[-1] if lines else f"exit code {done.returncode}"
            raise UserError(f"{target.name}: the step could not be compiled: {reason}")
        return read_plan(config, target, read_json(reply))


def meshes(config: TrainConfig) -> list[str]:
    """The meshes that a search compares, all with as many devices as the config's mesh, which is first."""
    n, found = config.mesh.devices, [config]
    if n == 1:
        return [config.mesh.axes]

    def several(mesh: MeshConfig) -> dict[str, int]:
        return {axis: size for axis, size in mesh.sizes.items() if size > 1}

    for mesh in (f"data={n}", f"fsdp={n}", f"expert={n}", f"fsdp={n // 2},expert=2"):
        try:
            other = config.with_options(mesh=mesh)
        except UserError:  # it does not divide the weights
            continue
        if other.mesh.devices == n and not any(several(other.mesh) == several(known.mesh) for known in found):
            found.append(other)
    return [config.mesh.axes for config in found]


def largest_batch(start: int, limit: float, compiled: Callable[[int], Plan | Refused]) -> tuple[Plan | Refused, bool]:
    """The plan of the largest batch size that fits, and whether the next larger one is known not to.

    Doubles from `start`, then interpolates: memory grows by about the same amount with each row.

    `start` is the first batch size tried, `limit` the bytes that a program may take, and `compiled` returns the plan of
    a batch size; all are of one device.
    """
    best: Plan | Refused | None = None
    low, high, size = 0, None, start  # the largest that fits, the smallest that does not, the next
    known: dict[int, int] = {}
    for _ in range(MAX_COMPILATIONS):
        plan = compiled(size)
        if plan.peak is not None:
            known[size] = plan.peak
        if plan.fits:
            low, best = size, plan
        else:
            high, smallest = size, plan
        if high is None:
            size *= 2
            continue
        if high - low <= 1:
            break
        size = max(low + 1, min(high - 1, _interpolated(known, limit, (low + high) // 2)))
    return best or smallest, high is not None and high - low <= 1


def _interpolated(known: dict[int, int], limit: float, otherwise: int) -> int:
    """The batch size whose memory would be the limit, from the two nearest to it."""
    nearest = sorted(sorted(known, key=lambda size: abs(known[size] - limit))[:2])
    if len(nearest) < 2:
        return otherwise
    a, b = nearest
    row = (known[b] - known[a]) / (b - a)
    return int(a + (limit - known[a]) / row) if row > 0 else otherwise
