"""Which kernels run where: the one place that chooses. Every choice was measured, or read in the compiled program.

                              experts                          attention
    NVIDIA GPU, bfloat16      Triton grouped product           cuDNN's fused kernel (an odd length: blocks)
    NVIDIA GPU, float32       Triton grouped product           blocks of queries
    anything else             loops over groups with rows      blocks of queries

Rejected: `jax.lax.ragged_dot` is a dense product over all experts on the CPU (five times the time) and on an H100;
loops with dynamic trip counts wait for the host on a GPU. A TPU takes the last line: correct, and not tuned.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxllm.config import LoraConfig, ModelConfig
from jaxllm.model.dtypes import Array, DTypeLike
from jaxllm.model.kernels import grouped_adapted, grouped_loop, grouped_triton, grouped_whole, packed
from jaxllm.model.kernels.causal_attention import blocked_attention, cudnn_attention
from jaxllm.model.kernels.interface import ExpertKernels

CUDA, ANY = "cuda", "any"
"""Platforms: an NVIDIA GPU of the Ampere generation or newer, and every other device."""


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
    if jax.default_backend() != "gpu":
        return ANY
    capability = str(jax.devices()[0].compute_capability)  # "9.0"; ROCm's is "gfx942"
    return CUDA if capability[:1].isdigit() and float(capability) >= 8 else ANY


def choose_kernels(
    config: ModelConfig,
    dtype: DTypeLike,
    platform: str | None = None,
    *,
    remat: bool = False,
    lora: LoraConfig | None = None,
) -> Kernels:
    """The kernels of a model with this config, whose dimensions decide whether a kernel applies, and compute dtype.

    Args:
        platform: CUDA or ANY (else ValueError), to compile for a device that you do not have; None: the platform here.
        remat: whether the layers are computed again in the backward pass.
        lora: the model's adapters. Shared experts that have some are computed by `linear`.
    """
    platform = platform_here() if platform is None else platform
    if platform not in (CUDA, ANY):
        raise ValueError(f"platform is {platform!r}: it must be {CUDA!r} or {ANY!r}")
    dtype, on_cuda = jnp.dtype(dtype), platform == CUDA
    tiled = grouped_triton.applies(config.hidden_size, config.moe_intermediate_size)
    triton = on_cuda and dtype in (jnp.bfloat16, jnp.float32) and tiled
    h = config.qk_head_dim
    cudnn = on_cuda and dtype == jnp.bfloat16 and h == config.value_head_dim and h % 8 == 0 and h <= 128
    on_triton = grouped_adapted.KERNELS if lora and lora.adapts("experts") else grouped_triton.KERNELS
    return Kernels(
        routed=on_triton if triton else dataclasses.replace(grouped_loop.KERNELS, recomputes=remat),
        shared=grouped_whole.KERNELS if triton and not (lora and lora.adapts("shared")) else None,
        attention=cudnn_attention if cudnn else blocked_attention,
        packs=packed.NEEDED and dtype == jnp.bfloat16 and not on_cuda,
    )


def describe_kernels(config: ModelConfig, dtype: DTypeLike, platform: str | None = None) -> str:
    """A description of the choice, for a line at start-up."""
    chosen = choose_kernels(config, dtype, platform)
    experts = "Triton grouped product" if chosen.routed == grouped_triton.KERNELS else "loops over groups with rows"
    attention = "cuDNN fused kernel" if chosen.attention is cudnn_attention else "blocks of queries"
    return f"experts: {experts}; attention: {attention} ({jnp.dtype(dtype).name})"
