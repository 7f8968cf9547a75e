"""The tolerances of the ladder with their names and reasons."""

from __future__ import annotations

from typing import NamedTuple

from parity_tests.engine.rows import (  # noqa: F401  the ladder's comparisons are those of the engine
    ANY,
    Row,
    Tolerance,
    compare_arrays,
    compare_bits,
    compare_leaves,
    compare_numbers,
    same_bits,
)


class Tolerances(NamedTuple):
    """The tolerances of the rungs in one precision."""

    forward: Tolerance
    gradient: Tolerance
    update: Tolerance
    trajectory: Tolerance
    decoding: Tolerance
    near_tie: float
    """Rounding may swap two experts whose biased scores differ by less; scores are in 0..1."""
    token_tie: float
    """Rounding may swap two tokens whose logits differ by less, in standard deviations of the logits."""

    def named(self) -> list[Tolerance]:
        """The tolerances that have a name and a reason."""
        return [part for part in self if isinstance(part, Tolerance)]


# The gradient of a query or key weight can be a millionth of the whole gradient: a small difference of large terms, of
# which float32 keeps four digits in either framework. The largest observed difference is 1.3e-10 of the whole gradient
# in trained models, and 1.2e-9 where values are nearly equal: the limit is a tenth of the unit roundoff of the whole.
_CANCELLED = 6e-9

TOLERANCES = {
    "float64": Tolerances(
        Tolerance("float64 forward", 1e-10, 1e-10, "unit roundoff 1e-16: beyond it is another formula"),
        Tolerance("float64 gradient", 1e-9, ANY, "as forward, with the cancellation of the softmax's backward pass"),
        Tolerance("float64 update", 1e-9, ANY, "Adam divides by the root of small second moments"),
        Tolerance("float64 trajectory", 1e-8, ANY, "rounding, amplified by 50 steps of training"),
        Tolerance("float64 decoding", 1e-10, 1e-10, "as forward: the absorbed products differ in their order only"),
        near_tie=1e-12,
        token_tie=1e-9,
    ),
    "float32": Tolerances(
        Tolerance("float32 forward", 1e-5, 1e-4, "unit roundoff 6e-8, sums of 1,536 terms in another order, 24 layers"),
        Tolerance("float32 gradient", 3e-5, ANY, "as forward, with the cancellation of the softmax's backward pass",
                  _CANCELLED),
        Tolerance("float32 update", 1e-4, ANY, "Adam divides by the root of small second moments"),
        Tolerance("float32 trajectory", 2e-4, ANY, "rounding, amplified by 50 steps of training"),
        Tolerance("float32 decoding", 1e-5, 1e-4, "as forward: the absorbed products differ in their order only"),
        near_tie=1e-5,
        token_tie=1e-4,
    ),
    "bfloat16": Tolerances(
        Tolerance("bfloat16 forward", 3e-2, 3e-1, "unit roundoff 4e-3; Flax rounds the residual, autocast does not"),
        Tolerance("bfloat16 gradient", 6e-2, ANY, "unit roundoff 4e-3 at each product of both passes"),
        Tolerance("bfloat16 update", 1e-4, ANY, "float32, from the same gradients in both frameworks"),
        Tolerance("bfloat16 trajectory", 3e-2, ANY, "rounding, amplified by 50 steps of training"),
        Tolerance("bfloat16 decoding", 1e-1, ANY, "as forward, and choices that flip at near ties are not replayed"),
        near_tie=1e-2,
        token_tie=2e-1,
    ),
}  # fmt: skip


MUON_BFLOAT16 = Tolerance("bfloat16 Muon update", 3e-2, ANY, "unit roundoff 4e-3 at each product of the iteration")

ISLAND = Tolerance("float32 island", 1e-5, ANY, "float32 inside a bfloat16 model, on the same input")
