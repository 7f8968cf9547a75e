"""The sizes of the parts: those of one large GPU, and small ones (`quick`) that run on a CPU in seconds."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from benchmarks.sizes import NARROW, MixtureSizes
from jaxllm.config import TrainConfig, preset

MODEL = "customllm-1b"

PRODUCT = 8192
"""The side of the square matrices whose product defines the peak."""


class DecodingSizes(NamedTuple):
    """Sizes of one decoding measurement, in tokens."""

    batch: int
    prompt: int
    new: int
    """Tokens after the first."""


def step_config(quick: bool, remat: bool) -> TrainConfig:
    """The training step: 8 x 2,048 tokens in bfloat16, on one device."""
    model = preset(MODEL)
    if quick:
        model = dataclasses.replace(model, **NARROW)
    batch = {"batch_size": 2, "seq_len": 32} if quick else {"batch_size": 8, "seq_len": 2048}
    return TrainConfig.from_options(preset=MODEL, model=model, precision="bfloat16", remat=remat, **batch)


def steps_in_a_round(quick: bool) -> int:
    return 1 if quick else 8


def mixture_sizes(quick: bool) -> MixtureSizes:
    """The routed experts of a layer in that step."""
    config = step_config(quick, remat=False)
    m = config.model
    tokens = config.data.batch_size * config.data.seq_len
    return MixtureSizes(tokens, m.hidden_size, m.moe_intermediate_size, m.n_routed_experts, m.num_experts_per_tok)


def decoding_sizes(quick: bool) -> list[DecodingSizes]:
    """One sequence after a long prompt, and a batch."""
    if quick:
        return [DecodingSizes(2, 32, 32)]
    return [DecodingSizes(1, 1024, 128), DecodingSizes(64, 128, 128)]
