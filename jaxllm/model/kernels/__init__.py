"""Which kernels run where: the one place that chooses. Every choice was measured, or read in the compiled program.

                              experts                          attention
    NVIDIA GPU, bfloat16      Triton grouped product           cuDNN's fused kernel (padded batches: blocks)
    NVIDIA GPU, float32       Triton grouped product           blocks of queries
    anything else             loops over groups with rows      blocks of queries

Rejected: `jax.lax.ragged_dot` is a dense product over all experts on the CPU (five times the time) and on an H100;
loops with dynamic trip counts wait for the host on a GPU. A TPU takes the last line: correct, and not tuned.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import jax
import jax.numpy as jnp

from jaxllm.config import ModelConfig
from jaxllm.model.dtypes import Array
from jaxllm.model.kernels import grouped_loop, grouped_triton, grouped_whole
from jaxllm.model.kernels.causal_attention import blocked_attention, cudnn_attention

CUDA, ANY = "cuda", "any"
"""Platforms: an NVIDIA GPU of the Ampere generation or newer, and every other device."""


@dataclass(frozen=True)
class Kernels:
    """The kernels of one model; static and hashable."""

    grouped: ModuleType
    """A module with `ffn` and `ffn_gradients` of the experts, `padding`, `prepared`, `new_kept` and `new_gradient`."""
    attention: Callable[[Array, Array, Array, Array | None, float], Array]
    """q, k (B,T,H,h), v (B,T,H,v), the attention mask (B,T) or None, and the scale of the scores -> (B,T,H,v)."""
    packs: bool
    """Whether what a loop over the layers slices is packed: see `packed`."""
    shared: ModuleType | None
    """A module with `ffn` and `ffn_gradients` of a shared expert, if they fuse SwiGLU; None: `linear`.

    If they do, all layers keep SwiGLU's arguments in one stack. Elsewhere autodiff copies each layer's into a stack and
    out of it. On a CPU that is little next to the weights; and packed numbers are integers, which have no cotangent."""

    def __reduce__(self):  # to copy and pickle a model: a module is found by its name
        modules = [module and module.__name__ for module in (self.grouped, self.shared)]
        return _kernels, (*modules, self.attention, self.packs)


def _kernels(grouped: str, shared: str | None, attention: Callable, packs: bool) -> Kernels:
    return Kernels(
        grouped=importlib.import_module(grouped),
        attention=attention,
        packs=packs,
        shared=None if shared is None else importlib.import_module(shared),
    )


def platform_here() -> str:
    """The platform that JAX computes on by default."""
    if jax.default_backend() != "gpu":
        return ANY
    capability = str(jax.devices()[0].compute_capability)  # "9.0"; ROCm's is "gfx942"
    return CUDA if capability[:1].isdigit() and float(capability) >= 8 else ANY


def choose_kernels(config: ModelConfig, dtype: jnp.dtype, platform: str | None = None) -> Kernels:
    """The kernels of a model with this config, whose dimensions decide whether a kernel applies, and compute dtype.

    `platform` is CUDA or ANY (else ValueError), to compile for a device that is not here; None: the platform here.
    """
    platform = platform_here() if platform is None else platform
    if platform not in (CUDA, ANY):
        raise ValueError(f"platform is {platform!r}: it must be {CUDA!r} or {ANY!r}")
    dtype, on_cuda = jnp.dtype(dtype), platform == CUDA
    tiled = grouped_triton.applies(config.hidden_size, config.moe_intermediate_size)
    triton = on_cuda and dtype in (jnp.bfloat16, jnp.float32) and tiled
    h = config.qk_head_dim
    cudnn = on_cuda and dtype == jnp.bfloat16 and h == config.value_head_dim and h % 8 == 0 and h <= 128
    return Kernels(
        grouped=grouped_triton if triton else grouped_loop,
        attention=cudnn_attention if cudnn else blocked_attention,
        packs=dtype == jnp.bfloat16 and not on_cuda,
        shared=grouped_whole if triton else None,
    )


def describe_kernels(config: ModelConfig, dtype: jnp.dtype, platform: str | None = None) -> str:
    """A description of the choice, for a line at start-up."""
    chosen = choose_kernels(config, dtype, platform)
    experts = {grouped_triton: "Triton grouped product", grouped_loop: "loops over groups with rows"}
    attention: dict[Callable, str] = {cudnn_attention: "cuDNN fused kernel", blocked_attention: "blocks of queries"}
    return f"experts: {experts[chosen.grouped]}; attention: {attention[chosen.attention]} ({jnp.dtype(dtype).name})"
