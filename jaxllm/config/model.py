"""The shape of a model, and the presets."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from jaxllm.config.fields import check_fields, option
from jaxllm.errors import UserError, shown

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""The fields that name tokens. Weights that came without their tokenizer have none of them."""


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a CustomLLM, in transformers' words (the keys of an exported config.json).

    Derived sizes are properties. Nothing about devices or precision belongs here. Upper bounds are far beyond any
    model: a config may come from anywhere, and must not make a loop or an allocation absurdly large.
    """

    vocab_size: int = option(ge=1, le=2**24)
    hidden_size: int = option(ge=1, le=2**20)
    num_hidden_layers: int = option(ge=1, le=2**12)
    num_attention_heads: int = option(ge=1, le=2**16)
    moe_intermediate_size: int = option(ge=1, le=2**20)
    compression_ratio: int = option(4, ge=1)
    """Hidden size over the size of each attention latent."""
    n_routed_experts: int = option(7, ge=1, le=2**14)
    n_shared_experts: int = option(1, ge=1, le=2**14)
    num_experts_per_tok: int = option(2, ge=1)
    max_position_embeddings: int = option(2048, ge=1)
    rms_norm_eps: float = option(1e-5, ge=0)
    rope_theta: float = option(10000.0, gt=1)
    dropout: float = option(0.1, ge=0, lt=1)
    """Dropout rate on the embeddings, in training only."""
    final_norm: bool = False
    """Whether a norm precedes lm_head (the source has none)."""
    initializer_range: float = option(0.02, ge=0)
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size is {self.hidden_size}: it must be a multiple of "
                f"num_attention_heads = {self.num_attention_heads}"
            )
        if self.head_dim % 4:
            raise UserError(
                f"num_attention_heads is {self.num_attention_heads}: hidden_size / num_attention_heads = "
                f"{self.head_dim} must be a multiple of 4, because half of each head rotates in pairs"
            )
        if self.hidden_size % self.compression_ratio:
            raise UserError(
                f"compression_ratio is {self.compression_ratio}: it must divide hidden_size = {self.hidden_size}"
            )
        if self.num_experts_per_tok > self.n_routed_experts:
            raise UserError(
                f"num_experts_per_tok is {self.num_experts_per_tok}: it must be at most "
                f"n_routed_experts = {self.n_routed_experts}"
            )
        for name in SPECIAL_TOKENS:
            value = getattr(self, name)
            if value is not None and not 0 <= value < self.vocab_size:
                raise UserError(f"{name} is {shown(value)}: it must be below vocab_size = {self.vocab_size}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def rope_head_dim(self) -> int:
        """Rotary dimensions of a head; the other half carries no position."""
        return self.head_dim // 2

    @property
    def nope_head_dim(self) -> int:
        return self.head_dim - self.rope_head_dim

    @property
    def latent_size(self) -> int:
        return self.hidden_size // self.compression_ratio

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a mapping such as a config.json; keys that belong to transformers are ignored.

        Raises:
            UserError: a required key is missing, or a value is out of range.
        """
        required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        if missing := sorted(required - values.keys()):
            raise UserError(f"the model config lacks {', '.join(missing)}")
        return cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values})


PRESETS: dict[str, ModelConfig] = {
    # the default of train.py: trains in minutes on two cores; its vocabulary is the tokenizer's
    "tiny": ModelConfig(
        vocab_size=4096,
        hidden_size=192,
        num_hidden_layers=3,
        num_attention_heads=3,
        moe_intermediate_size=256,
        max_position_embeddings=512,
        dropout=0.0,
        final_norm=True,
    ),
    # the source's breakdown
    "customllm-768": ModelConfig(
        vocab_size=49152, hidden_size=768, num_hidden_layers=24, num_attention_heads=12, moe_intermediate_size=1536
    ),
    # the source's printed tree: 1,075,060,736 parameters
    "customllm-1b": ModelConfig(
        vocab_size=49152, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, moe_intermediate_size=1536
    ),
}

TOKENIZER_SIZED_PRESETS = frozenset({"tiny"})
"""Presets without a vocabulary of their own: train.py gives them the tokenizer's size."""


def preset(name: str) -> ModelConfig:
    """Look up a preset by name.

    Raises:
        UserError: there is no such preset.
    """
    if name not in PRESETS:
        raise UserError(f"preset is {shown(name)}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
