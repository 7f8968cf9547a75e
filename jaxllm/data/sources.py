"""The source of a run's text, chosen by its options: the standard library, files, the Hugging Face Hub, or a mixture.

A source yields `TextChunk`s, of which every `HOLD_OUT`-th belongs to the evaluation set. Its `position` is a small JSON
value; a fresh source with this position continues there without reading what came before.
"""

import functools
import os
import sysconfig
from dataclasses import replace
from pathlib import Path

from jaxllm.config.groups import DataConfig
from jaxllm.data.file_source import FILES, FileSource, is_skipped, patterns_in
from jaxllm.data.folder import DataFiles, check_split, find_data
from jaxllm.data.hub_source import HubSource
from jaxllm.data.lines import kind_of
from jaxllm.data.mixture import JOINED, Mixture, weighted
from jaxllm.data.source import WHOLE, Evaluation, Shard, Source
from jaxllm.data.splits import ALL, VALIDATION
from jaxllm.errors import UserError, shown


def open_source(data: DataConfig, seed: int, shard: Shard = WHOLE) -> Source:
    """The source that `data.source` names, or a shard of it; `seed` decides the order of files.

    Raises:
        UserError: nothing can be read there, or an option does not apply to it.
    """
    weights = {} if Path(data.source).expanduser().exists() else weighted(data.source)
    evaluation = None
    if data.eval_data is not None:
        opened = functools.partial(_open_evaluated, _evaluated(data), data.eval_data, seed, shard)
        evaluation = Evaluation(data.eval_data, opened)
    if not weights:
        return _with_rows(_open_one(data, seed, shard, evaluation), data)
    sources = {part.source: _open_one(part, seed, shard, evaluation) for part in _parts(data, list(weights))}
    return _with_rows(Mixture(sources, weights, evaluation), data)


def _open_evaluated(data: DataConfig, name: str, seed: int, shard: Shard) -> Source:
    try:
        return open_source(data, seed, shard)
    except UserError as error:
        raise UserError(f"eval_data is {name!r}: {error}") from None


def _with_rows(source: Source, data: DataConfig) -> Source:
    """Check that a field is named only where there are rows; text that is evaluated may have none."""
    is_named = data.text_field != "text" and data.hold_out not in ("count", "nothing")
    if is_named and source.files and all(kind_of(file) == "text" for file in source.files):
        raise UserError(f"text_field is {shown(data.text_field)}: {data.source!r} has only text, no rows; leave it out")
    return source


def _evaluated(data: DataConfig) -> DataConfig:
    """The data that --eval-data names, all of which is evaluated."""
    assert data.eval_data is not None
    name, data = data.eval_data, replace(data, eval_data=None, hold_out="nothing", skip_data="")
    if name == "stdlib" or Path(name).expanduser().exists():
        return replace(data, source=name, revision=None, subset=None, split=ALL)
    if "/" in name or kind_of(Path(name)) is not None:
        raise UserError(f"eval_data is {name!r}: there is no such file or folder, and no split of that name")
    if name == data.split:
        raise UserError(f"eval_data is {name!r}: that split is trained on; pass another split, a file or a folder")
    return replace(data, split=name)


def _parts(data: DataConfig, names: list[str]) -> list[DataConfig]:
    """Each source of a mixture for itself: its name and revision, what it holds out and what it leaves out."""
    revisions, hold_outs = (
        value.split(JOINED) if value and value.count(JOINED) == len(names) - 1 else [value] * len(names)
        for value in (data.revision, data.hold_out)
    )
    skips = patterns_in(data.skip_data)
    if other := [skip for skip in skips if not skip.startswith(tuple(f"{name}/" for name in names))]:
        raise UserError(
            f"skip_data is {shown(other[0])}: of several sources, begin with the one that is meant, NAME/FILE"
        )
    if data.subset is not None and not any(map(is_hub_name, names)):
        raise UserError(
            f"data_config is {shown(data.subset)}: only datasets of the Hub have configurations; leave it out"
        )
    parts = []
    for name, revision, hold_out in zip(names, revisions, hold_outs, strict=True):
        skip = ",".join(skip.removeprefix(f"{name}/") for skip in skips if skip.startswith(f"{name}/"))
        subset = data.subset if is_hub_name(name) else None
        own = {"source": name, "revision": revision, "hold_out": hold_out, "skip_data": skip, "subset": subset}
        parts.append(replace(data, eval_data=None, **own))
    return parts


