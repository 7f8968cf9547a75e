"""CustomLLM in PyTorch: a decoder with Multi-head Latent Attention and DeepSeekMoE, for CUDA, MPS and CPU.

A reference in plain eager code. It imports only torch and transformers, because exported folders contain a copy of it
as `modeling_customllm.py`. All shape comments use these axis letters:

    B batch        T time (queries)   S time (keys, cache slots)   N = B*T tokens
    D hidden       H heads            h head size                  n = r = h/2 (no position | rotary)
    R latent       F expert hidden    E routed experts             k experts of a token   M = N*k rows
    L layers       V vocabulary
"""

from __future__ import annotations

import functools
import inspect
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils.versions import require_version

require_version(
    "transformers>=5.4", "To load this model: pip install -U transformers"
)  # older versions lack names imported below

from transformers import AutoModel, Cache, DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.generation import StoppingCriteria, StoppingCriteriaList
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

# The number of rows of an expert depends on the data; without this, torch.compile breaks the graph at each layer.
torch._dynamo.config.capture_scalar_outputs = True  # pyright: ignore[reportAttributeAccessIssue]

IGNORED = -100  # the label of a position that is not a target
# transformers 5.24 renamed an argument and an output. Both names are taken; the one of this version is used.
CACHE_NAMES = ("past_key_values", "cache")
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
CODE_FILE = "modeling_customllm.py"  # the name of this file in an exported folder
AUTO_CLASSES = {
    "AutoConfig": "CustomLLMConfig",
    "AutoModel": "CustomLLMModel",
    "AutoModelForCausalLM": "CustomLLM",
    "AutoModelForSequenceClassification": "CustomLLMForSequenceClassification",
    "AutoModelForTokenClassification": "CustomLLMForTokenClassification",
}
PACKING = {
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "seq_idx",
}  # the same information as position_ids
# Tensor parallel: a device has some of the heads and a part of every expert. The router, the position table and the two
# projections to the latents are whole on each. There is no pipeline plan: transformers only splits models whose modules
# are called `layers`, `embed_tokens` and `norm`, and the later stages would add the positions again.
TP_PLAN = {
    "token_embeddings": "embedding_rowwise",
    "decoder_layers.*.self_attn.k_proj_u": "colwise",
    "decoder_layers.*.self_attn.v_proj_u": "colwise",
    "decoder_layers.*.self_attn.q_proj_u": "colwise",
    "decoder_layers.*.self_attn.rope_k": "colwise",
    "decoder_layers.*.self_attn.rope_q": "colwise",
    "decoder_layers.*.self_attn.o_proj": "rowwise",
    "decoder_layers.*.mlp.shared_experts.*.gate_proj": "colwise",
    "decoder_layers.*.mlp.shared_experts.*.up_proj": "colwise",
    "decoder_layers.*.mlp.shared_experts.*.down_proj": "rowwise",
    "decoder_layers.*.mlp.routed_experts.*.gate_proj": "colwise",
    "decoder_layers.*.mlp.routed_experts.*.up_proj": "colwise",
    "decoder_layers.*.mlp.routed_experts.*.down_proj": "rowwise",
}
FSDP_PLAN = {
    "token_embeddings": "free_full_weight",
    "position_embeddings": "free_full_weight",
    "decoder_layers.*": "free_full_weight",
}
COUNTS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "moe_intermediate_size",
    "compression_ratio", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "max_position_embeddings",
)  # fmt: skip


class CustomLLMConfig(PretrainedConfig):
    """The keys of a CustomLLM's config.json; the defaults are the preset `customllm-1b`.

    Raises ValueError for sizes that do not fit each other.
    """

    model_type = "customllm"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [*CACHE_NAMES]  # the Trainer adds a list to it
    base_model_tp_plan: ClassVar[dict[str, str]] = TP_PLAN
    base_model_fsdp_plan: ClassVar[dict[str, str]] = FSDP_PLAN

    vocab_size: int = 49152
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    moe_intermediate_size: int = 1536
    compression_ratio: int = 4
    n_routed_experts: int = 7
    n_shared_experts: int = 1
    num_experts_per_tok: int = 2
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    dropout: float = 0.1
    final_norm: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True

    def __post_init__(self, **kwargs) -> None:
        super().__post_init__(**kwargs)
        for name in COUNTS:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}: it must be a whole number of at least 1")
        D, H, ratio = self.hidden_size, self.num_attention_heads, self.compression_ratio
        k, E = self.num_experts_per_tok, self.n_routed_experts
        if D % H:
            raise ValueError(f"hidden_size is {D}: it must be a multiple of num_attention_heads = {H}")
        if D // H % 4:
            raise ValueError(
                f"num_attention_heads is {H}: hidden_size / num_attention_heads = {D // H} must be a multiple of 4, "
                "because half of each head rotates in pairs"
            )
        if D % ratio:
            raise ValueError(f"compression_ratio is {ratio}: it must divide hidden_size = {D}")
        if k > E:
            raise ValueError(f"num_experts_per_tok is {k}: it must be at most n_routed_experts = {E}")
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings is True: it must be False, lm_head has a separate matrix")


