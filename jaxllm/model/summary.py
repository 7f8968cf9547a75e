"""The module tree as PyTorch prints it, so that the two frameworks' trees can be compared line for line."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.config import ModelConfig
from jaxllm.model.decoder import CustomLLM
from jaxllm.model.kernels import Kernels
from jaxllm.model.layer import DecoderLayer
from jaxllm.model.layers import Embedding, Linear
from jaxllm.model.moe import DeepSeekExpertLayer


@functools.lru_cache(16)
def module_tree(config: ModelConfig) -> str:
    """The tree of a CustomLLM in the style of `print(torch_module)`; takes no memory."""
    lines: list[str] = []

    def render() -> None:
        model = CustomLLM(config, rngs=nnx.Rngs(0))
        lines.extend(_render(model, config, model.kernels))

    jax.eval_shape(render)
    return "\n".join(lines)


def _render(module: nnx.Module, config: ModelConfig, kernels: Kernels) -> list[str]:
    if isinstance(module, Embedding):
        return [f"Embedding({module.rows}, {module.features})"]
    if isinstance(module, Linear):
        bias = module.bias is not None
        return [f"Linear(in_features={module.in_features}, out_features={module.out_features}, bias={bias})"]
    if isinstance(module, nnx.Dropout):
        return [f"Dropout(p={module.rate}, inplace=False)"]
    # A stack has lost the order of its attributes, so one fresh element of it is rendered.
    stacks: dict[str, tuple[int, Callable[..., nnx.Module]]] = {
        "dense_layers": (config.dense_layers, functools.partial(DecoderLayer, config, True, kernels=kernels)),
        "decoder_layers": (config.moe_layers, functools.partial(DecoderLayer, config, False, kernels=kernels)),
        "shared_experts": (config.n_shared_experts, functools.partial(DeepSeekExpertLayer, config)),
        "routed_experts": (config.n_routed_experts, functools.partial(DeepSeekExpertLayer, config)),
    }
    lines: list[str] = []
    for name, child in vars(module).items():
        if name in stacks and child is not None:
            count, build = stacks[name]
            element = _render(build(dtype=jnp.float32, rngs=nnx.Rngs(0)), config, kernels)
            label = "(0): " if count == 1 else f"(0-{count - 1}): {count} x "
            lines += _indented(f"({name}): ", ["ModuleList(", *_indented(label, element), ")"])
        elif isinstance(child, nnx.Module):
            lines += _indented(f"({name}): ", _render(child, config, kernels))
    if isinstance(module, DeepSeekExpertLayer):
        lines += ["  (act_fn): SiLU()"]  # here it is part of the experts' one function
    name = type(module).__name__
    return [f"{name}(", *lines, ")"] if lines else [f"{name}()"]


def _indented(label: str, rendered: list[str]) -> list[str]:
    return ["  " + line for line in [label + rendered[0], *rendered[1:]]]
