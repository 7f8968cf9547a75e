"""What a side computed: named arrays in order of computation, in memory or in one file.

The file is a safetensors file whose header carries a JSON index: names in order, runs, versions, hashes of the inputs.
Arrays are read one at a time, and nothing in it is executed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxllm.errors import UserError, one_line, shown
from jaxllm.files import check_file, unique_keys

FORMAT = "jaxllm parity record 1"
MAX_HEADER_BYTES = 256 * 2**20

Named = Mapping[str, np.ndarray]

_DTYPES = {
    "float64": "F64", "float32": "F32", "int64": "I64", "int32": "I32", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
KINDS = ("results", "outputs", "output_grads", "grads", "state")


class Module(NamedTuple):
    """A module of a model: its path, its class, and the tensors that are its own, in their order."""

    path: str
    kind: str
    own: list[str]
    iteration: int | None = None
    """Of the scan that calls it: its tensors are then stacked over the iterations."""


@dataclass
class Run:
    """One forward and backward pass."""

    loss: float
    results: Named = field(default_factory=dict)
    outputs: Named = field(default_factory=dict)
    """What modules returned, in order of computation. The n-th call has `#n`, an iteration of a scan `[i]`."""
    output_grads: Named = field(default_factory=dict)
    grads: Named = field(default_factory=dict)
    state: Named = field(default_factory=dict)
    """Buffers and statistics afterwards."""
    findings: list[str] = field(default_factory=list)
    """Casts below the model's dtype, each with its module."""
    holes: list[str] = field(default_factory=list)
    """What could not be lifted to float64."""


@dataclass
class Trained:
    """A short training: losses, and the change of each parameter after the first and after the last step."""

    losses: list[float]
    first: Named
    last: Named


@dataclass
class Record:
    """All that is compared of one side.

    Attributes:
        weights: the tensors that the runs started from, by this side's names.
        trainable: names of those that have gradients.
        modules: those that own tensors, in order of execution.
        runs: `own` (the side's precision), `lifted` (float64, where that is possible), `training` (in training mode).
        about: framework, versions, precision, hashes of the inputs, reasons why a run is missing.
    """

    framework: str
    weights: Named
    trainable: list[str]
    modules: list[Module]
    runs: dict[str, Run]
    trained: Trained | None = None
    about: dict[str, Any] = field(default_factory=dict)
    rounding: dict[str, float] = field(default_factory=dict)
    """For `outputs/NAME` and the like, how far the side's own run is from the lifted one; where that is not possible,
    how far it moves if the parameters are moved by a unit of roundoff."""
    repeats: bool | None = None
    """Whether the same run twice gives the same bits; None: it was run once, as a side that is not lifted."""

    def write(self, path: Path) -> None:
        """Write one file, an array at a time."""
        arrays: dict[str, np.ndarray] = {}
        index: dict[str, Any] = {
            "format": FORMAT, "framework": self.framework, "trainable": self.trainable,
            "modules": [list(module) for module in self.modules], "about": self.about,
            "weights": _indexed(arrays, "weights", self.weights),
            "runs": {}, "trained": _of_training(arrays, "trained", self.trained),
            "rounding": self.rounding, "repeats": self.repeats,
        }  # fmt: skip
        for name, run in self.runs.items():
            index["runs"][name] = {
                "loss": run.loss, "findings": run.findings, "holes": run.holes,
                **{kind: _indexed(arrays, f"{name}/{kind}", getattr(run, kind)) for kind in KINDS},
            }  # fmt: skip
        _write(path, arrays, {"index": json.dumps(index)})

    @classmethod
    def read(cls, path: Path) -> Record:
        """Open a record; its arrays are read when they are asked for.

        Raises:
            UserError: it is not a record, or is damaged.
        """
        check_file(path)
        try:
            with path.open("rb") as file:
                if int.from_bytes(file.read(8), "little") > MAX_HEADER_BYTES:
                    raise UserError(f"{path} is not a record of a side: its header is too large; record the side again")
            opened = safe_open(str(path), framework="numpy")
            text = (opened.metadata() or {}).get("index", "{}")
            index = json.loads(text, object_pairs_hook=unique_keys)
            if index.get("format") != FORMAT:
                raise UserError(f"{path} is not a record ({FORMAT}): make one with `python -m parity_tests record`")
            names = set(opened.keys())

            def lazy(prefix: str, listed: list[str]) -> Named:
                keys = {name: f"{prefix}/{i}" for i, name in enumerate(listed)}
                missing = [name for name, key in keys.items() if key not in names]
                if missing:
                    raise UserError(f"{path} lacks the array {shown(missing[0])}: record the side again")
                return Lazy(keys, lambda name: opened.get_tensor(keys[name]))

            runs = {
                name: Run(
                    loss=float(run["loss"]), findings=list(run["findings"]), holes=list(run["holes"]),
                    **{kind: lazy(f"{name}/{kind}", run[kind]) for kind in KINDS},
                )
                for name, run in index["runs"].items()
            }  # fmt: skip
            trained = index["trained"] and Trained(
                [float(loss) for loss in index["trained"]["losses"]],
                lazy("trained/first", index["trained"]["first"]),
                lazy("trained/last", index["trained"]["last"]),
            )
            rounding = {str(name): float(value) for name, value in index["rounding"].items()}
            return cls(
                str(index["framework"]), lazy("weights", index["weights"]), list(index["trainable"]),
                [Module(*module) for module in index["modules"]], runs, trained, dict(index["about"]), rounding,
                index["repeats"] and bool(index["repeats"]),
            )  # fmt: skip
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} is not a complete record ({one_line(error)}): record the side again") from None


class Lazy(Mapping[str, np.ndarray]):
    """Arrays by name, each made when it is asked for, so that one of them is in memory at a time."""

    def __init__(self, names: Iterable[str], read: Callable[[str], np.ndarray]):
        self._names, self._read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _indexed(arrays: dict[str, np.ndarray], prefix: str, named: Named) -> list[str]:
    """Add arrays under short keys; their names, in order."""
    for i, name in enumerate(named):
        arrays[f"{prefix}/{i}"] = named[name]
    return list(named)


def _of_training(arrays: dict[str, np.ndarray], prefix: str, trained: Trained | None) -> dict[str, Any] | None:
    if trained is None:
        return None
    return {
        "losses": trained.losses,
        "first": _indexed(arrays, f"{prefix}/first", trained.first),
        "last": _indexed(arrays, f"{prefix}/last", trained.last),
    }


def storable(values: Any) -> np.ndarray:
    """As float64, float32 or an integer type, without a change of the values."""
    values = np.asarray(values)
    if values.dtype.name in _DTYPES:
        return values
    return values.astype(np.int64 if values.dtype.kind in "iu" else np.float32)


def _write(path: Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name, values in arrays.items():
        header[name] = {
            "dtype": _DTYPES[values.dtype.name],
            "shape": list(values.shape),
            "data_offsets": [offset, offset + values.nbytes],
        }
        offset += values.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns the data
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for values in arrays.values():
            file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    part.replace(path)
