"""Devices by their data sheets: specifications, with sources, and XLA's description of those it can compile for.

A target is a JSON file: those in this folder by name, any other by its path. Imports no JAX.
"""

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from jaxllm.config import Precision
from jaxllm.errors import UserError
from jaxllm.files import read_json

FOLDER = Path(__file__).parent

Platform = Literal["cuda", "rocm", "tpu"]

SOURCED = ("memory_gib", "peak_tflops", "memory_gb_per_s", "interconnect_gb_per_s")
"""The facts that need a source."""


@dataclass(frozen=True)
class Target:
    """A device by its data sheet; GB and TFLOP are powers of ten, GiB of two.

    Without `config` and `topology` it is known by its facts alone, and no step can be planned for it.
    """

    name: str
    platform: Platform
    memory_gib: float
    """Memory available to a program."""
    peak_tflops: dict[Precision, float]
    """Dense matrix products, in each compute precision."""
    memory_gb_per_s: float
    devices: int
    """Devices of a node (TPU: of the topology)."""
    interconnect_gb_per_s: float
    """Bandwidth from one device to others of its node, in one direction."""
    sources: dict[str, str]
    device_kinds: tuple[str, ...] = ()
    """JAX's names for it, which are the driver's full names: variants with other speeds are other targets."""
    config: str | None = None
    """CUDA: the text of an xla.gpu.GpuTargetConfigProto; in the file, the name of a file next to it."""
    topology: str | None = None
    """TPU: a slice that holds the device, such as v5e:2x2."""

    def __post_init__(self) -> None:
        if self.platform not in get_args(Platform):
            raise UserError(f"platform is {self.platform!r}: it must be {', '.join(get_args(Platform))}")
        for field in ("config", "topology"):
            if not isinstance(value := getattr(self, field), str | None):
                raise UserError(f"{field} is {value!r}: it must be text")
        if isinstance(self.device_kinds, str) or not all(isinstance(kind, str) for kind in self.device_kinds):
            raise UserError(f"device_kinds is {self.device_kinds!r}: it must be a list of names")
        object.__setattr__(self, "device_kinds", tuple(self.device_kinds))
        if not isinstance(self.devices, int) or self.devices < 1:
            raise UserError(f"devices is {self.devices!r}: it must be a whole number, at least 1")
        for field in ("memory_gib", "memory_gb_per_s", "interconnect_gb_per_s"):
            _check_positive(field, getattr(self, field))
        if not isinstance(self.peak_tflops, dict) or {*self.peak_tflops} != {*get_args(Precision)}:
            raise UserError(f"peak_tflops is {self.peak_tflops!r}: it must have {' and '.join(get_args(Precision))}")
        for precision, value in self.peak_tflops.items():
            _check_positive(f"peak_tflops.{precision}", value)
        for field in SOURCED:
            if not isinstance(self.sources, dict) or not isinstance(self.sources.get(field), str):
                raise UserError(f"sources.{field} is missing: name where {field} comes from")

    @property
    def compute_capability(self) -> float:
        """Of an NVIDIA GPU; 0 for anything else."""
        found = re.search(r"cuda_compute_capability\s*\{\s*major:\s*(\d+)(?:\s*minor:\s*(\d+))?", self.config or "")
        return float(f"{found[1]}.{found[2] or 0}") if found else 0.0

    @property
    def compilable(self) -> bool:
        """Whether XLA can compile for it where it is not."""
        return {"cuda": self.config, "tpu": self.topology}.get(self.platform) is not None


def _check_positive(field: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UserError(f"{field} is {value!r}: it must be a number larger than 0")


def target_names() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.json"))


def target_of(device_kind: str) -> Target | None:
    """The data sheet of a device by the name that JAX has for it, such as `NVIDIA H100 80GB HBM3`; None: unknown.

    The whole name counts: an H100 PCIe, an H100 NVL and a part of a card (MIG) have other speeds than an H100 SXM.
    """
    return next((target for target in map(load_target, target_names()) if device_kind in target.device_kinds), None)


def load_target(name: str) -> Target:
    """A target by name, or from a JSON file. Raises a UserError if there is none, or if its file is not valid."""
    path = Path(name)
    if path.suffix != ".json":
        if name not in target_names():
            raise UserError(f"target is {name!r}: choose one of {', '.join(target_names())}, or pass a file.json")
        path = FOLDER / f"{name}.json"
    values = read_json(path)
    fields = {field.name: field for field in dataclasses.fields(Target)}
    if unknown := sorted(values.keys() - fields):
        raise UserError(f"{path}: {', '.join(unknown)} is not a field of a target; the fields are {', '.join(fields)}")
    required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    if missing := [name for name in required if name not in values]:
        raise UserError(f"{path}: {', '.join(missing)} is missing: a target needs it")
    try:
        if isinstance(values.get("config"), str):
            values["config"] = _read_config(path.parent / values["config"])
        return Target(**values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _read_config(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config is {path}: it cannot be read ({error})") from None
