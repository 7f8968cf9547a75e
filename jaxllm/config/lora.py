"""The options of low-rank adapters (LoRA, arXiv:2106.09685)."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from jaxllm.config.fields import check_fields, option
from jaxllm.errors import UserError, shown

TARGETS = ("attention", "shared", "dense", "experts")
"""The matrices that can have adapters: of attention, of the shared experts, of dense layers, of the routed experts."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters: the weights of --init are frozen. In y = x W + (alpha / r) (x A) B, A and B are trained."""

    rank: Annotated[int, tyro.conf.arg(name="lora-rank")] = option(0, ge=0, le=4096, common=True)
    """Rank r of the adapters; 0: none, all weights are trained."""
    alpha: Annotated[float | None, tyro.conf.arg(name="lora-alpha")] = option(None, gt=0)
    """The product of A and B is multiplied by alpha / r; default: twice the rank."""
    targets: Annotated[str, tyro.conf.arg(name="lora-targets")] = "attention,shared,dense"
    """Which matrices have adapters, separated by commas: `attention`, `shared` (shared experts), `dense` (feed-forward
    networks of dense layers), `experts` (each routed expert has its own)."""
    rslora: Annotated[bool, tyro.conf.arg(name="lora-rslora")] = False
    """Multiply by alpha / sqrt(r) instead (rsLoRA, arXiv:2312.03732)."""
    base_dtype: Annotated[
        tyro.conf.Suppress[Literal["float32", "bfloat16", "float16"]], tyro.conf.arg(name="lora-base-dtype")
    ] = option("bfloat16")
    """In which the frozen matrices are held, which a run decides at its first start: that of their files."""

    def __post_init__(self) -> None:
        check_fields(self)
        names = self.targets.split(",")
        if not {*names} <= {*TARGETS} or len({*names}) < len(names):
            raise UserError(
                f"lora_targets is {shown(self.targets)}: it must be some of {', '.join(TARGETS)}, separated by commas"
            )
        if self.rank == 0:
            defaults = {field.name: field.default for field in dataclasses.fields(self)}
            for name in ("alpha", "targets", "rslora"):
                if (value := getattr(self, name)) != defaults[name]:
                    raise UserError(
                        f"lora_{name} is {shown(value)}: it applies to adapters only; pass --lora-rank, too"
                    )

    def adapts(self, target: str) -> bool:
        """Whether the matrices of a target have adapters."""
        return self.rank > 0 and target in self.targets.split(",")

    @property
    def resolved_alpha(self) -> float:
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        """By which the product of A and B is multiplied."""
        return self.resolved_alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
