"""The sizes of the rows: those of a real run, those of a GPU, and small ones (`quick`) that run in seconds."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from jaxllm.config import DEFAULT_RECIPE, ModelConfig, TrainConfig, preset, recipe

MODEL = "customllm-1b"

NARROW = {
    "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "moe_intermediate_size": 32, "max_position_embeddings": 128,
}  # fmt: skip

PRECISIONS = ("float32", "bfloat16")  # of a side that takes its fastest
EXPERTS = ("eager", "grouped_mm")  # transformers' implementations


class MixtureSizes(NamedTuple):  # of one mixture of experts, without shared experts
    tokens: int  # N
    hidden: int  # D
    expert_hidden: int  # F
    experts: int  # E
    per_token: int  # k


class DecodingSizes(NamedTuple):  # of one decoding measurement
    batch: int
    prompt: int
    new: int


def train_config(quick: bool, layers: int = 6, remat: bool = False) -> TrainConfig:
    """A step of 4 x 256 tokens on `layers` layers of customllm-1b, with the source's recipe."""
    config = recipe("seed", MODEL)
    # no dropout: its random numbers differ between the frameworks, and the losses are compared
    changes = {**NARROW, "dropout": 0.0} if quick else {"num_hidden_layers": layers, "dropout": 0.0}
    batch = {"batch_size": 2, "seq_len": 32} if quick else {"batch_size": 4, "seq_len": 256}
    return config.with_options(model=dataclasses.replace(config.model, **changes), grad_accum=1, remat=remat, **batch)


def learner_config(optimizer: str, quick: bool) -> TrainConfig:
    """The default run of `train.py` in float32, with Muon (its default) or with AdamW at AdamW's learning rate."""
    config = recipe("default", "tiny").with_options(precision="float32")
    if optimizer == "adamw":
        plain = TrainConfig().options()
        config = config.with_options(**{name: plain[name] for name in DEFAULT_RECIPE if name != "steps"})
    if quick:
        model = dataclasses.replace(config.model, **NARROW | {"vocab_size": 300})  # a byte-level tokenizer's
        config = config.with_options(model=model, batch_size=2, seq_len=32, eval_samples=4, steps=4, warmup_steps=1)
    return config


def gpu_config(quick: bool, remat: bool = False) -> TrainConfig:
    """The step of a GPU: 8 x 2,048 tokens in bfloat16, on one device."""
    model = dataclasses.replace(preset(MODEL), **(NARROW if quick else {}))
    batch = {"batch_size": 2, "seq_len": 32} if quick else {"batch_size": 8, "seq_len": 2048}
    return TrainConfig.from_options(preset=MODEL, model=model, precision="bfloat16", remat=remat, **batch)


# the steps that are measured, by the names under which workers know them
STEPS: dict[str, Callable[[bool], TrainConfig]] = {
    "six layers": train_config,
    "all layers": partial(train_config, layers=24, remat=True),
    "muon": partial(learner_config, "muon"),
    "adamw": partial(learner_config, "adamw"),
    "gpu": gpu_config,
    "gpu, remat": partial(gpu_config, remat=True),
}


def step_labels(config: TrainConfig) -> np.ndarray:
    """(A,B,T) int32 token rows, the same in every process."""
    shape = (config.data.grad_accum, config.data.batch_size, config.data.seq_len)
    return np.random.default_rng(1).integers(config.model.vocab_size, size=shape, dtype=np.int32)


def steps_in_a_turn(size: str, quick: bool) -> int:
    return 8 if size.startswith("gpu") and not quick else 1


def mixture_sizes(quick: bool, gpu: bool) -> MixtureSizes:
    """On a GPU, the routed experts of a layer of its step."""
    if not gpu:
        return MixtureSizes(64, 32, 24, 7, 2) if quick else MixtureSizes(1024, 1024, 1536, 7, 2)
    config = gpu_config(quick)
    m, tokens = config.model, config.data.batch_size * config.data.seq_len
    return MixtureSizes(tokens, m.hidden_size, m.moe_intermediate_size, m.n_routed_experts, m.num_experts_per_tok)


def peak_sizes(quick: bool) -> tuple[int, ...]:
    return (64,) if quick else (1024, 2048)


def decode_model(name: str, quick: bool) -> ModelConfig:
    return dataclasses.replace(preset(name), dropout=0.0, **(NARROW if quick else {}))


def decode_prompts(config: ModelConfig, rows: int, length: int) -> list[list[int]]:
    """Rows of random token ids, the same in every process."""
    length = min(length, config.max_position_embeddings // 2)
    return np.random.default_rng(2).integers(config.vocab_size, size=(rows, length)).tolist()


def family_model(model: ModelConfig) -> ModelConfig:
    """DeepSeek-V3's architecture with the sizes of a CustomLLM: norms on the latents, one rotary key for all heads, no
    table of positions, no bias of the head."""
    return dataclasses.replace(
        model, shared_rope_key=True, latent_norm=True, learned_positions=False, final_norm=True, lm_head_bias=False
    )
