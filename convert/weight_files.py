"""Which files of a folder hold its weights: decided here, and as transformers decides it."""

from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from jaxllm.errors import UserError, listed, shown
from jaxllm.files import read_json
from jaxllm.store.folder import ADAPTER_CONFIG, checkpoint_owner, merging

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

WEIGHT_SETS = ((WEIGHTS_NAME, INDEX_NAME), ("pytorch_model.bin", "pytorch_model.bin.index.json"))
"""A single file, and the index of its shards, in the order in which transformers looks for them."""

MODEL_FILES = ("model*.safetensors*", "pytorch_model*.bin*", "consolidated*")
"""Other files of weights are an optimizer's, an adapter's or a trainer's."""

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")

MAX_INDEX_BYTES = 64 * 2**20
"""Largest index, or header of a file, that is read: one with a million tensors."""


class WeightFiles(NamedTuple):
    """What is read of a folder."""

    files: dict[Path, set[str]]
    """Each with the tensors that an index puts there. A file may be a symlink, as in the Hub's cache."""
    unopened: list[str]
    """The tensors of shards of which nothing is needed."""
    absent: list[str]
    """Those of such shards that the folder does not hold."""
    rival: dict[Path, set[str]]
    """Complete files of another set of weights, which must be equal."""
    notes: list[str]
    """What is not read, or in an unusual way: one line each."""


def weight_files(path: Path, needed: Callable[[str], bool]) -> WeightFiles:
    """The files that hold the weights of a folder.

    Args:
        path: a folder, or a file.
        needed: which tensors are read, by name.

    Raises:
        UserError: there are none, they cannot be read, or an adapter is beside them.
    """
    adapter = (path.parent if path.is_file() else path) / ADAPTER_CONFIG
    if adapter.exists():
        raise UserError(
            f"{adapter}: transformers adds this adapter to the weights, and it is not read here: merge it with "
            f"`{merging(adapter.parent)}`, or move the adapter_* files away"
        )
    if path.is_file():
        if path.suffix not in WEIGHT_SUFFIXES:
            raise UserError(f"{path}: the ending must be one of {', '.join(WEIGHT_SUFFIXES)}")
        return WeightFiles({path: set()}, [], [], {}, [])
    if not path.is_dir():
        raise UserError(f"{path}: there is no such file or folder")
    for single, index in WEIGHT_SETS:
        if (path / single).is_file() or (path / index).is_file():
            return _of_set(path, single, index, needed)
    if (owner := checkpoint_owner(path)) is not None:
        remedy = f"export it with `python -m convert to-torch {path} OUT`, and pass OUT"
        raise UserError(
            f"{path} is a run, not a folder of weights: {remedy if owner == 'JAX' else 'pass one of its checkpoint-N'}"
        )
    names = [name for names in WEIGHT_SETS for name in names]
    raise UserError(f"{path} holds none of {', '.join(names)}")


def _of_set(path: Path, single: str, index: str, needed: Callable[[str], bool]) -> WeightFiles:
    held = {file.name for file in path.iterdir() if file.is_file()}
    shards = _shards(path / index) if index in held else {}
    missing = sorted(shards.keys() - held)
    rival, passed_over, notes = {}, set(), []
    if single in held and single not in shards:
        if missing:
            notes.append(f"{path}: {single} is read; {index} is out of date, it names {listed(missing)}")
        elif shards:
            rival = {path / name: tensors for name, tensors in shards.items()}
            notes.append(f"{path}: {single} is read, and compared with the shards of {index}")
        read = {path / single: set()}
    else:
        wanted = {name: tensors for name, tensors in shards.items() if any(needed(tensor) for tensor in tensors)}
        if absent := [name for name in missing if name in wanted]:
            raise UserError(f"{path / index} names the file {shown(absent[0])}, which the folder does not hold")
        read = {path / name: tensors for name, tensors in wanted.items()}
        passed_over = shards.keys() - wanted.keys()
    if not read:
        raise UserError(f"{path / index} names no tensor of the model")
    others = {name for name in held if any(fnmatch(name, pattern) for pattern in MODEL_FILES)}
    if others := others - {index, *(file.name for file in read)} - shards.keys():
        notes.append(f"{path}: not read: {listed(sorted(others))}")
    unopened, absent = (
        [tensor for name in passed_over if (name in held) == there for tensor in shards[name]]
        for there in (True, False)
    )
    return WeightFiles(read, unopened, absent, rival, notes)


def _shards(index: Path) -> dict[str, set[str]]:
    """The names of an index's shards, each with its tensors."""
    weight_map = read_json(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map")
    ending = WEIGHT_SUFFIXES[0] if index.name == INDEX_NAME else WEIGHT_SUFFIXES[1]
    shards: dict[str, set[str]] = {}
    for tensor, name in sorted(weight_map.items()):
        # a plain name: no other leads out of the folder
        if not isinstance(name, str) or Path(name).name != name or "\0" in name or not name.endswith(ending):
            raise UserError(f"{index} names the file {shown(name)}: it must be a name that ends in {ending}")
        shards.setdefault(name, set()).add(tensor)
    return shards