@dataclass
class CustomLLMModelOutput(BaseModelOutputWithPast):
    """transformers' output; with `output_router=True` also the routing, one tensor for each layer."""

    router_experts: tuple[Tensor, ...] | None = None  # L times (B,T,k) int64
    router_scores: tuple[Tensor, ...] | None = None  # L times (B,T,E), without the bias
    router_logits: tuple[Tensor, ...] | None = None  # L times (B,T,E)


class LayerOptions(NamedTuple):
    """What `CustomLLMModel` returns, and how it routes."""

    logits_to_keep: int | Tensor = 0
    """A number of last positions, or the positions, to return; 0: all."""
    output_hidden_states: bool | None = None
    """Return `hidden_states`, L+1 of (B,T,D): embeddings, then the residual stream after each layer, before any final
    norm; None: as the config says."""
    output_attentions: bool | None = None
    """Return `attentions`, L of (B,H,T,S), from `eager`; None: as the config says."""
    output_router: bool = False
    """Return `router_experts`, `router_scores` and `router_logits`."""
    expert_indices: Tensor | None = None
    """(L,B,T,k) experts to use instead of the routers' choice."""


@dataclass
class CustomLLMOutput(CausalLMOutputWithPast):
    """As `CustomLLMModelOutput`, with loss and logits in place of the last hidden state."""

    router_experts: tuple[Tensor, ...] | None = None
    router_scores: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms, rotation, softmax, router and loss: float32, or float64 in a float64 model."""
    return torch.promote_types(dtype, torch.float32)


def no_autocast(x: Tensor) -> AbstractContextManager:
    """A context in which products keep the dtype of their factors, even inside autocast."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


class CustomRMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019): computed in float32, returned in x's dtype."""

    def __init__(self, features: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # (..., D) -> (..., D)
        upcast = x.to(at_least_float32(x.dtype))
        inverse_rms = torch.rsqrt(upcast.square().mean(dim=-1, keepdim=True) + self.eps)
        return (upcast * inverse_rms * self.weight).to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (Su et al. 2021, section 3.4), rotate-half convention; no weights, no buffers."""

    def __init__(self, features: int, theta: float):
        super().__init__()
        self.features, self.theta = features, theta

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:  # (B,T,H,r), (B|1,T) -> (B,T,H,r)
        acc_dtype = at_least_float32(x.dtype)
        # Python floats, rounded once: the same numbers in both frameworks, and no float64 tensor on the device
        inv_freq = [self.theta ** (-i / self.features) for i in range(0, self.features, 2)]
        angles = positions[..., None, None].to(acc_dtype) * torch.tensor(inv_freq, dtype=acc_dtype, device=x.device)
        cos, sin = angles.cos(), angles.sin()  # (B|1,T,1,r/2)
        first, second = x.to(acc_dtype).chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def causal_mask(
    config: CustomLLMConfig,
    x: Tensor,
    attention_mask: Tensor | None,
    cache: Cache | None = None,
    position_ids: Tensor | None = None,
) -> Any:
    """transformers' mask for the attention function of the config: (1|B,1,T,S), or what else that function takes.

    A token attends to itself and to earlier tokens of its document, but not to padding. Padding attends to itself, so
    that no softmax runs over an empty row. Documents are packed in a row where `position_ids` start again.
    """
    if attention_mask is None and position_ids is None:  # one mask for all rows; only shape, dtype and device are read
        x = x.new_empty((1, x.shape[1], 0))
    options: dict[str, Any] = {"attention_mask": attention_mask, "position_ids": position_ids, CACHE: cache}
    mask = create_causal_mask(config=config, inputs_embeds=x, **options)
    if isinstance(mask, Tensor) and isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        past = 0 if cache is None else cache.get_seq_length()
        query = torch.arange(x.shape[1], device=x.device)[:, None] + past  # (T,1), the slot of each query
        itself = torch.arange(mask.shape[-1], device=x.device) == query
        mask = mask.masked_fill(itself, True if mask.dtype == torch.bool else 0.0)
    return mask


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last axis, in the dtype of the scores; the mask is boolean, or is added to the scores."""
    lowest = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(dim=-1)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """The reference among transformers' attention functions: (B,H,T,h), twice (B,H,S,h) -> (B,T,H,h), (B,H,T,S)."""
    acc_dtype = at_least_float32(query.dtype)
    query = query * scaling
    with no_autocast(query):  # the products of bfloat16 numbers are accumulated and kept in float32
        weights = masked_softmax(query.to(acc_dtype) @ key.to(acc_dtype).mT, attention_mask)
    return (weights.to(value.dtype) @ value).transpose(1, 2), weights


class MultiHeadLatentAttention(nn.Module):
    """Multi-head Latent Attention (DeepSeek-V2, arXiv:2405.04434, section 2.1), keys and values expanded.

    The cache holds full keys and values, keys after rotation.
    """

    is_causal = True  # these names are read by transformers' attention functions
    num_key_value_groups = 1

    def __init__(self, config: CustomLLMConfig, layer: int):
        super().__init__()
        D, H = config.hidden_size, config.num_attention_heads
        R, half = D // config.compression_ratio, D // H // 2
        self.config, self.layer_idx, self.head_dim, self.scaling = config, layer, 2 * half, (2 * half) ** -0.5
        self.kv_proj_d = nn.Linear(D, R, bias=False)
        self.q_proj_d = nn.Linear(D, R, bias=False)
        self.k_proj_u = nn.Linear(R, H * half, bias=False)
        self.v_proj_u = nn.Linear(R, D, bias=False)
        self.q_proj_u = nn.Linear(R, H * half, bias=False)
        self.rope_k = nn.Linear(D, H * half, bias=False)
        self.rope_q = nn.Linear(R, H * half, bias=False)
        self.o_proj = nn.Linear(D, D, bias=False)
        self.rotary_emb = RotaryEmbedding(half, config.rope_theta)

    def forward(self, x: Tensor, positions: Tensor, mask: Any, **kwargs) -> tuple[Tensor, Tensor | None]:
        """(B,T,D), positions (B|1,T), mask (B|1,1,T,S) -> (B,T,D) and, from `eager`, the attention weights (B,H,T,S).

        The cache, `kwargs[CACHE]`, grows from S-T to S slots. The other `kwargs` go to the attention function.
        """
        kv, q_latent = self.kv_proj_d(x), self.q_proj_d(x)  # (B,T,R)
        half = self.head_dim // 2
        k_rope = self.rotary_emb(self.rope_k(x).unflatten(-1, (-1, half)), positions)
        q_rope = self.rotary_emb(self.rope_q(q_latent).unflatten(-1, (-1, half)), positions)
        k = torch.cat([self.k_proj_u(kv).unflatten(-1, (-1, half)), k_rope], dim=-1).transpose(1, 2)  # (B,H,T,h)
        q = torch.cat([self.q_proj_u(q_latent).unflatten(-1, (-1, half)), q_rope], dim=-1).transpose(1, 2)
        v = self.v_proj_u(kv).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        cache = kwargs.pop(CACHE, None)
        if cache is not None:
            # a paged cache finds the slots of each token in `kwargs`
            k, v = cache.update(k, v, self.layer_idx, **({} if isinstance(cache, Cache) else {"kwargs": kwargs}))
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(
            str(self.config._attn_implementation), eager_attention_forward
        )
        context, weights = attention(self, q, k, v, mask, scaling=self.scaling, position_ids=positions, **kwargs)
        return self.o_proj(context.flatten(2)), weights  # context (B,T,H,h)


class Routing(NamedTuple):
    experts: Tensor  # (N,k) int64, the chosen experts
    gates: Tensor  # (N,k), their weights, which sum to 1
    scores: Tensor  # (N,E), sigmoid scores without the bias
    logits: Tensor  # (N,E)


class Dispatch(NamedTuple):
    order: Tensor  # (M,): row i of the sorted rows is slot order[i] of the (N,k) slots, flattened
    inverse: Tensor  # (M,): slot j is in row inverse[j]
    group_sizes: list[int]  # E: rows of each expert


class Router(nn.Linear):
    """`nn.Linear` in float32, whatever the dtype of its input and of autocast; printed as `Linear`."""

    def forward(self, x: Tensor) -> Tensor:  # (N,D) -> (N,E)
        acc_dtype = at_least_float32(x.dtype)
        with no_autocast(x):
            return F.linear(x.to(acc_dtype), self.weight.to(acc_dtype))

    def _get_name(self) -> str:
        return "Linear"


def route(logits: Tensor, routing_bias: Tensor, experts_per_token: int, experts: Tensor | None = None) -> Routing:
    """Choose experts by biased score, weight them by unbiased score (DeepSeek-V3, arXiv:2412.19437).

    Args:
        logits, routing_bias: (N,E), at least float32, and (E,).
        experts_per_token: k.
        experts: (N,k) experts to use instead of the k largest `scores + routing_bias` (ties: lowest index).
    """
    scores = logits.sigmoid()
    if experts is None:
        # k times argmax: torch.topk does not specify the order of ties, and ONNX has no stable sort
        left, choice = scores.detach() + routing_bias.to(logits.dtype), []
        for _ in range(experts_per_token):
            choice.append(left.argmax(dim=-1, keepdim=True))
            left = left.scatter(-1, choice[-1], float("-inf"))
        experts = torch.cat(choice, dim=-1)
    chosen = scores.gather(-1, experts)
    gates = chosen / (chosen.sum(dim=-1, keepdim=True) + 1e-20)
    return Routing(experts, gates, scores, logits)


def plan_dispatch(experts: Tensor, n_experts: int) -> Dispatch:
    """Sort the (N,k) slots by expert; tokens of one expert keep their order. A counting sort, as ONNX has no other."""
    slots = experts.flatten()
    chosen = slots[:, None] == torch.arange(n_experts, device=slots.device)  # (M,E)
    counts = chosen.sum(dim=0)
    place = chosen.cumsum(dim=0) - 1 + (counts.cumsum(dim=0) - counts)  # (M,E), the slot's row if it chose E
    inverse = place.gather(1, slots[:, None])[:, 0]
    order = torch.zeros_like(inverse).scatter(0, inverse, torch.arange(slots.numel(), device=slots.device))
    return Dispatch(order, inverse, counts.tolist())


def run_experts(tokens: Tensor, layers: nn.ModuleList, plan: Dispatch, experts_per_token: int) -> Tensor:
    """Run each expert on its tokens: (N,D) -> (M,D), rows sorted by expert. No token is dropped."""
    groups = tokens.index_select(0, plan.order // experts_per_token).split(plan.group_sizes)

    def needed(layer: nn.Module) -> bool:
        # In training, an expert without tokens runs on an empty batch: its gradients are then zero, not None, which
        # optimizers and DistributedDataParallel treat differently. A compiled or exported graph also runs all experts,
        # because it must serve every routing.
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in layer.parameters())
        return torch.compiler.is_compiling() or trained

    return torch.cat([layer(rows) for layer, rows in zip(layers, groups, strict=True) if needed(layer) or len(rows)])


def combine(rows: Tensor, gates: Tensor, plan: Dispatch) -> Tensor:  # (M,D), (N,k) -> (N,D)
    slots = rows.index_select(0, plan.inverse).unflatten(0, gates.shape)  # (N,k,D)
    return (slots * gates.to(rows.dtype)[..., None]).sum(dim=1)


class DeepSeekExpertLayer(nn.Module):
    """A SwiGLU feed-forward layer."""

    def __init__(self, config: CustomLLMConfig):
        super().__init__()
        D, hidden = config.hidden_size, config.moe_intermediate_size
        self.gate_proj = nn.Linear(D, hidden, bias=False)
        self.up_proj = nn.Linear(D, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, D, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:  # (N,D) -> (N,D)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class RoutedExperts(nn.ModuleList):
    """The routed experts; printed as `ModuleList`."""

    def forward(self, tokens: Tensor, experts: Tensor, gates: Tensor) -> Tensor:  # (N,D), twice (N,k) -> (N,D)
        if torch.jit.is_tracing():  # it would keep the group sizes that it saw: each expert runs on every token
            chosen = experts[..., None] == torch.arange(len(self), device=experts.device)  # (N,k,E)
            weights = (gates[..., None] * chosen).sum(dim=1).to(tokens.dtype)  # (N,E)
            rows = [weight[:, None] * layer(tokens) for layer, weight in zip(self, weights.T, strict=True)]
            return torch.stack(rows).sum(dim=0)
        plan = plan_dispatch(experts, len(self))
        return combine(run_experts(tokens, self, plan, experts.shape[-1]), gates, plan)

    def _get_name(self) -> str:
        return "ModuleList"


class DeepSeekMoE(nn.Module):
    """Shared experts for every token, k routed experts for each token (DeepSeekMoE, arXiv:2401.06066).

    `routing_bias` steers the choice. It is a buffer, not a parameter: no gradient and no weight decay.
    """

    routing_bias: Tensor  # (E,)

    def __init__(self, config: CustomLLMConfig):
        super().__init__()
        self.experts_per_token = config.num_experts_per_tok
        self.shared_experts = nn.ModuleList(DeepSeekExpertLayer(config) for _ in range(config.n_shared_experts))
        self.routed_experts = RoutedExperts(DeepSeekExpertLayer(config) for _ in range(config.n_routed_experts))
        self.router = Router(config.hidden_size, config.n_routed_experts, bias=False)
        # never bfloat16, which may be the default dtype while transformers builds the model
        acc_dtype = at_least_float32(torch.get_default_dtype())
        self.register_buffer("routing_bias", torch.zeros(config.n_routed_experts, dtype=acc_dtype))

    def forward(self, x: Tensor, experts: Tensor | None = None) -> tuple[Tensor, Routing]:
        """(B,T,D) -> (B,T,D) and the routing of its N tokens; `experts` (B,T,k) replaces the choice."""
        tokens = x.flatten(0, 1)  # (N,D)
        experts = None if experts is None else experts.flatten(0, 1)
        routing = route(self.router(tokens), self.routing_bias, self.experts_per_token, experts)
        routed = self.routed_experts(tokens, routing.experts, routing.gates)
        return (sum(expert(tokens) for expert in self.shared_experts) + routed).view_as(x), routing


class DecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: CustomLLMConfig, layer: int):
        super().__init__()
        self.self_attn = MultiHeadLatentAttention(config, layer)
        self.mlp = DeepSeekMoE(config)
        self.input_norm = CustomRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attn_norm = CustomRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Any,
        experts: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs,  # transformers finds the cache here by its name, and drops it when checkpointing
    ) -> tuple[Tensor, Routing, Tensor | None]:  # (B,T,D) -> (B,T,D), and (B,H,T,S) if asked for
        attended, weights = self.self_attn(self.input_norm(x), positions, mask, **kwargs)
        x = x + attended
        mixed, routing = self.mlp(self.post_attn_norm(x), experts)
        return x + mixed, routing, weights if output_attentions else None


