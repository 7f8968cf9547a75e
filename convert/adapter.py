"""Adapters as PEFT has them, `adapter_config.json` and `adapter_model.safetensors`, by the table of `convert.mapping`.

Each matrix of the table that has an adapter here has one there, by the same name. A and B are transposed, and joined as
the matrix is. The routed experts of the DeepSeek family are in one tensor in transformers' classes: PEFT adapts such a
tensor, by its `target_parameters`, with the experts one below the other in A and interleaved in B:

    lora_A   (E*r, in)     row e*r + j of expert e
    lora_B   (out, r*E)    column j*E + e
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save

from convert.mapping import PARAMS, Entry, Part, Pytree, entries, has_leaf, leaf
from convert.tensor_files import TensorFiles
from jaxllm.config import LoraConfig, ModelConfig
from jaxllm.config.joined import joined_linears
from jaxllm.errors import UserError
from jaxllm.files import StrPath, write_json
from jaxllm.model.dtypes import check_floats
from jaxllm.store.adapter_folder import ADAPTER_WEIGHTS
from jaxllm.store.folder import ADAPTER_CONFIG

PREFIX = "base_model.model."
"""Of the names in a file of PEFT."""

_LAYER = re.compile(r"(?:model\.layers|decoder_layers)\.\d+\.")
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


class StackedFactor(NamedTuple):
    """A or B of a tensor of all experts of a layer."""

    torch_name: str
    paths: tuple[tuple[str, ...], ...]
    """Of the Flax leaves (L,E,in,r), or (L,E,r,out) side by side."""
    layer: int

    def to_torch(self, trees: dict[str, Pytree]) -> np.ndarray:
        stacked = [np.asarray(leaf(trees[PARAMS], path))[self.layer] for path in self.paths]
        if self.paths[0][-1] == "a":
            experts, features, rank = stacked[0].shape
            return stacked[0].swapaxes(1, 2).reshape(experts * rank, features)
        joined = np.concatenate(stacked, axis=2)  # (E,r,out)
        return joined.transpose(2, 1, 0).reshape(joined.shape[2], -1)

    def write(self, trees: dict[str, Pytree], tensor: np.ndarray) -> None:
        """The inverse of `to_torch`."""
        leaves = [leaf(trees[PARAMS], path) for path in self.paths]
        experts, rank = leaves[0].shape[1], leaves[0].shape[3 if self.paths[0][-1] == "a" else 2]
        if self.paths[0][-1] == "a":
            leaves[0][self.layer] = tensor.reshape(experts, rank, -1).swapaxes(1, 2)
            return
        joined = tensor.reshape(-1, rank, experts).transpose(2, 1, 0)
        for target, part in zip(leaves, np.split(joined, len(leaves), axis=2), strict=True):
            target[self.layer] = part

    def shape(self, trees: dict[str, Pytree]) -> tuple[int, ...]:
        shapes = [leaf(trees[PARAMS], path).shape[1:] for path in self.paths]
        (experts, rows, columns), width = shapes[0], sum(shape[2] for shape in shapes)
        return (experts * columns, rows) if self.paths[0][-1] == "a" else (width, rows * experts)


class Adapted(NamedTuple):
    """An adapter's two tensors, and how PEFT is told which matrix it belongs to."""

    a: Entry | StackedFactor
    b: Entry | StackedFactor
    target: str
    """The name of the module within a layer, or of the parameter."""
    is_parameter: bool


def adapted(config: ModelConfig, params: Pytree, interleaved: bool = True) -> Iterator[Adapted]:
    """The adapters of a model, in the order of PyTorch's state_dict.

    Args:
        params: those of a model with adapters, arrays or shapes.
        interleaved: as in `convert.mapping.entries`.
    """
    stacked = joined_linears(config).experts
    for entry in entries(config, interleaved):
        path = entry.parts[0].path[:-1]
        if not has_leaf(params, (*path, "adapter", "b")):
            continue
        match = _EXPERT.fullmatch(entry.torch_name) if stacked else None
        if match is None:
            name = entry.torch_name.removesuffix(".weight")
            module = _LAYER.sub("", name)
            # PEFT 0.21 takes the modules by these names for experts of transformers 4, where a class stacks experts
            of_experts = (
                bool(stacked) and name.endswith(("gate_proj", "up_proj", "down_proj")) and config.moe_layers > 0
            )
            a, b = (_factor(entry, params, kind, f"{PREFIX}{name}") for kind in ("a", "b"))
            yield Adapted(a, b, f"{module}.weight" if of_experts else module, of_experts)
        elif match[2] == "0" and match[3] != "up_proj":
            names = stacked if match[3] in stacked else (match[3],)
            # PEFT wraps the module once for each parameter: the first is inside
            inside = f"{PREFIX}{match[1]}{'.base_layer' if match[3] in stacked else ''}"
            paths = [(*path[:-1], linear, "adapter") for linear in names]
            layer = entry.parts[0].index[0]
            a = StackedFactor(f"{inside}.lora_A.weight", ((*paths[0], "a"),), layer)
            b = StackedFactor(f"{inside}.lora_B.weight", tuple((*one, "b") for one in paths), layer)
            parameter = "gate_up_proj" if match[3] in stacked else match[3]
            yield Adapted(a, b, f"{_LAYER.sub('', match[1])}.{parameter}", True)


