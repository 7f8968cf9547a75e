"""PyTorch to Flax: read a folder of a known family, or a raw state_dict of the source's model, into Flax weights."""

import dataclasses
import itertools
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert import fp8
from convert.mapping import PARAMS, ROUTING_BIAS, entries
from convert.tensor_files import TensorFiles
from convert.to_torch import check_new
from jaxllm.config import ModelConfig
from jaxllm.config.families import is_interleaved, names_of
from jaxllm.errors import UserError, listed
from jaxllm.files import StrPath, read_json
from jaxllm.model.decoder import CustomLLM, abstract_model
from jaxllm.run.checkpoint import Weights
from jaxllm.run.checkpoint_writer import write_run
from jaxllm.run.prepare import GENERATION_CONFIG, SOURCE_CONFIG, read_model_config

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "chat_template.json", "tokenizer.model", "tiktoken.model",
)  # fmt: skip

MAX_MISSING = 10_000
"""Tensors by which a model may exceed a file and still have the missing ones named."""

ELEMENTS_PER_BYTE = 2
"""Of the narrowest dtype, four bits."""

_LAYER = re.compile(r"(?:model\.layers|decoder_layers)\.(\d+)\.")


def read_folder(source: StrPath, layers: int | None = None) -> tuple[ModelConfig, Weights, dict[str, Any]]:
    """The model's shape, its weights and the config.json of a folder, or of a file next to a config.json.

    Args:
        layers: only this many of the first layers; None: all.

    Raises:
        UserError: there is no config.json, its family is not known, it is not valid, or the weights do not fit.
    """
    source = Path(source)
    folder = source.parent if source.is_file() else source
    config, values = read_model_config(folder), read_json(folder / "config.json")
    if layers is not None:
        if not 1 <= layers <= config.num_hidden_layers:
            raise UserError(f"layers is {layers}: it must be 1 to {config.num_hidden_layers}, the model's")
        dense = min(config.first_k_dense_replace, layers)
        config = dataclasses.replace(config, num_hidden_layers=layers, first_k_dense_replace=dense)
    return config, read_weights(source, config, is_interleaved(values), pass_over=layers is not None), values


def import_run(source: StrPath, run: StrPath, config: ModelConfig | None = None, layers: int | None = None) -> None:
    """Make a run folder from PyTorch weights.

    Args:
        source: a folder of a known family, or a state_dict file.
        run: a new folder.
        config: the model's shape; None: read it from the config.json next to the weights.
        layers: only this many of the first layers of a folder; None: all.

    Raises:
        UserError: the weights do not fit, or `run` holds something already.
    """
    source = Path(source)
    check_new(run)
    folder = source if source.is_dir() else source.parent
    if config is None and not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json: name the model's shape with --preset")
    if config is None:
        config, weights, values = read_folder(source, layers)
    else:
        weights, values = read_weights(source, config), None
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    generation = folder / GENERATION_CONFIG
    kept = {SOURCE_CONFIG: values} if values and names_of(config) != "customllm" else {}
    if kept and generation.is_file():
        kept[generation.name] = read_json(generation)
    write_run(run, config, weights, files, kept=kept)


def from_pretrained(folder: StrPath, *, dtype: jnp.dtype = jnp.float32, remat: bool = False) -> CustomLLM:
    """The model of an exported folder, or of any folder of a known family.

    Raises:
        UserError: the folder or its weights are not those of a model of a known family.
    """
    config, weights, _ = read_folder(folder)
    graph, params, _ = abstract_model(config, dtype=dtype, remat=remat)
    master = jax.tree.leaves(params)[0].dtype
    return nnx.merge(graph, *jax.tree.map(lambda leaf: jnp.asarray(leaf, master), tuple(weights)))


