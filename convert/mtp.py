"""Multi-token prediction: the layers of a file beyond the model's, which are neither trained nor lost.

A run keeps where they are; the export copies them from there (arXiv:2412.19437, section 2.2).
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from convert import fp8
from convert.tensor_files import TensorFiles
from convert.write_files import Tensor
from jaxllm.errors import UserError, listed, note
from jaxllm.files import MAX_JSON_BYTES, read_bounded

KEY = "multi_token_prediction"
"""In `source_dtypes.json` of a run: the folder and the names of the tensors."""

COMPUTED = ".rotary_emb.inv_freq"
"""The end of the names of tables that a model computes."""

EXPORTED = {"F64": "float32", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""The dtype of the export for each of a file."""

_LAYER = re.compile(r"(?:model\.layers|decoder_layers)\.(\d+)\.")


def is_beyond(name: str, layers: int) -> bool:
    """Whether a tensor is of a layer that a model of so many does not have."""
    match = _LAYER.match(name)
    return match is not None and int(match[1]) >= layers


def origin(files: TensorFiles, layers: int) -> dict[str, Any]:
    """What a run keeps of a source's tensors beyond its layers; nothing if it has none."""
    beyond = [name for name in (*files.shapes, *files.unopened) if is_beyond(name, layers)]
    if files.absent:
        note(f"{files.path}: an export will have no multi-token prediction: shards of it are missing")
        return {}
    return {KEY: {"folder": str(files.path.absolute()), "tensors": sorted(beyond)}} if beyond else {}


@contextmanager
def carried(kept: Mapping[str, Any], config: Path | None, dtype: str, asked: bool) -> Iterator[list[Tensor]]:
    """The tensors that a run's export takes over from its source, while its files are open.

    Args:
        kept: what `origin` returned.
        config: the config.json that the run kept of its source.
        dtype: of the export, for tensors that are FP8 in the source, or for all if it was `asked` for.

    Raises:
        UserError: the source is not there, or is another one.
    """
    folder = Path(kept["folder"])
    what = f"the tensors of multi-token prediction are in {folder}"
    remedy = "put the folder back, or leave them out with --drop-mtp"
    if not folder.exists():
        raise UserError(f"{what}, which is not there: {remedy}")
    beside = (folder if folder.is_dir() else folder.parent) / "config.json"
    if config is not None and read_bounded(beside, MAX_JSON_BYTES) != config.read_bytes():
        raise UserError(f"{what}, whose config.json is not the one that the run began with: {remedy}")
    wanted = {*kept["tensors"]}
    with TensorFiles(folder, needed=wanted.__contains__) as files:
        if missing := sorted(wanted - files.shapes.keys()):
            raise UserError(f"{what}, which lacks {listed(missing, most=3)}: {remedy}")
        scales = {*fp8.scales_of({name: files.dtypes[name] for name in wanted}).values()}
        if missing := sorted(scales - wanted):
            raise UserError(f"{what}, which lacks {listed(missing, most=3)}: {remedy}")
        yield [
            Tensor(name, files.shapes[name], lambda name=name: _read(files, name), _dtype(files, name, dtype, asked))
            for name in sorted(wanted - scales)
            if not name.endswith(COMPUTED)
        ]


def _read(files: TensorFiles, name: str) -> Any:
    values = files.read(name)
    return fp8.dequantize(values, files.read(name + fp8.SCALE_SUFFIX)) if files.dtypes[name] == fp8.FP8 else values


def _dtype(files: TensorFiles, name: str, dtype: str, asked: bool) -> str:
    return dtype if asked else EXPORTED.get(files.dtypes[name], dtype)
