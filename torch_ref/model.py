"""CustomLLM in PyTorch: a decoder with Multi-head Latent Attention and DeepSeekMoE, for CUDA, MPS and CPU.

A reference in plain eager code. It imports only torch and transformers, because exported folders contain a copy of it
as `modeling_customllm.py`. All shape comments use these axis letters:

    B batch        T time (queries)   S time (keys, cache slots)   N = B*T tokens
    D hidden       H heads            h head size                  n = r = h/2 (no position | rotary)
    R latent       F expert hidden    E routed experts             k experts of a token   M = N*k rows
    L layers       V vocabulary
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

IGNORED = -100  # the label of a position that is not a target
CODE_FILE = "modeling_customllm.py"  # the name of this file in an exported folder
COUNTS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "moe_intermediate_size",
    "compression_ratio", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "max_position_embeddings",
)  # fmt: skip


class CustomLLMConfig(PretrainedConfig):
    """The keys of a CustomLLM's config.json; the defaults are the preset `customllm-1b`.

    Raises ValueError for sizes that do not fit each other.
    """

    model_type = "customllm"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]  # the Trainer adds a list to it

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
class CustomLLMOutput(CausalLMOutputWithPast):
    """transformers' output; with `output_router=True` also the routing, one tensor for each layer."""

    router_experts: tuple[Tensor, ...] | None = None  # L times (B,T,k) int64
    router_scores: tuple[Tensor, ...] | None = None  # L times (B,T,E), without the bias
    router_logits: tuple[Tensor, ...] | None = None  # L times (B,T,E)


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


