"""The options of the parity ladder. Imports neither JAX nor PyTorch, so that --help needs neither."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro

from jaxllm.config import MAX_SEED
from jaxllm.config.fields import check_fields, option
from jaxllm.errors import UserError, shown

Rung = Literal[
    "weights",
    "layers",
    "parts",
    "logits",
    "loss",
    "padding",
    "evaluation",
    "gradients",
    "step",
    "trajectory",
    "generation",
    "adapters",
]
RUNGS: tuple[Rung, ...] = get_args(Rung)

MIN_STEPS = 5
"""With fewer, the step after the warm-up would be at the end of the cosine, where the learning rate is zero."""


@dataclass(frozen=True)
class ParityArgs:
    """Compare a model in both frameworks, from its weights to its training."""

    weights: Annotated[Path | None, tyro.conf.Positional] = None
    """A run or an exported folder; none: random weights for a preset."""
    preset: str | None = None
    """The preset, if no folder is given; default: tiny."""
    layers: int | None = option(None, ge=1)
    """The number of layers, instead of the preset's."""
    rungs: tuple[Rung, ...] = RUNGS
    """The comparisons to make."""
    precision: Literal["float32", "float64", "bfloat16"] | None = None
    """float64 distinguishes errors from rounding; none: float32 and then, if the run computes in it, bfloat16."""
    quick: bool = False
    """Compare in one precision, with fewer steps and at smaller sizes; the last lines name what that leaves out."""
    seq_len: int = option(500, ge=1)
    """Tokens in the forward comparisons; short texts miss position faults."""
    steps: int | None = option(None, ge=MIN_STEPS)
    """Steps of the training trajectory; default: 50, with --quick 5."""
    optimizer: Literal["adamw", "muon"] | None = None
    """Of the training rungs; none: that of the run, or adamw."""
    text: Path | None = None
    """A text file to compare on; none: the standard library's source code."""
    tokenizer: Path | None = None
    """A tokenizer folder; none: that of the weights, or a new one trained on the text."""
    mutate: str | None = None
    """A fault to plant in the PyTorch model; the ladder must catch it."""
    out: Path = Path("runs/parity")
    """The folder for parity.html, parity.json and parity.png."""
    seed: int | None = option(None, ge=0, le=MAX_SEED)
    """Seed of the random weights; default: 0."""
    trust_remote_code: bool = False
    """Run the code in an exported folder, also where it is not this version's torch_ref/model.py, and compare that."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.rungs:
            raise UserError(f"rungs is empty: choose from {', '.join(RUNGS)}")
        for name in ("preset", "layers", "seed") if self.weights is not None else ():
            if (value := getattr(self, name)) is not None:
                raise UserError(f"{name} is {shown(value)}: it is for random weights, not for given ones; leave it out")
        if self.quick and self.steps is not None:
            raise UserError(f"steps is {self.steps}: --quick compares {MIN_STEPS}, leave out one of the two")
        if self.trust_remote_code and self.weights is None:
            raise UserError("trust_remote_code is set: it is for the code of a folder, name one")
        if self.trust_remote_code and self.mutate is not None:
            raise UserError(
                f"mutate is {self.mutate!r}: faults are planted in this version's code, leave out one option"
            )

    @property
    def random_preset(self) -> str:
        return self.preset or "tiny"

    @property
    def most_steps(self) -> int:
        """Of the trajectory."""
        return MIN_STEPS if self.quick else self.steps or 50
