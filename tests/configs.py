"""The small model and the small run of the tests; each test says what is different in its own."""

import dataclasses
from typing import Any

from jaxllm.config import ModelConfig

SMALL = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    moe_intermediate_size=24,
    max_position_embeddings=64,
)


def small(**changes: Any) -> ModelConfig:
    """The small model, with other values of some fields."""
    return dataclasses.replace(SMALL, **changes)


NARROW_MODEL = (
    "--model.hidden-size", "32", "--model.num-hidden-layers", "2", "--model.num-attention-heads", "2",
    "--model.moe-intermediate-size", "24", "--model.n-routed-experts", "4", "--model.vocab-size", "300",
    "--model.max-position-embeddings", "64", "--seq-len", "16",
)  # fmt: skip
"""Options of a run that takes seconds; of an option that is given twice, the last value counts."""

NARROW = (
    *NARROW_MODEL, "--batch-size", "4", "--log-every", "1", "--eval-samples", "7", "--sample-tokens", "8",
    "--precision", "float32", "--optimizer", "adamw", "--learning-rate", "4e-3",  # compiles faster than the default
)  # fmt: skip
"""The same with the rest, without data and steps."""