def next_token_loss(logits: Tensor, labels: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Cross-entropy in nats. Only this function shifts the labels: position t is scored on label t+1.

    Args:
        logits: (B, T, V), float32 or float64.
        labels: (B, T); `IGNORED` is not a target.
        num_items: the number of targets to divide by, counted by the Trainer over all accumulated micro-batches;
            None: that of these labels.
    """
    return aligned_loss(logits[:, :-1], labels[:, 1:], num_items)


def aligned_loss(logits: Tensor, targets: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """As `next_token_loss`, but position t is scored on target t."""
    targets = targets.flatten().to(logits.device)
    total = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum")
    if num_items is None:
        num_items = (targets != IGNORED).sum().clamp(min=1)
    return total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)


class PositionLimit(StoppingCriteria):
    """Ends a generation at `length` tokens, where the position table ends, with a warning."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs) -> Tensor:
        full = input_ids.shape[1] >= self.length
        if full:
            warnings.warn("generation stops: max_position_embeddings is reached", stacklevel=2)
        return torch.full((len(input_ids),), full, device=input_ids.device)


def either_cache(past_key_values: Any, cache: Any) -> Any:
    """The cache, which has two names. Raises TypeError if both are given, or if the value is not a cache."""
    if past_key_values is not None and cache is not None:
        raise TypeError("pass either cache or past_key_values: they are two names of one argument")
    cache = past_key_values if cache is None else cache
    if not isinstance(cache, Cache | PagedAttentionCache | None):
        raise TypeError(f"cache has type {type(cache).__name__}: pass a transformers Cache, such as DynamicCache()")
    return cache


class CustomLLMPreTrainedModel(PreTrainedModel):
    """The base class of the models of this file.

    Args:
        config: a `CustomLLMConfig`, or any object whose `to_dict()` has its fields.
    """

    config_class = CustomLLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _input_embed_layer = "token_embeddings"
    _no_split_modules: ClassVar = ["DecoderLayer"]
    _skip_keys_device_placement: ClassVar = [*CACHE_NAMES]
    _keep_in_fp32_modules: ClassVar = ["router"]  # in float16; and no quantizer takes it
    _keep_in_fp32_modules_strict: ClassVar = {"routing_bias"}  # bfloat16 would lose updates of 1e-3
    _keys_to_ignore_on_load_missing: ClassVar = [r"\.routing_bias$"]  # it is then zero

    def __init__(self, config: Any):
        if not isinstance(config, PretrainedConfig):
            config = CustomLLMConfig(**config.to_dict())
        if config._attn_implementation is None:
            config._attn_implementation = "eager"  # the reference; transformers would choose sdpa
        super().__init__(config)

    def save_pretrained(self, save_directory: str | PathLike, *, is_main_process: bool = True, **kwargs) -> None:
        """Write config.json, safetensors and this file, so that the Auto classes can load the folder anywhere."""
        name = CODE_FILE.removesuffix(".py")
        self.config.auto_map = {auto: f"{name}.{own}" for auto, own in AUTO_CLASSES.items()}
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            code = Path(__file__).read_text(encoding="utf-8")
            Path(save_directory, CODE_FILE).write_text(code, encoding="utf-8")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # while transformers loads a file, nn.init does not change the loaded weights
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]
        elif isinstance(module, CustomRMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, DeepSeekMoE):
            nn.init.zeros_(module.routing_bias)


