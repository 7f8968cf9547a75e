"""PyTorch to Flax: read a folder of a known family, or a raw state_dict of the source's model, into Flax weights."""

import dataclasses
import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert import fp8, mtp
from convert.mapping import PARAMS, ROUTING_BIAS, entries
from convert.new_folder import check_new, new_folder
from convert.reader import read_leaves
from convert.tensor_files import TensorFiles
from jaxllm.config import KernelsOption, ModelConfig
from jaxllm.config.families import is_interleaved, names_of
from jaxllm.errors import UserError, note
from jaxllm.files import StrPath, read_json, write_json
from jaxllm.model.decoder import CustomLLM, abstract_model, model_facts
from jaxllm.model.dtypes import Pytree, at_least_float32, check_dtype
from jaxllm.model.inference import Hold, as_stored, is_narrow, masters
from jaxllm.run.self_check import kernels_to_avoid
from jaxllm.store.checkpoint import Weights
from jaxllm.store.checkpoint_writer import write_run
from jaxllm.store.folder import ADAPTER_CONFIG, SOURCE_DTYPES, read_model_config
from jaxllm.store.source import model_folder, source_files

MAX_MISSING = 10_000
"""Most missing tensors that are collected and named; with more, the config is refused without their names."""

ELEMENTS_PER_BYTE = 2
"""Values in a byte of the narrowest dtype, which has four bits."""

Place = tuple[Pytree, Pytree] | jax.sharding.Sharding | None
"""Where parameters and routing bias are read to: a sharding of each of their leaves, or one of all; None: to NumPy
arrays on the host."""


class Imported(NamedTuple):
    """A model that was read from a folder."""

    config: ModelConfig
    weights: Weights
    values: dict[str, Any]
    """The folder's config.json."""
    dtypes: dict[str, Any]
    """What `source_dtypes.json` in a run keeps for the export: the dtypes of the folder's weights, and where its
    tensors of multi-token prediction are (`convert.mtp`)."""


def read_model(source: StrPath, layers: int | None = None, *, hold: Hold = masters, place: Place = None) -> Imported:
    """The model of a folder, or of a file next to a config.json.

    A process reads the bytes that its devices hold, and each of them once.

    Args:
        source: a folder, a file, or the Hub name of a model that is in the Hub's cache.
        layers: only this many of the first layers, of which the files alone are opened; None: all.
        hold: chooses the dtype of each leaf (`jaxllm.model.inference`): float32 to train it, that of the files to
            freeze it. Numbers are rounded only where a narrower dtype is chosen.
        place: where the weights are read to.

    Raises:
        UserError: there is no config.json, its family is not known, it is not valid, or the weights do not fit.
    """
    source = model_folder(source)
    folder = source.parent if source.is_file() else source
    config, values = read_model_config(folder), read_json(folder / "config.json")
    if layers is not None:
        if not 1 <= layers <= config.num_hidden_layers:
            raise UserError(f"layers is {layers}: it must be 1 to {config.num_hidden_layers}, the model's")
        dense = min(config.first_k_dense_replace, layers)
        config = dataclasses.replace(config, num_hidden_layers=layers, first_k_dense_replace=dense)
    cut = layers is not None
    weights, dtypes = _read_weights(source, config, is_interleaved(values), pass_over=cut, hold=hold, place=place)
    return Imported(config, weights, values, dtypes)


def read_folder(source: StrPath, layers: int | None = None) -> tuple[ModelConfig, Weights, dict[str, Any]]:
    """The model's shape, its weights and its config.json, as `read_model`."""
    return read_model(source, layers)[:3]


def import_run(source: StrPath, run: StrPath, config: ModelConfig | None = None, layers: int | None = None) -> None:
    """Make a run folder from PyTorch weights.

    Args:
        source: a folder of a known family, a state_dict file, or the Hub name of a model in the Hub's cache.
        run: a new folder.
        config: the model's shape; None: read it from the config.json next to the weights.
        layers: only this many of the first layers of a folder; None: all.

    Raises:
        UserError: the weights do not fit, or `run` holds something already.
    """
    run, source = Path(run), model_folder(source)
    check_new(run)
    folder = source if source.is_dir() else source.parent
    if config is None and not any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
        raise UserError(f"{folder} has no config.json: name the model's shape with --preset")
    if config is None:
        config, weights, _, dtypes = read_model(source, layers, hold=as_stored)
    else:
        weights, dtypes = _read_weights(source, config, hold=as_stored)
    with new_folder(run) as made:
        write_run(made, config, weights, kept=source_files(folder))
        write_json(made / SOURCE_DTYPES, dtypes)


def from_pretrained(folder: StrPath, *, dtype: Any = jnp.float32, remat: bool = False) -> CustomLLM:
    """The model of an exported folder, or of any folder of a known family.

    Args:
        folder: or the Hub name of a model in the Hub's cache.
        dtype: compute dtype, float32 or bfloat16. Weights are float32 masters.

    Raises:
        UserError: the folder or its weights are not those of a model of a known family, or there is no such dtype.
    """
    dtype = check_dtype(dtype)
    return model_of(folder, dtype, lambda facts, stored: at_least_float32(dtype), remat=remat)


def model_of(
    folder: StrPath, dtype: Any, hold: Hold, *, remat: bool = False, kernels: KernelsOption = "auto"
) -> CustomLLM:
    """`from_pretrained`, its weights held in the dtypes that `hold` chooses."""
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    config, weights, *_ = read_model(folder, hold=hold, place=first)
    without = kernels_to_avoid(config, dtype, kernels)
    graph, _, _ = abstract_model(config, dtype=dtype, remat=remat, without=without)
    return nnx.merge(graph, *weights)


