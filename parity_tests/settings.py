"""What the training rungs run on: the run's own settings, at sizes beyond every threshold in the code."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np

from jaxllm.config import ModelConfig, TrainConfig
from jaxllm.config.groups import DataConfig
from jaxllm.config.train import RunConfig
from jaxllm.model.batch import IGNORED
from jaxllm.model.kernels import causal_attention, grouped_loop, matmul
from jaxllm.train import loss
from parity_tests.options import MIN_STEPS

BEYOND = 9 / 8
"""How far beyond a threshold: the last block of tokens is then there in part."""

BUDGET = 5e13
"""Floating-point operations that the steps of a trajectory may cost: minutes on a CPU."""

STEP_TOKENS = 2**14
"""Tokens of a step, at most."""


QUICK_ROWS = 2
"""Rows of a micro-batch where nothing is widened: a mean over rows still differs from a single one."""


class Thresholds(NamedTuple):
    """Sizes at which the code takes another way, on the platform here."""

    row_tokens: tuple[int, ...]
    """Of the tokens in a row."""
    tokens: tuple[int, ...]
    """Of the tokens in a micro-batch, which may all choose one expert."""
    decoded_rows: int
    """Of the slots (rows times experts of a token) in a step of decoding."""


def thresholds() -> Thresholds:
    block = causal_attention.BLOCK_QUERIES
    chunk = loss.GPU_CHUNK_ROWS if jax.default_backend() == "gpu" else loss.CHUNK_ROWS
    return Thresholds(
        row_tokens=(block, block * causal_attention.MAX_SPANS),
        tokens=(chunk, grouped_loop.BLOCK_ROWS[-1]),
        decoded_rows=matmul.FEW_ROWS,
    )


def beyond(threshold: int) -> int:
    return max(threshold + 1, math.ceil(BEYOND * threshold))


class Sizes(NamedTuple):
    micro_batches: int
    rows: int
    """In a micro-batch."""
    tokens: int
    """In a row."""


SMALL = Sizes(3, 2, 64)
"""The steps on weights that no run trained."""


@dataclass(frozen=True)
class Settings:
    """What a ladder runs on."""

    seq_len: int = 500
    """Tokens of the forward rungs."""
    steps: int = 50
    """Of the trajectory."""
    optimizer: str | None = None
    """None: the run's, or AdamW."""
    run: RunConfig | None = None
    """The run whose settings the training rungs have; None: all features, on small batches."""
    sizes: Sizes | None = None
    """Of a step; None: the run's, or SMALL."""
    norms: tuple[float, float] | None = None
    """Of the gradients of the first two batches, if they are known."""
    most_steps: int | None = None
    """How many of the steps are compared at most; None: all."""
    widens: bool = True
    """Whether gradients are compared at sizes beyond the thresholds of the code, or at those of the steps."""
    greedy: bool = True
    """Whether tokens are generated, too, by two more programs."""


@dataclass(frozen=True)
class Plan:
    """What the training rungs do."""

    config: TrainConfig
    """Of the steps. Its `max_grad_norm` is the run's: the rung may replace it."""
    wide: Sizes
    """Of the gradients."""
    steps: int
    """How many are compared."""
    norms: tuple[float, float] | None = None
    """As in the settings."""
    beyond_thresholds: bool = True
    """Whether `wide` is beyond all of them."""
    notes: list[str] = field(default_factory=list)
    """In what it differs from the run, one line each."""

    @property
    def sizes(self) -> Sizes:
        data = self.config.data
        return Sizes(data.grad_accum, data.batch_size, data.seq_len)

    def described(self) -> str:
        """One line for the verdict."""
        config, sizes = self.config, " x ".join(map(str, self.sizes))
        remat = ", remat" if config.remat else ""
        line = f"{self.steps} steps of {sizes} tokens (micro-batches x rows x tokens), {config.optim.optimizer}"
        line += f", {config.schedule.schedule}{remat}; gradients of {' x '.join(map(str, self.wide))} tokens"
        return "; ".join([line, *self.notes])


TAKEN = (
    "learning_rate", "weight_decay", "beta1", "beta2", "adam_eps", "muon_momentum", "max_grad_norm", "bias_update_rate",
    "balance_loss", "router_z_loss", "schedule", "remat", "train_on", "documents",
)  # fmt: skip
"""Options of a run that the rungs have as they are."""


