"""An estimate of the time of a compiled step on a device, without measuring. Does not import JAX."""

from collections.abc import Iterable
from dataclasses import dataclass

from jaxllm.config import Precision
from jaxllm.devices import Target
from jaxllm.plan.hlo_cost import Collective, Kernel

ACHIEVED_FLOPS = {"dot": 0.65, "grouped": 0.45, "attention": 0.5}
"""The assumed share of the dense peak of each kind of product: that of good kernels at large sizes."""

ACHIEVED_MEMORY = 0.8
"""The assumed share of the memory's bandwidth."""

ACHIEVED_INTERCONNECT = 0.7
"""The assumed share of the interconnect's bandwidth."""


@dataclass(frozen=True)
class Roofline:
    """Seconds of one step, on each device."""

    compute: float
    memory: float
    collectives: float
    kernels: float
    """Kernel by kernel, each bound by its own products or memory."""

    @property
    def bounds(self) -> dict[str, float]:
        return {"compute": self.compute, "memory": self.memory, "collectives": self.collectives}

    @property
    def bound_by(self) -> str:
        """The largest bound: the time of a step if everything else overlaps with it."""
        return max(self.bounds, key=lambda name: self.bounds[name])

    @property
    def at_best(self) -> float:
        return self.bounds[self.bound_by]

    @property
    def expected(self) -> float:
        """One kernel after another, with no collective overlapping."""
        return self.kernels + self.collectives


def roofline(
    target: Target, precision: Precision, kernels: Iterable[Kernel], collectives: Iterable[Collective]
) -> Roofline:
    """The bounds of a program on a device."""
    peak = target.peak_tflops[precision] * 1e12
    bandwidth = ACHIEVED_MEMORY * target.memory_gb_per_s * 1e9
    times = [
        (kernel.flops / (ACHIEVED_FLOPS[kernel.kind] * peak) if kernel.kind else 0.0, kernel.bytes / bandwidth)
        for kernel in kernels
    ]
    sent = sum(collective.bytes for collective in collectives)
    return Roofline(
        compute=sum(compute for compute, _ in times),
        memory=sum(memory for _, memory in times),
        collectives=sent / (ACHIEVED_INTERCONNECT * target.interconnect_gb_per_s * 1e9),
        kernels=sum(map(max, times)),
    )