def read_weights(source: StrPath, config: ModelConfig, interleaved: bool = True, **options: Any) -> Weights:
    """Read PyTorch weights into Flax arrays, as `read_model` for a model whose shape is known.

    Every key is used exactly once. A missing routing bias of a CustomLLM is zero: the source's own files have none. No
    memory is taken before the files are known to hold as many values as the config requires.

    Args:
        source: a folder or a file.
        config: the model's shape.
        interleaved: as in `convert.mapping.entries`.
        options: `hold` and `place`, as in `read_model`; `pass_over`, whether to leave out the layers that the config
            does not have. In the DeepSeek family they always are: they are the module of multi-token prediction, which
            is not part of this model.

    Raises:
        UserError: keys are unknown, missing, duplicate, misplaced or of another shape; the first of each are named.
    """
    return _read_weights(Path(source), config, interleaved, **options)[0]


def _read_weights(
    source: Path,
    config: ModelConfig,
    interleaved: bool = True,
    *,
    pass_over: bool = False,
    hold: Hold = masters,
    place: Place = None,
) -> tuple[Weights, dict[str, Any]]:
    """`read_weights`, and what a run keeps of the files."""
    carry = names_of(config) == "deepseek" and not pass_over
    pass_over |= carry
    L = config.num_hidden_layers
    with TensorFiles(source, needed=lambda name: not (pass_over and mtp.is_beyond(name, L))) as files:
        most = len(files.shapes) + MAX_MISSING
        table = {entry.torch_name: entry for entry in itertools.islice(entries(config, interleaved), most + 1)}
        if len(table) > most:
            raise UserError(
                f"{source} holds {len(files.shapes)} tensors, and its config.json describes at least "
                f"{MAX_MISSING} more: pass the config.json of these weights"
            )
        trees: dict[str, Any] = dict(zip((PARAMS, ROUTING_BIAS), abstract_model(config)[1:], strict=True))
        ignored = _passed_over(files, L) if pass_over else set()
        ignored |= _repeated_head(source, files) if config.tie_word_embeddings else set()
        scales = {name: scale for name, scale in fp8.scales_of(files.dtypes).items() if name not in ignored}
        wanted = {name: entry.shape(trees) for name, entry in table.items()}
        wanted |= {scale: fp8.scale_shape(files.shapes[name]) for name, scale in scales.items()}
        optional = {name for name, entry in table.items() if entry.optional}
        if wrong := files.misfits(wanted, optional, ignored):
            raise UserError(f"{source} does not fit the model config; {wrong}; pass the config.json of these weights")
        if "F64" in files.dtypes.values():
            note(f"{source}: float64 weights are read as float32")
        elements = sum(math.prod(shape) for shape in files.shapes.values())
        if elements > ELEMENTS_PER_BYTE * files.size:  # a PyTorch file can show a few bytes as many tensors
            raise UserError(
                f"{source} has {files.size} bytes, which do not hold its {elements} values: export it again"
            )
        each = place if isinstance(place, tuple) else jax.tree.map(lambda _: place, tuple(trees.values()))
        facts, places = (dict(zip(trees, pair, strict=True)) for pair in (model_facts(config), each))
        if scales:
            held = {np.dtype(hold(known, fp8.HELD)).name for known in jax.tree.leaves(facts) if is_narrow(known)}
            note(f"{source}: FP8 weights are multiplied by their scales in float32 and held in {' and '.join(held)}")
        filled = read_leaves(files, table, trees, facts, hold, places)
        kept = _exported_dtypes(files) | (mtp.origin(files, L) if carry else {})
        return Weights(filled[PARAMS], filled[ROUTING_BIAS]), kept


def _exported_dtypes(files: TensorFiles) -> dict[str, Any]:
    """The dtype of most values, and the tensors that have another one; of FP8 files, among those that are not FP8."""
    counts: Counter[str] = Counter()
    known = {name: mtp.EXPORTED[dtype] for name, dtype in files.dtypes.items() if dtype in mtp.EXPORTED}
    for name, dtype in known.items():
        counts[dtype] += math.prod(files.shapes[name])
    main = max(counts, key=counts.__getitem__, default="float32")
    return {"dtype": main, "others": {name: dtype for name, dtype in known.items() if dtype != main}}


def _passed_over(files: TensorFiles, layers: int) -> set[str]:
    """The tensors of layers that the model does not have, and tables that it computes; a message names them."""
    beyond = {name for name in files.shapes if mtp.is_beyond(name, layers)}
    if count := len(beyond) + len(files.unopened) + len(files.absent):
        note(f"{files.path}: left out {count} tensors of layers from {layers} on")
    return beyond | {name for name in files.shapes if name.endswith(mtp.COMPUTED)}


def _repeated_head(source: Path, files: TensorFiles) -> set[str]:
    """The head of a file that also has the embeddings to which it is tied; refused if they differ."""
    head, table = "lm_head.weight", "model.embed_tokens.weight"
    if head not in files.shapes or table not in files.shapes:
        return set()
    if not files.equals(head, files, table):
        raise UserError(
            f"{source}: tie_word_embeddings is true, and {head} differs from {table}: set it to false in config.json, "
            f"or leave {head} out of the file"
        )
    note(f"{source}: {head} is left out: it equals {table}, to which it is tied")
    return {head}