class CustomLLMModel(CustomLLMPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: Any):
        super().__init__(config)
        shape: Any = self.config
        D = shape.hidden_size
        self.token_embeddings = nn.Embedding(shape.vocab_size, D)
        self.position_embeddings = nn.Embedding(shape.max_position_embeddings, D)
        self.dropout = nn.Dropout(shape.dropout)
        layers = (DecoderLayer(shape, i) for i in range(shape.num_hidden_layers))
        self.decoder_layers = nn.ModuleList(layers)
        if shape.final_norm:
            self.final_norm = CustomRMSNorm(D, shape.rms_norm_eps)
        if type(self) is CustomLLMModel:
            self.post_init()

    def run_layers(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> CustomLLMModelOutput:
        """The input of lm_head, (B, T, D), after any final norm.

        Args:
            input_ids: (B, T) int.
            attention_mask: (B, S), zero at padding, S = cached tokens + T; or (1|B, 1|H, T, S), boolean or added to the
                scores; None: no padding.
            position_ids: (B|1, T); None: counted without padding. Without a mask and a cache, a document begins
                wherever a position is not the one before it plus 1, and no token attends to another document.
            past_key_values: the keys and values of earlier tokens; extended in place. `cache` is another name of it, by
                which `generate_batch` passes its paged cache.
            inputs_embeds: (B, T, D) in place of the embeddings of `input_ids`.
            use_cache: return keys and values, in a new `DynamicCache` if none is given; None: as the config says, but
                not in training.
            kwargs: `cache`, the fields of `LayerOptions`, and arguments of the attention function.

        Raises:
            ValueError: a position is not in the position table, the mask does not fit, or there are not exactly one of
                `input_ids` and `inputs_embeds`.
            TypeError: the cache is given twice or has another type, or the attention function does not use an argument.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        options = LayerOptions(**{name: kwargs.pop(name) for name in LayerOptions._fields if name in kwargs})
        cache: Any = either_cache(past_key_values, kwargs.pop("cache", None))
        paged = isinstance(cache, PagedAttentionCache)  # it brings a mask and positions
        self._check_arguments(cache, kwargs, position_ids)
        config: Any = self.config
        tokens: Any = self.token_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        length, past = tokens.shape[1], 0 if cache is None or paged else cache.get_seq_length()
        positions = position_ids
        if positions is None:
            positions = self._positions(past, length, attention_mask, tokens.device)
        if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):  # where values are not available
            self._check_mask(past, length, attention_mask)
            if position_ids is not None or past + length > config.max_position_embeddings:
                self._check_positions(positions)
        mask = causal_mask(config, tokens, attention_mask, None if paged else cache, position_ids)
        if use_cache is None:
            use_cache = config.use_cache and not self.training and not torch.compiler.is_exporting()
        if use_cache and cache is None:
            cache = DynamicCache(config=config)
        hidden, attention = options.output_hidden_states, options.output_attentions
        hidden = config.output_hidden_states if hidden is None else hidden
        kwargs["output_attentions"] = config.output_attentions if attention is None else attention
        kwargs["cache" if paged else CACHE] = cache

        x = self.dropout(tokens + self.position_embeddings(positions))
        hidden_states, routings, attentions = [x], [], []
        for i, layer in enumerate(self.decoder_layers):
            forced = None if options.expert_indices is None else options.expert_indices[i]
            x, routing, weights = layer(x, positions, mask, forced, **kwargs)
            if hidden:
                hidden_states.append(x)
            if kwargs["output_attentions"]:
                attentions.append(weights)
            if options.output_router:
                routings.append(Routing(*(part.unflatten(0, tokens.shape[:2]) for part in routing)))
        last = options.logits_to_keep
        x = x[:, slice(-last, None) if isinstance(last, int) else last]
        held: dict[str, Any] = {CACHE: cache}
        return CustomLLMModelOutput(
            last_hidden_state=self.final_norm(x) if config.final_norm else x,
            **held,
            hidden_states=tuple(hidden_states) if hidden else None,
            attentions=tuple(attentions) or None,
            router_experts=tuple(routing.experts for routing in routings) or None,
            router_scores=tuple(routing.scores for routing in routings) or None,
            router_logits=tuple(routing.logits for routing in routings) or None,
        )

    forward = can_return_tuple(run_layers)

    def _check_arguments(self, cache: Any, kwargs: dict[str, Any], position_ids: Tensor | None) -> None:
        attention = str(self.config._attn_implementation)
        if isinstance(cache, PagedAttentionCache):
            # since 5.24 the layer fills the pages, before that the attention function
            taken = inspect.signature(
                ALL_ATTENTION_FUNCTIONS.get_interface(attention, eager_attention_forward)
            ).parameters
            if not (CACHE == "cache" or "cache" in taken or attention.startswith("paged|")):
                raise TypeError(f"attn_implementation={attention!r} does not read a paged cache: call generate_batch")
            return
        given = [name for name, value in kwargs.items() if value is not None]
        if position_ids is not None:
            given = [name for name in given if name not in PACKING]
        if given and attention in ("eager", "sdpa", "flex_attention"):
            raise TypeError(
                f"{type(self).__name__} does not use {', '.join(given)}"
                + (": pass position_ids to pack documents" if PACKING & set(given) else "")
            )

    def _check_positions(self, positions: Tensor) -> None:
        limit, last = self.config.max_position_embeddings, int(positions.max())
        if last >= limit:
            raise ValueError(
                f"the sequence has {last + 1} tokens: it must have at most max_position_embeddings = {limit}"
            )

    @staticmethod
    def _check_mask(past: int | Tensor, length: int, mask: Any) -> None:
        fits = not isinstance(mask, Tensor) or mask.dim() == 4 or (mask.dim() == 2 and mask.shape[1] == past + length)
        if not fits:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}: it must be (batch, {int(past + length)}), "
                "one column for each cached and each new token, or have four axes"
            )

    @staticmethod
    def _positions(past: int | Tensor, length: int, attention_mask: Any, device: torch.device) -> Tensor:
        """(B|1, T): the number of tokens before each of the last T, without padding."""
        slots = torch.arange(length, device=device) + past
        if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
            return slots[None]
        counted = attention_mask.bool().cumsum(dim=-1, dtype=torch.int32) - 1
        return counted.clamp(min=0)[:, slots]


class CustomLLM(CustomLLMModel, GenerationMixin):
    """Decoder-only language model with Multi-head Latent Attention and DeepSeekMoE.

    It has the modules of its backbone as its own, so that the printed tree and the keys are those of the source.
    """

    accepts_loss_kwargs = True  # for the Trainer: the loss uses num_items_in_batch
    _tp_plan: ClassVar = TP_PLAN | {"lm_head": "colwise_gather_output"}
    _fsdp_plan: ClassVar = FSDP_PLAN | {"lm_head": "keep_full_weight"}

    def __init__(self, config: Any):
        super().__init__(config)
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=True)
        self.loss_type = "ForCausalLM"  # else the Trainer counts first labels, which are not targets
        self.post_init()

    @property
    def model(self) -> CustomLLMModel:
        """The backbone, for clients that run it without the head: a new object of the same modules."""
        backbone = CustomLLMModel.__new__(CustomLLMModel)
        nn.Module.__init__(backbone)
        backbone.config, backbone.training = self.config, self.training
        backbone._modules.update({name: module for name, module in self._modules.items() if name != "lm_head"})
        return backbone

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> CustomLLMOutput:
        """Logits of the next token.

        Args:
            labels: (B, T), not shifted: the model shifts them. -100 is ignored.
            num_items_in_batch: the number of targets to divide the summed loss by; None: that of `labels`.
            shift_labels: (B, T), in place of `labels`: already shifted, as where a sequence is cut among devices.
            others: as in `CustomLLMModel.run_layers`.

        Returns:
            `CustomLLMOutput`; its logits are (B, T, V) float32 (float64 in a float64 model).
        """
        # if the signature named it, the Trainer would expect it in every batch
        shift_labels = kwargs.pop("shift_labels", None)
        cache = either_cache(past_key_values, cache)
        out = self.run_layers(
            input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache,
            logits_to_keep=logits_to_keep, **kwargs,
        )  # fmt: skip
        logits = self.lm_head(out.last_hidden_state)
        logits = logits.to(at_least_float32(logits.dtype))
        loss = None
        if shift_labels is not None:
            loss = aligned_loss(logits, shift_labels, num_items_in_batch)
        elif labels is not None:
            loss = next_token_loss(logits, labels, num_items_in_batch)
        others = {name: value for name, value in out.items() if name != "last_hidden_state"}
        return CustomLLMOutput(loss=loss, logits=logits, **others)

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # pyright: ignore[reportAttributeAccessIssue]
    def prepare_inputs_for_generation(self, *args, tokenizer: Any = None, assistant_tokenizer: Any = None, **kwargs):
        """transformers', without what `generate` was given for `stop_strings`: it would pass that on to `forward`.

        The cache goes on by its first name: by that alone PEFT knows whether its virtual tokens are in it.
        """
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        return {"past_key_values": inputs.pop("cache"), **inputs} if "cache" in inputs else inputs

    @functools.wraps(GenerationMixin.generate)  # pyright: ignore[reportAttributeAccessIssue]
    def generate(
        self, *args, stopping_criteria: Any = None, past_key_values: Any = None, cache: Any = None, **kwargs
    ) -> Any:
        """transformers'; it ends where the position table does, with a warning and what there is."""
        cache = either_cache(past_key_values, cache)
        if cache is not None:
            kwargs[CACHE] = cache
        mask, embeds = kwargs.get("attention_mask"), kwargs.get("inputs_embeds")
        length = self.config.max_position_embeddings
        if isinstance(mask, Tensor) and mask.dim() == 2:
            length += int((mask == 0).sum(dim=-1).min())
        if embeds is not None and not args and kwargs.get("input_ids") is None:
            length -= embeds.shape[1]  # only the new tokens are counted
        criteria = StoppingCriteriaList([*(stopping_criteria or ()), PositionLimit(length)])
        return super().generate(*args, stopping_criteria=criteria, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]


class CustomLLMForSequenceClassification(GenericForSequenceClassification, CustomLLMPreTrainedModel):
    accepts_loss_kwargs = False  # for the Trainer: the loss is a mean, and num_items_in_batch would go to the backbone


class CustomLLMForTokenClassification(GenericForTokenClassification, CustomLLMPreTrainedModel):
    accepts_loss_kwargs = False


AutoModel.register(CustomLLMConfig, CustomLLMModel, exist_ok=True)  # the last two build their backbone by it