def read_weights(source: StrPath, config: ModelConfig, interleaved: bool = True, *, pass_over: bool = False) -> Weights:
    """Read PyTorch weights into float32 Flax arrays, one tensor at a time.

    Every key is used exactly once. A missing routing bias of a CustomLLM is zero: the source's own files have none. No
    memory is taken before the files are known to hold as many values as the config requires.

    Args:
        source: a folder or a file.
        config: the model's shape.
        interleaved: as in `convert.mapping.entries`.
        pass_over: whether to leave out the layers that the config does not have. In the DeepSeek family they always
            are: they are the module of multi-token prediction, which is not part of this model.

    Raises:
        UserError: keys are unknown, missing, duplicate, misplaced or misshaped, of each of which the first are named.
    """
    source = Path(source)
    pass_over = pass_over or names_of(config) == "deepseek"
    with TensorFiles(source) as files:
        most = len(files.shapes) + MAX_MISSING
        table = {entry.torch_name: entry for entry in itertools.islice(entries(config, interleaved), most + 1)}
        if len(table) > most:
            raise UserError(
                f"{source} holds {len(files.shapes)} tensors, and a model of its config has {MAX_MISSING} more or "
                "beyond: pass the config that belongs to them"
            )
        _, params, routing_bias = abstract_model(config)
        trees = {PARAMS: params, ROUTING_BIAS: routing_bias}
        ignored = _passed_over(source, files, config.num_hidden_layers) if pass_over else set()
        scales = {name: scale for name, scale in fp8.scales_of(files.dtypes).items() if name not in ignored}
        wanted = {name: entry.shape(trees) for name, entry in table.items()}
        wanted |= {scale: fp8.scale_shape(files.shapes[name]) for name, scale in scales.items()}
        optional = {name for name, entry in table.items() if entry.optional}
        _check_keys(source, files, wanted, optional, ignored)
        elements = sum(math.prod(shape) for shape in files.shapes.values())
        if elements > ELEMENTS_PER_BYTE * files.size:  # a PyTorch file can show a few bytes as many tensors
            raise UserError(
                f"{source} has {files.size} bytes, which do not hold its {elements} values: export it again"
            )
        arrays = jax.tree.map(lambda shape: np.zeros(shape.shape, np.float32), trees)
        for name, entry in table.items():
            if name not in files.shapes:
                continue
            tensor = files.read(name)
            if name in scales:
                tensor = fp8.dequantize(tensor, files.read(scales[name]))
            if not np.issubdtype(tensor.dtype, np.floating) and tensor.dtype.name != "bfloat16":
                raise UserError(f"{source}: {name} has the dtype {tensor.dtype}: floating point is expected")
            entry.write(arrays, tensor)
    return Weights(arrays[PARAMS], arrays[ROUTING_BIAS])


def _passed_over(source: Path, files: TensorFiles, layers: int) -> set[str]:
    """The tensors of layers that the model does not have, and tables that it computes; a line says so."""
    beyond = {name for name in files.shapes if (match := _LAYER.match(name)) and int(match[1]) >= layers}
    if beyond:
        print(f"{source}: passed over {len(beyond)} tensors of layers from {layers} on", file=sys.stderr)
    return beyond | {name for name in files.shapes if name.endswith(".rotary_emb.inv_freq")}


def _check_keys(
    source: Path, files: TensorFiles, wanted: Mapping[str, tuple[int, ...]], optional: set[str], ignored: set[str]
) -> None:
    found = {name: shape for name, shape in files.shapes.items() if name not in ignored}
    problems = {
        "unknown": sorted(found.keys() - wanted.keys()),
        "missing": sorted(wanted.keys() - found.keys() - optional),
        "duplicate": sorted(set(files.duplicates)),
        "not in the file that the index names": sorted(set(files.misplaced)),
        "misshaped": [
            f"{name} {list(found[name])} instead of {list(shape)}"
            for name, shape in wanted.items()
            if name in found and found[name] != shape
        ],
    }
    lines = [f"{kind}: {listed(names)}" for kind, names in problems.items() if names]
    if lines:
        raise UserError(f"{source} does not fit the model config; " + "; ".join(lines))
