"""What both sides share: the names of their precisions, the moved weights, the loss, and the side read from a file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from jaxllm.errors import UserError
from parity_tests.engine.record import Lazy, Module, Named, Record, Run, Trained

Precision = Literal["lifted", "own"]

STEPS = 5
"""Of the short training."""

LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1e-2
"""Of AdamW, which trains where a pair names no optimizer."""


class Side(Protocol):
    """One model with its inputs in one framework."""

    framework: str

    def tensors(self) -> Named:
        """Floating-point parameters and buffers; a tensor that has two names is there once."""
        ...

    def load(self, values: Named) -> None:
        """Tensors that the next runs start from; others stay as the model is made."""
        ...

    def movable(self) -> list[str]:
        """Names of the tensors that may start from any values: parameters and running statistics."""
        ...

    def trainable(self) -> list[str]:
        """Names of the tensors that have gradients."""
        ...

    def aliases(self) -> dict[str, str]:
        """Further names of tensors that have several, and the name in `tensors`."""
        ...

    def modules(self) -> list[Module]:
        """Modules that own tensors, in order of execution."""
        ...

    def run(self, precision: Precision, *, training: bool = False, grads: bool = True) -> Run:
        """A forward and a backward pass."""
        ...

    def train(self, precision: Precision, steps: int = STEPS, training: bool = False) -> Trained:
        """A short training with this side's optimizer, in training mode or not."""
        ...

    def nudged(self, direction: int) -> AbstractContextManager[None]:
        """In its context each element of the parameters is a neighbour of its value."""
        ...

    def can_train(self) -> bool:
        """Whether the model was given a call in training mode."""
        ...

    def about(self) -> dict[str, Any]:
        """Versions, dtypes and hashes of the inputs."""
        ...


class RecordedSide:
    """A side that ran elsewhere, read from a file."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.record = Record.read(self.path)
        self.framework = self.record.framework


def moved_weights(values: Named, names: Iterable[str], scale: float = 1.0) -> Named:
    """Values that reveal errors: no bias is zero, no norm weight is one, and two layers are never alike.

    Values that are all positive (variances, norm weights) are multiplied, so that they stay positive.
    """

    def moved(name: str) -> np.ndarray:
        array = np.asarray(values[name])
        if scale == 0 or not array.size:
            return array
        drawn = np.random.default_rng([0, *name.encode()]).standard_normal(array.shape, np.float32)
        if (array > 0).all():
            return (array * np.exp(0.2 * scale * drawn)).astype(array.dtype)
        return (array + 0.2 * scale * (float(array.std()) or 0.5) * drawn).astype(array.dtype)

    return Lazy(names, moved)


def signs(name: str, shape: tuple[int, ...], direction: int) -> np.ndarray:
    """Which elements of a tensor move up and which down."""
    return np.random.default_rng([direction, *name.encode()]).integers(0, 2, shape, np.int8) * 2 - 1


def projection(shape: tuple[int, ...], index: int) -> np.ndarray:
    """Weights of the default loss, a fixed random projection of the results. They are exact in float32."""
    size = max(1, int(np.prod(shape)))
    return (np.random.default_rng([7, index]).standard_normal(shape) / size**0.5).astype(np.float32)


def check_results(results: dict[str, Any], framework: str) -> None:
    """
    Raises:
        UserError: there is nothing to compare.
    """
    if not results:
        raise UserError(f"call of the {framework} side returns no floating-point array: return what is to be compared")


def hashed(values: Any) -> str:
    """A hash of an array's values, the same in both frameworks and in every layout."""
    values = np.asarray(values)
    wide = np.sort(values.astype(np.float64 if values.dtype.kind == "f" else np.int64), axis=None)
    return hashlib.sha256(wide.tobytes()).hexdigest()[:16]
