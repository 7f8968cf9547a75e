"""The shape of a model."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from jaxllm.config.fields import check_fields, option
from jaxllm.errors import UserError, shown

CUSTOMLLM_FIELDS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "moe_intermediate_size",
    "compression_ratio", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "max_position_embeddings",
    "rms_norm_eps", "rope_theta", "dropout", "final_norm", "initializer_range", "bos_token_id", "eos_token_id",
    "pad_token_id",
)  # fmt: skip
"""The fields of a CustomLLM; all others have their defaults there."""

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""The fields that name special tokens; all are None in weights without a tokenizer."""


@dataclass(frozen=True)
class YarnConfig:
    """YaRN's scaling of rotary frequencies (arXiv:2309.00071), with the names of `rope_scaling` in config.json."""

    factor: float = option(1.0, ge=1)
    """The new context length over that of pre-training; 1: plain rotary embedding."""
    original_max_position_embeddings: int = option(4096, ge=1)
    """Context length of pre-training, in tokens."""
    beta_fast: float = option(32.0, gt=0)
    """Pairs with more rotations than this in that context are unchanged."""
    beta_slow: float = option(1.0, gt=0)
    """The frequencies of pairs with fewer rotations are divided by the factor."""
    mscale: float = option(0.0, ge=0)
    """With `mscale_all_dim`, determines the scale of rotated queries and keys; 0: not given."""
    mscale_all_dim: float = option(0.0, ge=0)
    """Above 0, the attention scale grows with the factor, for the non-rotary part too."""
    attention_factor: float | None = option(None, gt=0)
    """Multiplies the rotated queries and keys; None: derived from `mscale` and `mscale_all_dim`."""
    truncate: bool = True
    """Whether to round the bounds of the ramp between the two betas to integers."""

    def __post_init__(self) -> None:
        check_fields(self)

    def mscale_of(self, weight: float) -> float:
        """YaRN's growth of the attention with the factor, weighted."""
        return 1.0 if self.factor <= 1 else 0.1 * weight * math.log(self.factor) + 1.0

    @property
    def rotation_scale(self) -> float:
        """Multiplies the rotated queries and keys; 1 in all public models."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self.mscale_of(self.mscale) / self.mscale_of(self.mscale_all_dim)
        return self.mscale_of(1.0)


@dataclass(frozen=True)
class RouterConfig:
    """How experts are chosen and weighted, with transformers' names. The defaults are CustomLLM's."""

    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    """The function from the router's logits to scores."""
    topk_method: Literal["noaux_tc", "greedy", "group_limited_greedy"] = "noaux_tc"
    """How experts are ranked. noaux_tc adds the routing bias, and ranks a group by the sum of its two best experts;
    greedy and group_limited_greedy have no bias, and rank a group by its best expert."""
    n_group: int = option(1, ge=1, le=2**14)
    """Number of groups of consecutive experts; 1: no groups."""
    topk_group: int = option(1, ge=1)
    """Number of groups that a token chooses experts from."""
    norm_topk_prob: bool = True
    """Whether to normalize the gates of a token to the sum 1."""
    routed_scaling_factor: float = option(1.0, gt=0)
    """Multiplies the gates, after the normalization."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.topk_group > self.n_group:
            raise UserError(f"topk_group is {self.topk_group}: it must be at most n_group = {self.n_group}")
        if self.topk_method == "greedy" and self.n_group > self.topk_group:
            raise UserError(f"n_group is {self.n_group}: topk_method greedy has no groups, it must be 1")

    @property
    def has_bias(self) -> bool:
        """Whether a routing bias steers the choice."""
        return self.topk_method == "noaux_tc"


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder, with transformers' names. The defaults are CustomLLM's.

    Derived sizes are properties. Nothing about devices or precision belongs here. Upper bounds are far beyond any
    model: a config may come from anywhere, and must not make a loop or an allocation absurdly large.
    """

    vocab_size: int = option(ge=1, le=2**24)
    """Rows of the token embedding table."""
    hidden_size: int = option(ge=1, le=2**20)
    """Size of the residual stream."""
    num_hidden_layers: int = option(ge=1, le=2**12)
    """Layers, dense ones included."""
    num_attention_heads: int = option(ge=1, le=2**16)
    """Heads of each layer."""
    moe_intermediate_size: int = option(ge=1, le=2**20)
    """Hidden size of one expert."""
    compression_ratio: int = option(4, ge=1)
    """Hidden size over the size of each attention latent whose rank is not given."""
    q_lora_rank: int | None = option(None, ge=0, le=2**20)
    """Size of the queries' latent; 0: queries are not compressed; None: hidden_size / compression_ratio."""
    kv_lora_rank: int | None = option(None, ge=1, le=2**20)
    """Size of the latent of keys and values; None: hidden_size / compression_ratio."""
    qk_nope_head_dim: int | None = option(None, ge=1, le=2**20)
    """Dimensions of a query head without position; None: half of hidden_size / num_attention_heads."""
    qk_rope_head_dim: int | None = option(None, ge=2, le=2**20)
    """Rotary dimensions of a query head; None: the other half."""
    v_head_dim: int | None = option(None, ge=1, le=2**20)
    """Size of a value head; None: hidden_size / num_attention_heads."""
    shared_rope_key: bool = False
    """Whether all heads share one rotary key."""
    latent_norm: bool = False
    """Whether the latents are normed."""
    latent_norm_eps: float = option(1e-6, ge=0)
    """Added to the mean square in the norms of the latents."""
    attention_bias: bool = False
    """Whether the projections to the latents and the output projection have biases."""
    n_routed_experts: int = option(7, ge=1, le=2**14)
    """Experts of a layer, of which a token chooses some."""
    n_shared_experts: int = option(1, ge=1, le=2**14)
    """Experts of a layer that every token uses."""
    num_experts_per_tok: int = option(2, ge=1)
    """Routed experts that a token chooses."""
    router: RouterConfig = field(default_factory=RouterConfig)
    first_k_dense_replace: int = option(0, ge=0)
    """Number of leading layers with a dense feed-forward network instead of experts."""
    intermediate_size: int | None = option(None, ge=1, le=2**20)
    """Hidden size of the dense feed-forward network."""
    max_position_embeddings: int = option(2048, ge=1)
    """Maximum length of a sequence, in tokens."""
    learned_positions: bool = True
    """Whether to add learned position embeddings."""
    rms_norm_eps: float = option(1e-5, ge=0)
    """Added to the mean square in all other norms."""
    rope_theta: float = option(10000.0, gt=1)
    """Base of the rotary frequencies."""
    rope_scaling: YarnConfig = field(default_factory=YarnConfig)
    dropout: float = option(0.1, ge=0, lt=1)
    """Dropout rate on the embeddings, in training only."""
    final_norm: bool = False
    """Whether a norm precedes lm_head (the source has none)."""
    lm_head_bias: bool = True
    """Whether lm_head has a bias."""
    tie_word_embeddings: bool = False
    """Whether lm_head shares the weight of the token embeddings."""
    initializer_range: float = option(0.02, ge=0)
    """Standard deviation of the initial weights of matrices."""
    bos_token_id: int | None = None
    """The token at the start of a text; in a run, the tokenizer's."""
    eos_token_id: int | tuple[int, ...] | None = None
    """The token, or tokens, that end a text."""
    pad_token_id: int | None = None
    """The token that pads shorter rows; in a run, the tokenizer's."""

    def __post_init__(self) -> None:
        check_fields(self)
        derived = (self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim)
        if None in derived and self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size is {self.hidden_size}: it must be a multiple of "
                f"num_attention_heads = {self.num_attention_heads}"
            )
        if self.rope_head_dim % 2 or (derived == (None, None, None) and self.head_dim % 4):
            if self.qk_rope_head_dim is not None:
                raise UserError(f"qk_rope_head_dim is {self.rope_head_dim}: it must be even, rotation is in pairs")
            raise UserError(
                f"num_attention_heads is {self.num_attention_heads}: hidden_size / num_attention_heads = "
                f"{self.head_dim} must be a multiple of 4, because half of each head rotates in pairs"
            )
        if None in (self.q_lora_rank, self.kv_lora_rank) and self.hidden_size % self.compression_ratio:
            raise UserError(
                f"compression_ratio is {self.compression_ratio}: it must divide hidden_size = {self.hidden_size}"
            )
        if self.moe_layers:
            self._check_experts()
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise UserError(
                f"first_k_dense_replace is {self.first_k_dense_replace}: it must be at most "
                f"num_hidden_layers = {self.num_hidden_layers}"
            )
        if self.first_k_dense_replace and self.intermediate_size is None:
            raise UserError("intermediate_size is None: the dense layers (first_k_dense_replace) need it")
        if self.tie_word_embeddings and self.lm_head_bias:
            raise UserError("lm_head_bias is True: with tie_word_embeddings it must be False")
        for name in SPECIAL_TOKENS:
            value = getattr(self, name)
            for token in value if isinstance(value, tuple) else () if value is None else (value,):
                if not 0 <= token < self.vocab_size:
                    raise UserError(f"{name} is {shown(value)}: it must be 0 to vocab_size - 1 = {self.vocab_size - 1}")

    def _check_experts(self) -> None:
        E, k, router = self.n_routed_experts, self.num_experts_per_tok, self.router
        if k > E:
            raise UserError(f"num_experts_per_tok is {k}: it must be at most n_routed_experts = {E}")
        if E % router.n_group:
            raise UserError(f"n_group is {router.n_group}: it must divide n_routed_experts = {E}")
        in_group = E // router.n_group
        if k > router.topk_group * in_group:
            raise UserError(
                f"num_experts_per_tok is {k}: it must be at most {router.topk_group * in_group}, the experts in "
                f"topk_group = {router.topk_group} groups"
            )
        if router.n_group > 1 and router.has_bias and in_group < 2:
            raise UserError(
                f"n_group is {router.n_group}: with topk_method noaux_tc a group must have at least two of the "
                f"{E} experts, as its two best ones rank it"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def nope_head_dim(self) -> int:
        return self.qk_nope_head_dim or self.head_dim - self.head_dim // 2

    @property
    def rope_head_dim(self) -> int:
        return self.qk_rope_head_dim or self.head_dim // 2

    @property
    def qk_head_dim(self) -> int:
        return self.nope_head_dim + self.rope_head_dim

    @property
    def value_head_dim(self) -> int:
        return self.v_head_dim or self.head_dim

    @property
    def rope_key_heads(self) -> int:
        """Rotary keys of a token: one for each head, or one for all."""
        return 1 if self.shared_rope_key else self.num_attention_heads

    @property
    def kv_latent_size(self) -> int:
        return self.kv_lora_rank or self.hidden_size // self.compression_ratio

    @property
    def q_latent_size(self) -> int:
        """0: queries are not compressed."""
        return self.hidden_size // self.compression_ratio if self.q_lora_rank is None else self.q_lora_rank

    @property
    def softmax_scale(self) -> float:
        """Multiplies the products of queries and keys."""
        return self.qk_head_dim**-0.5 * self.rope_scaling.mscale_of(self.rope_scaling.mscale_all_dim) ** 2

    @property
    def dense_layers(self) -> int:
        return self.first_k_dense_replace

    @property
    def moe_layers(self) -> int:
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        eos = self.eos_token_id
        return eos if isinstance(eos, tuple) else () if eos is None else (eos,)

    def to_dict(self) -> dict[str, Any]:
        """JSON values of the fields of a CustomLLM, and of all others that differ from their defaults."""
        eos = list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id
        changed = (f.name for f in dataclasses.fields(self) if getattr(self, f.name) != _default(f))
        written = {*CUSTOMLLM_FIELDS, *changed}
        values = dataclasses.asdict(self) | {"eos_token_id": eos}
        return {name: value for name, value in values.items() if name in written}

    def resolved(self) -> Self:
        """The same model, with derived values in place of fields that are None."""
        return dataclasses.replace(
            self, q_lora_rank=self.q_latent_size, kv_lora_rank=self.kv_latent_size, qk_nope_head_dim=self.nope_head_dim,
            qk_rope_head_dim=self.rope_head_dim, v_head_dim=self.value_head_dim, compression_ratio=1,
        )  # fmt: skip

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. Missing fields get their defaults, and unknown keys are ignored.

        Raises:
            UserError: a required key is missing, or a value is out of range.
        """
        required = {f.name for f in dataclasses.fields(cls) if _default(f) is dataclasses.MISSING}
        if missing := sorted(required - values.keys()):
            raise UserError(f"the model config lacks {', '.join(missing)}")
        known = {f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values}
        for name, kind in (("router", RouterConfig), ("rope_scaling", YarnConfig)):
            if isinstance(part := known.get(name), Mapping):
                known[name] = kind(**{f.name: part[f.name] for f in dataclasses.fields(kind) if f.name in part})
        if isinstance(eos := known.get("eos_token_id"), list):
            known["eos_token_id"] = tuple(eos)
        return cls(**known)


def _default(declared: dataclasses.Field) -> Any:
    return declared.default if declared.default_factory is dataclasses.MISSING else declared.default_factory()


def deepseek(**shape: Any) -> ModelConfig:
    """A decoder of the DeepSeek family: latents with norms, one rotary key, no table of positions, a final norm."""
    return ModelConfig(
        shared_rope_key=True, latent_norm=True, learned_positions=False, dropout=0.0, final_norm=True,
        lm_head_bias=False, **shape,
    )  # fmt: skip