def _open_one(data: DataConfig, seed: int, shard: Shard, evaluation: Evaluation | None) -> FileSource | HubSource:
    """One source; nothing of it is held out if other text is evaluated."""
    path = Path(data.source).expanduser()
    is_old = data.hold_out == "count"  # some options were ignored then
    if data.source != "stdlib" and not path.exists():
        if not is_hub_name(data.source):
            several = "; several sources need weights, A=0.7,B=0.3" if "," in data.source else ""
            raise UserError(
                f"data is {data.source!r}: there is no such file or folder, and it is not a Hub name (OWNER/NAME)"
                f"{several}"
            )
        if data.skip_data and not is_old:
            raise UserError(
                f"skip_data is {shown(data.skip_data)}: it is for files, and {data.source!r} is on the Hub: "
                "leave it out"
            )
        return HubSource(replace(data, revision=None) if is_fingerprint(data.revision) else data, shard, evaluation)
    if data.revision is not None and not is_fingerprint(data.revision) and not is_old:
        raise UserError(f"data_revision is {shown(data.revision)}: only a dataset of the Hub has commits; leave it out")
    if data.source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        if not is_old:
            check_split("data is 'stdlib'", data.split, ())
            if data.subset is not None:
                raise UserError(f"data_config is {shown(data.subset)}: only datasets have one; leave it out")
        found = stdlib_files(root)
    else:
        skip = None if is_old else functools.partial(is_skipped, data.skip_data)
        found = find_data(path, data, skip)
    validation = next((split for split in VALIDATION if split in found.splits and split != data.split), None)
    if evaluation is None and not is_old and data.split != ALL and validation is not None:
        other = replace(data, split=validation, hold_out="nothing", skip_data="")
        if data.hold_out in (None, "nothing"):
            opened = functools.partial(_open_one, other, seed, shard, None)
            evaluation = Evaluation(f"the split {validation!r}", opened)
    if data.hold_out is None and evaluation is not None:
        data = replace(data, hold_out="nothing")
    return FileSource(found, data, seed, shard, evaluation)


def is_hub_name(name: str) -> bool:
    """Whether data of this name are looked for on the Hub: OWNER/NAME, and no file or folder."""
    path = Path(name).expanduser()
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and kind_of(path) is None and not path.exists()


def is_fingerprint(revision: str | None) -> bool:
    """Whether the data are files, whose fingerprint stands in place of a commit."""
    return (revision or "").startswith(FILES)


def check_new_data(data: DataConfig, source: Source) -> None:
    """Raise a UserError if --skip-data names no file, or text to evaluate is trained on, too. Only where a run begins:
    later, files that an option names may be gone."""
    if unknown := [pattern for pattern in patterns_in(data.skip_data) if not source.has_file(pattern)]:
        raise UserError(f"skip_data is {shown(data.skip_data)}: no file of the data is {shown(unknown[0])}")
    trained = {file.resolve() for file in source.files}
    for evaluation in source.evaluations:
        if both := [file for file in evaluation.open().files if file.resolve() in trained]:
            raise UserError(f"eval_data: {str(both[0])!r} is trained on, too: leave it out of one of them")


def stdlib_files(root: Path) -> DataFiles:
    """The interpreter's own Python sources, without installed packages and tests.

    Also without `encodings`: its 1.5 MB of generated character tables read like nothing else.
    """
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skipped]  # do not walk installed packages
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise UserError(f"data is 'stdlib', but {root} holds no Python sources: pass --data FILE or --data FOLDER")
    return DataFiles(root, {file.relative_to(root).as_posix(): file for file in sorted(files)})
