"""Which kernels run where: the one place that chooses. Every choice was measured, or read in the compiled program.

                              experts                          attention
    NVIDIA GPU, bfloat16      Triton grouped product           cuDNN's fused kernel, for heads that it takes
                                                               (an odd length: blocks)
    NVIDIA GPU, float32       Triton grouped product           blocks of queries
    anything else             loop over experts with tokens    blocks of queries

Rejected: `jax.lax.ragged_dot` is a dense product over all experts on the CPU (five times the time) and on an H100;
loops with dynamic trip counts wait for the host on a GPU. A TPU takes the last line: correct, and not tuned.
The last line is the plain form of every kernel: `self_check` finds out which kernels a device must do without.
"""

import dataclasses
from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp

from jaxllm.config import LoraConfig, ModelConfig
from jaxllm.model.dtypes import Array, DTypeLike
from jaxllm.model.kernels import grouped_adapted, grouped_loop, grouped_triton, grouped_whole, packed
from jaxllm.model.kernels.causal_attention import blocked_attention, cudnn_attention, cudnn_refuses
from jaxllm.model.kernels.interface import ExpertKernels

CUDA, ANY = "cuda", "any"
"""Platforms: an NVIDIA GPU of the Ampere generation or newer, and every other device."""


REPLACEABLE = ("routed", "shared", "attention")
"""The fields of `Kernels` that have a plain form too, which runs on any device."""


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The kernels of one model; static and hashable. `CustomLLM` chooses them and hands them down."""

    routed: ExpertKernels
    """Of the routed experts."""
    shared: ExpertKernels | None
    """Of the shared experts, if they fuse SwiGLU; None: `linear`, under autodiff.

    With fused kernels all layers save SwiGLU's arguments in one array, in place. Elsewhere each layer's are copied into
    such an array and out of it; on a CPU that is little next to the weights."""
    attention: Callable[[Array, Array, Array, Array | None, float], Array]
    """q, k (B,T,H,h), v (B,T,H,v), the attention mask (B,T) or None, and the scale of the scores -> (B,T,H,v)."""
    packs: bool
    """Whether the loop over the layers packs what it slices: see `packed`."""

    @property
    def experts(self) -> dict[str, ExpertKernels]:
        """The kernels that read experts in place, by the attribute of `DeepSeekMoE`."""
        every = {"routed_experts": self.routed, "shared_experts": self.shared}
        return {name: kernels for name, kernels in every.items() if kernels is not None}


def platform_here() -> str:
    """The platform that JAX computes on by default."""
    return CUDA if compute_capability() >= 8 else ANY


def compute_capability() -> float:
    """Of the NVIDIA GPU that JAX computes on by default; 0: it is another device."""
    if jax.default_backend() != "gpu":
        return 0.0
    capability = str(jax.devices()[0].compute_capability)  # "9.0"; ROCm's is "gfx942"
    return float(capability) if capability[:1].isdigit() else 0.0


def choose_kernels(
    config: ModelConfig,
    dtype: DTypeLike,
    platform: str | None = None,
    *,
    remat: bool = False,
    lora: LoraConfig | None = None,
    without: Collection[str] = (),
) -> Kernels:
    """The kernels of a model with this config, whose dimensions decide whether a kernel applies, and compute dtype.

    Args:
        platform: CUDA or ANY (else ValueError), to compile for a device that you do not have; None: the platform here.
        remat: whether the layers are computed again in the backward pass.
        lora: the model's adapters. Shared experts that have some are computed by `linear`.
        without: of REPLACEABLE, which have their plain form.
    """
    platform = platform_here() if platform is None else platform
    if platform not in (CUDA, ANY):
        raise ValueError(f"platform is {platform!r}: it must be {CUDA!r} or {ANY!r}")
    dtype, on_cuda = jnp.dtype(dtype), platform == CUDA
    tiled = grouped_triton.applies(config.hidden_size, config.moe_intermediate_size)
    triton = on_cuda and dtype in (jnp.bfloat16, jnp.float32) and tiled
    loops = dataclasses.replace(grouped_loop.KERNELS, recomputes=remat)
    on_triton = grouped_adapted.KERNELS if lora and lora.adapts("experts") else grouped_triton.KERNELS
    fused_shared = triton and "shared" not in without and not (lora and lora.adapts("shared"))
    cudnn = on_cuda and dtype == jnp.bfloat16 and _cudnn_refuses(config) is None
    return Kernels(
        routed=on_triton if triton and "routed" not in without else loops,
        shared=grouped_whole.KERNELS if fused_shared else None,
        attention=cudnn_attention if cudnn and "attention" not in without else blocked_attention,
        packs=packed.NEEDED and dtype == jnp.bfloat16 and not on_cuda,
    )


def _cudnn_refuses(config: ModelConfig) -> str | None:
    return cudnn_refuses(config.qk_head_dim, config.value_head_dim, compute_capability())


def describe_kernels(
    config: ModelConfig,
    dtype: DTypeLike,
    platform: str | None = None,
    *,
    lora: LoraConfig | None = None,
    without: Collection[str] = (),
) -> str:
    """A description of the choice, for a line at start-up; arguments as in `choose_kernels`."""
    chosen, dtype = choose_kernels(config, dtype, platform, lora=lora, without=without), jnp.dtype(dtype)
    on_triton = chosen.routed in (grouped_triton.KERNELS, grouped_adapted.KERNELS)
    experts = "Triton grouped product" if on_triton else "loop over the experts that have tokens"
    shared = ", shared experts: plain products" if on_triton and not chosen.shared else ""
    attention = "cuDNN fused kernel" if chosen.attention is cudnn_attention else "blocks of queries"
    on_cuda = (platform_here() if platform is None else platform) == CUDA
    if on_cuda and dtype == jnp.bfloat16 and (reason := _cudnn_refuses(config)):
        attention += f", since {reason}"
    return f"experts: {experts}{shared}; attention: {attention} ({dtype.name})"
