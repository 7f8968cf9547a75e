"""What both sides share: the names of their precisions, the moved weights, the loss, and the side read from a file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from jaxllm.errors import UserError
from parity_tests.engine.record import Module, Named, Record, Run, Trained

Precision = Literal["lifted", "own"]

STEPS = 5
"""Of the short training."""

LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1e-2
"""Of AdamW, which trains where a pair names no optimizer."""


class Side(Protocol):
    """One model with its inputs in one framework."""

    framework: str

    def tensors(self) -> dict[str, np.ndarray]:
        """Floating-point parameters and buffers; a tensor that has two names is there once."""
        ...

    def load(self, values: Named) -> None:
        """Tensors that the next runs start from; others stay as the model is made."""
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


def moved_weights(values: Named, names: Iterable[str], scale: float = 1.0, seed: int = 0) -> dict[str, np.ndarray]:
    """Values that reveal errors: no bias is zero, no norm weight is one, and two layers are never alike.

    Values that are all positive (variances, norm weights) are multiplied, so that they stay positive.
    """
    moved = {}
    for name in names:
        array = np.asarray(values[name])
        drawn = np.random.default_rng([seed, *name.encode()]).standard_normal(array.shape).astype(np.float32)
        if scale == 0 or not array.size:
            moved[name] = array
        elif (array > 0).all():
            moved[name] = (array * np.exp(0.2 * scale * drawn)).astype(array.dtype)
        else:
            spread = float(array.std()) or 0.5
            moved[name] = (array + 0.2 * scale * spread * drawn).astype(array.dtype)
    return moved


def by_a_roundoff(values: Named, direction: int, epsilon: float) -> dict[str, np.ndarray]:
    """Each element moved up or down by a unit of roundoff."""
    moved = {}
    for name in values:
        signs = np.random.default_rng([direction, *name.encode()]).integers(0, 2, np.shape(values[name])) * 2 - 1
        moved[name] = np.asarray(values[name] * (1 + epsilon * signs), np.asarray(values[name]).dtype)
    return moved


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