def make_plan(model: ModelConfig, precision: str, settings: Settings) -> Plan:
    notes: list[str] = []
    run = settings.run
    if run is None:
        options = {"learning_rate": 1e-3, "max_grad_norm": 0.5, "balance_loss": 1e-2, "router_z_loss": 1e-3}
        own, warmup, decay = SMALL, 0.2, None
    else:
        flat = run.options()
        options = {name: flat[name] for name in TAKEN}
        own = Sizes(run.data.grad_accum, run.data.batch_size, run.data.seq_len)
        warmup, decay = run.schedule.warmup_steps / run.schedule.steps, run.schedule.decay_steps
        if own.micro_batches > 1:
            own = own._replace(micro_batches=3)
        if own.micro_batches * own.rows * own.tokens > STEP_TOKENS:
            own = own._replace(rows=max(1, STEP_TOKENS // (own.micro_batches * own.tokens)))
        if not settings.widens:
            own = own._replace(rows=min(own.rows, QUICK_ROWS))
        named = {"grad_accum": (run.data.grad_accum, own.micro_batches), "batch_size": (run.data.batch_size, own.rows)}
        notes += [f"{name} {new} (the run's: {old})" for name, (old, new) in named.items() if old != new]
    own = settings.sizes or own
    own = own._replace(tokens=min(own.tokens, model.max_position_embeddings))
    steps = _affordable(model, own, settings.steps)
    if steps != settings.steps:
        notes.append(f"{steps} steps instead of {settings.steps}, which would take too long at this size")
    warmup_steps = min(math.ceil(warmup * steps), steps - 3)
    if decay is not None and run is not None:
        decay = min(max(1, round(decay * steps / run.schedule.steps)), steps - warmup_steps)
    config = TrainConfig.from_options(
        model=model, precision="bfloat16" if precision == "bfloat16" else "float32", steps=steps,
        warmup_steps=warmup_steps, decay_steps=decay, grad_accum=own.micro_batches, batch_size=own.rows,
        seq_len=own.tokens, optimizer=settings.optimizer or (run and run.optim.optimizer) or "adamw", **options,
    )  # fmt: skip
    if run is not None and (warmup_steps, steps) != (run.schedule.warmup_steps, run.schedule.steps):
        notes.append(f"the schedule of {run.schedule.steps} steps on {steps}, {warmup_steps} of them warm-up")
    beyond_all = _widened(own, model.max_position_embeddings)
    wide = beyond_all if settings.widens else own
    compared = min(steps, settings.most_steps or steps)
    return Plan(config, wide, compared, settings.norms, wide == beyond_all, notes)


def _affordable(model: ModelConfig, sizes: Sizes, steps: int) -> int:
    D, F = model.hidden_size, model.moe_intermediate_size
    active = model.num_hidden_layers * (3 * D * F * (model.num_experts_per_tok + model.n_shared_experts) + 3 * D * D)
    cost = 6.0 * (active + D * model.vocab_size) * math.prod(sizes)
    return min(steps, max(MIN_STEPS, int(BUDGET / cost)))


def _widened(own: Sizes, limit: int) -> Sizes:
    """Sizes beyond every threshold that rows of at most `limit` tokens can reach."""
    passed = thresholds()
    tokens = max([own.tokens, *(min(beyond(size), limit) for size in passed.row_tokens if size < limit)])
    rows = max(own.rows if tokens == own.tokens else 1, _rows_beyond(tokens))
    return Sizes(own.micro_batches, rows, tokens)


def _rows_beyond(tokens: int) -> int:
    """How many rows of so many tokens are beyond every threshold of a micro-batch."""
    return math.ceil(beyond(max(thresholds().tokens)) / tokens)


def documents_of(data: DataConfig, tokens: int) -> np.ndarray | None:
    """The document of each token in a row, rising from 1 (T,); None: a row is one. One document has a single token."""
    if data.documents != "separate":
        return None
    begins = np.zeros(tokens, np.int32)
    begins[[at for at in (0, tokens // 2, tokens // 2 + 1, tokens * 3 // 4) if at < tokens]] = 1
    return np.cumsum(begins, dtype=np.int32)


def text_batches(tokens: np.ndarray, sizes: Sizes, count: int, data: DataConfig) -> np.ndarray:
    """(count, A, B, T) labels; the micro-batches of a step have different numbers of targets.

    In every third batch all rows are one: its gradient averages less, and so has another norm than the others.
    """
    shape = (count, *sizes)
    labels = np.resize(tokens, shape).astype(np.int32)
    labels[::3] = labels[::3, :1, :1]
    labels[:, 0, 0, max(2, sizes.tokens // 2) :] = IGNORED
    if (documents := documents_of(data, sizes.tokens)) is not None:  # nothing predicts the first token of a document
        labels[..., 1:][..., np.diff(documents) > 0] = IGNORED
    return labels