def causal_mask(length: int, past: int, attention_mask: Tensor | None, device: torch.device) -> Tensor:
    """(1|B, 1, T, S) booleans, S = past + T: a token attends to itself and to earlier tokens, but not to padding.

    Padding attends to itself, so that no softmax runs over an empty row.
    """
    slots = torch.arange(past + length, device=device)
    query = slots[past:, None]  # (T,1), the slot of each query
    causal = (slots <= query)[None, None]
    if attention_mask is None:
        return causal
    return (causal & attention_mask.bool()[:, None, None, :]) | (slots == query)


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last axis, zero where the mask is; in the dtype of the scores, at least float32."""
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=-1)


class MultiHeadLatentAttention(nn.Module):
    """Multi-head Latent Attention (DeepSeek-V2, arXiv:2405.04434, section 2.1), keys and values expanded.

    The cache holds full keys and values, keys after rotation.
    """

    def __init__(self, config: CustomLLMConfig, layer: int):
        super().__init__()
        D, H = config.hidden_size, config.num_attention_heads
        R, half = D // config.compression_ratio, D // H // 2
        self.heads, self.layer = H, layer
        self.kv_proj_d = nn.Linear(D, R, bias=False)
        self.q_proj_d = nn.Linear(D, R, bias=False)
        self.k_proj_u = nn.Linear(R, H * half, bias=False)
        self.v_proj_u = nn.Linear(R, D, bias=False)
        self.q_proj_u = nn.Linear(R, H * half, bias=False)
        self.rope_k = nn.Linear(D, H * half, bias=False)
        self.rope_q = nn.Linear(R, H * half, bias=False)
        self.o_proj = nn.Linear(D, D, bias=False)
        self.rotary_emb = RotaryEmbedding(half, config.rope_theta)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor, cache: Cache | None = None) -> Tensor:
        """(B,T,D), positions (B|1,T), mask (B|1,1,T,S) -> (B,T,D); the cache grows from S-T to S slots."""
        kv, q_latent = self.kv_proj_d(x), self.q_proj_d(x)  # (B,T,R)
        k_rope = self.rotary_emb(self._split(self.rope_k(x)), positions)
        q_rope = self.rotary_emb(self._split(self.rope_q(q_latent)), positions)
        k = torch.cat([self._split(self.k_proj_u(kv)), k_rope], dim=-1).transpose(1, 2)  # (B,H,T,h)
        q = torch.cat([self._split(self.q_proj_u(q_latent)), q_rope], dim=-1).transpose(1, 2)
        v = self._split(self.v_proj_u(kv)).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)  # (B,H,S,h)

        acc_dtype = at_least_float32(x.dtype)
        q = q * q.shape[-1] ** -0.5
        with no_autocast(x):  # the products of bfloat16 numbers are accumulated and kept in float32
            weights = masked_softmax(q.to(acc_dtype) @ k.to(acc_dtype).mT, mask)  # (B,H,T,S)
        context = weights.to(v.dtype) @ v  # (B,H,T,h)
        return self.o_proj(context.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:  # (B,T,H*d) -> (B,T,H,d)
        return x.unflatten(-1, (self.heads, -1))


class Routing(NamedTuple):
    experts: Tensor  # (N,k) int64, the chosen experts
    gates: Tensor  # (N,k), their weights, which sum to 1
    scores: Tensor  # (N,E), sigmoid scores without the bias
    logits: Tensor  # (N,E)


class Dispatch(NamedTuple):
    order: Tensor  # (M,): row i of the sorted rows is slot order[i] of the (N,k) slots, flattened
    inverse: Tensor  # (M,): slot j is in row inverse[j]
    group_sizes: list[int]  # E: rows of each expert


def route(
    x: Tensor, router_weight: Tensor, routing_bias: Tensor, experts_per_token: int, experts: Tensor | None = None
) -> Routing:
    """Choose experts by biased score, weight them by unbiased score, all in float32 (DeepSeek-V3, arXiv:2412.19437).

    Args:
        x, router_weight, routing_bias: (N,D), (E,D) and (E,).
        experts_per_token: k.
        experts: (N,k) experts to use instead of the k largest `scores + routing_bias` (ties: lowest index).
    """
    acc_dtype = at_least_float32(x.dtype)
    with no_autocast(x):
        logits = F.linear(x.to(acc_dtype), router_weight.to(acc_dtype))
    scores = logits.sigmoid()
    if experts is None:
        # a stable sort, because torch.topk does not specify the order of ties
        ranking = (scores.detach() + routing_bias.to(acc_dtype)).sort(dim=-1, descending=True, stable=True).indices
        experts = ranking[:, :experts_per_token]
    chosen = scores.gather(-1, experts)
    gates = chosen / (chosen.sum(dim=-1, keepdim=True) + 1e-20)
    return Routing(experts, gates, scores, logits)


def plan_dispatch(experts: Tensor, n_experts: int) -> Dispatch:
    """Sort the (N,k) slots by expert; tokens of one expert keep their order."""
    slots = experts.flatten()
    order = slots.argsort(stable=True)
    counts = (slots[:, None] == torch.arange(n_experts, device=slots.device)).sum(dim=0)
    return Dispatch(order, order.argsort(), counts.tolist())


def run_experts(tokens: Tensor, layers: nn.ModuleList, plan: Dispatch, experts_per_token: int) -> Tensor:
    """Run each expert on its tokens: (N,D) -> (M,D), rows sorted by expert. No token is dropped."""
    groups = tokens.index_select(0, plan.order // experts_per_token).split(plan.group_sizes)
    # In training, an expert without tokens runs on an empty batch: its gradients are then zero, not None, which
    # optimizers and DistributedDataParallel treat differently. A compiled or exported graph also runs all experts,
    # because it must serve every routing.
    keep_all = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return torch.cat([layer(rows) for layer, rows in zip(layers, groups, strict=True) if keep_all or len(rows)])


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


class DeepSeekMoE(nn.Module):
    """Shared experts for every token, k routed experts for each token (DeepSeekMoE, arXiv:2401.06066).

    `routing_bias` steers the choice. It is a buffer, not a parameter: no gradient and no weight decay.
    """

    routing_bias: Tensor  # (E,)

    def __init__(self, config: CustomLLMConfig):
        super().__init__()
        self.experts_per_token = config.num_experts_per_tok
        self.shared_experts = nn.ModuleList(DeepSeekExpertLayer(config) for _ in range(config.n_shared_experts))
        self.routed_experts = nn.ModuleList(DeepSeekExpertLayer(config) for _ in range(config.n_routed_experts))
        self.router = nn.Linear(config.hidden_size, config.n_routed_experts, bias=False)
        # never bfloat16, which may be the default dtype while transformers builds the model
        acc_dtype = at_least_float32(torch.get_default_dtype())
        self.register_buffer("routing_bias", torch.zeros(config.n_routed_experts, dtype=acc_dtype))

    def forward(self, x: Tensor, experts: Tensor | None = None) -> tuple[Tensor, Routing]:
        """(B,T,D) -> (B,T,D) and the routing of its N tokens; `experts` (B,T,k) replaces the choice."""
        tokens = x.flatten(0, 1)  # (N,D)
        experts = None if experts is None else experts.flatten(0, 1)
        routing = route(tokens, self.router.weight, self.routing_bias, self.experts_per_token, experts)
        plan = plan_dispatch(routing.experts, len(self.routed_experts))
        rows = run_experts(tokens, self.routed_experts, plan, routing.experts.shape[-1])
        out = sum(expert(tokens) for expert in self.shared_experts) + combine(rows, routing.gates, plan)
        return out.view_as(x), routing


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
        mask: Tensor,
        experts: Tensor | None = None,
        past_key_values: Cache | None = None,  # transformers finds it by name, and drops it when checkpointing
    ) -> tuple[Tensor, Routing]:  # (B,T,D) -> (B,T,D)
        x = x + self.self_attn(self.input_norm(x), positions, mask, past_key_values)
        mixed, routing = self.mlp(self.post_attn_norm(x), experts)
        return x + mixed, routing


def next_token_loss(logits: Tensor, labels: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Cross-entropy in nats. Only this function shifts the labels: position t is scored on label t+1.

    Args:
        logits: (B, T, V), float32 or float64.
        labels: (B, T); `IGNORED` is not a target.
        num_items: the number of targets to divide by, counted by the Trainer over all accumulated micro-batches;
            None: that of these labels.
    """
    targets = labels[:, 1:].flatten().to(logits.device)
    total = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum")
    if num_items is None:
        num_items = (targets != IGNORED).sum().clamp(min=1)
    return total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)