def _factor(entry: Entry, params: Pytree, kind: str, name: str) -> Entry:
    """A or B of a matrix: of those of its parts that have their own, in the places that they have in the matrix."""
    found: dict[Any, Part] = {}
    for part in entry.parts:
        path = (*part.path[:-1], "adapter", kind)
        if has_leaf(params, path):
            index = part.index[: len(leaf(params, path).shape) - 2]
            found.setdefault((path, index), part._replace(path=path, index=index))
    parts = tuple(found.values())
    if len(parts) == 1:
        parts = (parts[0]._replace(where=slice(None)),)
    torch_name = f"{name}.lora_{kind.upper()}.weight"
    return Entry(torch_name, parts, transposed=True, axis=1 if kind == "a" else 0)


def write_adapter(
    out: StrPath,
    config: ModelConfig,
    lora: LoraConfig,
    params: Pytree,
    base: str,
    interleaved: bool = True,
    revision: str | None = None,
) -> None:
    """Write a folder that `PeftModel.from_pretrained(model, out)` reads.

    Args:
        params: those of a model with adapters; they are written in float32.
        base: the folder or Hub name of the base model, for `AutoPeftModelForCausalLM`.
        revision: the commit of the base on the Hub.

    Raises:
        UserError: a value is not a finite number.
    """
    out, trees = Path(out), {PARAMS: params}
    out.mkdir(parents=True, exist_ok=True)
    found = list(adapted(config, params, interleaved))
    tensors = {}
    for factor in (factor for adapter in found for factor in (adapter.a, adapter.b)):
        values = factor.to_torch(trees)
        check_floats(factor.torch_name, values)
        tensors[factor.torch_name] = np.ascontiguousarray(values, np.float32)
    (out / ADAPTER_WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    alpha = lora.resolved_alpha
    values = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "revision": revision,
        "inference_mode": True,
        "r": lora.rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "use_rslora": lora.rslora,
        "target_modules": sorted({one.target for one in found if not one.is_parameter}),
        "target_parameters": sorted({one.target for one in found if one.is_parameter}) or None,
        "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True, "lora_dropout": 0.0,
        "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}, "use_dora": False,
    }  # fmt: skip
    write_json(out / ADAPTER_CONFIG, values)  # last: it makes the folder an adapter


def read_adapter(folder: StrPath, config: ModelConfig, params: Pytree, interleaved: bool = True) -> Pytree:
    """The adapters of a folder of PEFT as a pytree of float32 arrays.

    Args:
        params: shapes of those of the model: all of them must be in the folder, and nothing else.

    Raises:
        UserError: tensors are missing, unknown, of another shape, or not finite.
    """
    file = Path(folder) / ADAPTER_WEIGHTS
    arrays: dict[str, Pytree] = {PARAMS: _zeros(params)}
    factors = {f.torch_name: f for adapter in adapted(config, params, interleaved) for f in (adapter.a, adapter.b)}
    with TensorFiles(file, files={file: set()}) as files:
        wanted = {name: factor.shape({PARAMS: params}) for name, factor in factors.items()}
        if wrong := files.misfits(wanted):
            raise UserError(
                f"{file} is not the adapter of this model and these --lora-rank and --lora-targets, leave them out to "
                f"take the adapter's; {wrong}"
            )
        for name, factor in factors.items():
            values = np.asarray(files.read(name))
            check_floats(f"{file}: {name}", values)
            factor.write(arrays, values.astype(np.float32))
    return arrays[PARAMS]


def _zeros(params: Pytree) -> Pytree:
    if isinstance(params, Mapping):
        return {name: _zeros(part) for name, part in params.items()}
    return np.zeros(params.shape, np.float32)
