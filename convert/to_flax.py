"""PyTorch to Flax: read an exported folder, or a raw state_dict of the source's model, into Flax weights."""

import itertools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert.mapping import PARAMS, ROUTING_BIAS, entries, leaf, torch_shape
from convert.tensor_files import TensorFiles
from convert.to_torch import check_new
from jaxllm.config import ModelConfig
from jaxllm.errors import UserError, listed
from jaxllm.model.decoder import CustomLLM, abstract_model
from jaxllm.run.checkpoint import Weights, read_model_config
from jaxllm.run.checkpoint_writer import write_run

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja",
)  # fmt: skip


MAX_MISSING = 10_000
"""Tensors by which a model may exceed a file and still have the missing ones named."""

ELEMENTS_PER_BYTE = 2
"""Of the narrowest dtype, four bits."""


def import_run(source: Path, run: Path, config: ModelConfig | None = None) -> None:
    """Make a run folder from PyTorch weights.

    Args:
        source: an exported folder, or a state_dict file.
        run: a new folder.
        config: the model's shape; None: read it from the config.json next to the weights.

    Raises:
        UserError: the weights do not fit, or `run` holds something already.
    """
    check_new(run)
    folder = source if source.is_dir() else source.parent
    if config is None:
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} holds no config.json: name the model's shape with --preset")
        config = read_model_config(folder)
    weights = read_weights(source, config)
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    write_run(run, config, weights, files)


def from_pretrained(folder: str | Path, *, dtype: jnp.dtype = jnp.float32, remat: bool = False) -> CustomLLM:
    """The model of an exported folder.

    Raises:
        UserError: the folder or its weights are not those of a CustomLLM.
    """
    folder = Path(folder)
    config = read_model_config(folder)
    weights = read_weights(folder, config)
    graph, params, _ = abstract_model(config, dtype=dtype, remat=remat)
    master = jax.tree.leaves(params)[0].dtype
    return nnx.merge(graph, *jax.tree.map(lambda leaf: jnp.asarray(leaf, master), tuple(weights)))


def read_weights(source: Path, config: ModelConfig) -> Weights:
    """Read PyTorch weights into float32 Flax arrays, one tensor at a time.

    Every key is used exactly once. A missing routing bias is zero: the source's own files have none. No memory is taken
    before the files are known to hold as many values as the config requires.

    Raises:
        UserError: keys are unknown, missing, duplicate, misplaced or misshaped, of each of which the first are named.
    """
    with TensorFiles(source) as files:
        most = len(files.shapes) + MAX_MISSING
        table = {entry.torch_name: entry for entry in itertools.islice(entries(config), most + 1)}
        if len(table) > most:
            raise UserError(
                f"{source} holds {len(files.shapes)} tensors, and a model of its config has {MAX_MISSING} more or "
                "beyond: pass the config that belongs to them"
            )
        _, params, routing_bias = abstract_model(config)
        trees = {PARAMS: params, ROUTING_BIAS: routing_bias}
        wanted = {name: torch_shape(entry, leaf(trees[entry.tree], entry.path).shape) for name, entry in table.items()}
        _check_keys(source, files, wanted, optional={n for n, e in table.items() if e.tree == ROUTING_BIAS})
        elements = sum(math.prod(shape) for shape in files.shapes.values())
        if elements > ELEMENTS_PER_BYTE * files.size:  # a PyTorch file can show a few bytes as many tensors
            raise UserError(
                f"{source} has {files.size} bytes, which do not hold its {elements} values: export it again"
            )
        arrays = jax.tree.map(lambda shape: np.zeros(shape.shape, np.float32), trees)
        for name in files.shapes:
            entry = table[name]
            tensor = files.read(name)
            if not np.issubdtype(tensor.dtype, np.floating) and tensor.dtype.name != "bfloat16":
                raise UserError(f"{source}: {name} has the dtype {tensor.dtype}: floating point is expected")
            entry.write(leaf(arrays[entry.tree], entry.path), tensor)
    return Weights(arrays[PARAMS], arrays[ROUTING_BIAS])


def _check_keys(source: Path, files: TensorFiles, wanted: dict[str, tuple[int, ...]], optional: set[str]) -> None:
    found = files.shapes
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