class CustomLLM(PreTrainedModel, GenerationMixin):
    """Decoder-only language model with Multi-head Latent Attention and DeepSeekMoE.

    Args:
        config: a `CustomLLMConfig`, or any object whose `to_dict()` has its fields.
    """

    config_class = CustomLLMConfig
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # for the Trainer: the loss uses num_items_in_batch
    _input_embed_layer = "token_embeddings"
    _no_split_modules: ClassVar = ["DecoderLayer"]
    _skip_keys_device_placement: ClassVar = ["past_key_values"]
    _keep_in_fp32_modules_strict: ClassVar = {"routing_bias"}  # bfloat16 would lose updates of 1e-3
    _keys_to_ignore_on_load_missing: ClassVar = [r"\.routing_bias$"]  # it is then zero

    def __init__(self, config: Any):
        shape: Any = config if isinstance(config, PretrainedConfig) else CustomLLMConfig(**config.to_dict())
        super().__init__(shape)
        D, V = shape.hidden_size, shape.vocab_size
        self.token_embeddings = nn.Embedding(V, D)
        self.position_embeddings = nn.Embedding(shape.max_position_embeddings, D)
        self.dropout = nn.Dropout(shape.dropout)
        self.decoder_layers = nn.ModuleList(DecoderLayer(shape, i) for i in range(shape.num_hidden_layers))
        if shape.final_norm:
            self.final_norm = CustomRMSNorm(D, shape.rms_norm_eps)
        self.lm_head = nn.Linear(D, V, bias=True)
        self.loss_type = "ForCausalLM"  # else the Trainer counts first labels, which are not targets
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        output_router: bool = False,
        expert_indices: Tensor | None = None,
    ) -> CustomLLMOutput:
        """Logits of the next token.

        Args:
            input_ids: (B, T) int.
            attention_mask: (B, S), zero at padding, S = cached tokens + T; None: no padding.
            position_ids: (B|1, T); None: counted without padding.
            past_key_values: the cached keys and values of earlier tokens; extended in place.
            labels: (B, T), not shifted: the model shifts them. -100 is ignored.
            use_cache: return keys and values, in a new `DynamicCache` if none is given.
            logits_to_keep: a number of last positions, or the positions, whose logits to return; 0: all.
            num_items_in_batch: the number of targets to divide the summed loss by; None: that of `labels`.
            output_hidden_states: return `hidden_states`, L+1 of (B,T,D): embeddings, then the residual stream after
                each layer, before any final norm.
            output_router: return `router_experts`, `router_scores` and `router_logits`.
            expert_indices: (L, B, T, k) experts to use instead of the routers' choice.

        Returns:
            `CustomLLMOutput`; its logits are (B, T, V) float32 (float64 in a float64 model).

        Raises:
            ValueError: the sequence is longer than the position table, or the mask does not fit it.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        length = input_ids.shape[1]
        self._check_lengths(past, length, attention_mask)
        if position_ids is None:
            position_ids = self._positions(past, length, attention_mask, input_ids.device)
        mask = causal_mask(length, past, attention_mask, input_ids.device)

        x = self.dropout(self.token_embeddings(input_ids) + self.position_embeddings(position_ids))
        hidden_states, routings = [x], []
        for i, layer in enumerate(self.decoder_layers):
            forced = None if expert_indices is None else expert_indices[i]
            x, routing = layer(x, position_ids, mask, forced, past_key_values=past_key_values)
            if output_hidden_states:
                hidden_states.append(x)
            if output_router:
                routings.append(Routing(*(part.unflatten(0, input_ids.shape) for part in routing)))

        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        last = self.final_norm(x[:, kept]) if self.config.final_norm else x[:, kept]
        logits = self.lm_head(last)
        logits = logits.to(at_least_float32(logits.dtype))
        return CustomLLMOutput(
            loss=None if labels is None else next_token_loss(logits, labels, num_items_in_batch),
            logits=logits,
            past_key_values=past_key_values,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            router_experts=tuple(routing.experts for routing in routings) if output_router else None,
            router_scores=tuple(routing.scores for routing in routings) if output_router else None,
            router_logits=tuple(routing.logits for routing in routings) if output_router else None,
        )

    def save_pretrained(self, save_directory: str | PathLike, *, is_main_process: bool = True, **kwargs) -> None:
        """Write config.json, safetensors and this file, so that the Auto classes can load the folder anywhere."""
        name = CODE_FILE.removesuffix(".py")
        self.config.auto_map = {"AutoConfig": f"{name}.CustomLLMConfig", "AutoModelForCausalLM": f"{name}.CustomLLM"}
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

    def _check_lengths(self, past: int, length: int, attention_mask: Tensor | None) -> None:
        limit = self.config.max_position_embeddings
        if past + length > limit:
            raise ValueError(
                f"the sequence has {past + length} tokens: it must have at most max_position_embeddings = {limit}"
            )
        if attention_mask is not None and (attention_mask.dim() != 2 or attention_mask.shape[1] != past + length):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}: it must be (batch, {past + length}), "
                "one column for each cached and each new token"
            )

    @staticmethod
    def _positions(past: int, length: int, attention_mask: Tensor | None, device: torch.device) -> Tensor:
        """(B|1, T): the number of tokens before each of the last T, without padding."""
        if attention_mask is None:
            return torch.arange(past, past + length, device=device)[None]
        counted = attention_mask.bool().cumsum(dim=-1, dtype=torch.int32) - 1
        return counted.clamp(min=0)[:, past:]
