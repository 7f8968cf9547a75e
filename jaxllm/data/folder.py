"""Which files of a folder are data, and why the others are not."""

import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jaxllm.data.lines import COMPRESSIONS, SUFFIXES, NoText, Unreadable, kind_of
from jaxllm.data.reading import look
from jaxllm.errors import UserError, listed, shown
from jaxllm.files import read_json

ENDINGS = f"{', '.join(SUFFIXES)}, all but the last two also with {', '.join(COMPRESSIONS)}"

_NOTES = re.compile(
    r"(readme|licen[sc]e|copying|notice|changelog|authors|contribut(ing|ors)|citation|requirements|constraints|version"
    r"|manifest|todo|checksums?|(md5|sha\d+)sums?)([^a-z].*)?|.*\.(md|py)(\..*)?"
)
"""Names of text files that describe the data, in a folder that also has files of rows."""


MAX_NAMED = 1000
"""Files that are named for each reason why they are not read."""


class DataFiles(NamedTuple):
    folder: Path  # names are relative to it
    files: list[Path]  # sorted
    damaged: dict[str, str]  # those of them that cannot be read: the reason by name
    passed_over: dict[str, str]  # of other files, the reason by name


def find_data(path: Path, text_field: str, split: str) -> DataFiles:
    """The file itself, or the files below a folder that hold text.

    Hidden files and the folders of runs are no data. Of a folder that `datasets` saved, only its own files are; of
    several splits, `split` is. Text files that describe the data (`_NOTES`) are left out where files of rows are read,
    or are the larger part but have another field.

    Raises:
        UserError: there is none, or one may not be read.
    """
    passed_over: dict[str, str] = {}
    folder, found = (path.parent, [path]) if path.is_file() else (path, _candidates(path, split, passed_over))
    files, damaged, row_bytes = {}, {}, 0
    for file in sorted(found):
        name = file.relative_to(folder).as_posix()
        try:
            stat = file.stat()
            reason, is_damaged = _verdict(file, stat.st_size, stat.st_mtime_ns, text_field)
        except OSError as error:
            raise UserError(f"data: cannot read {file}: {error.strerror}") from None
        row_bytes += stat.st_size if kind_of(file) in ("lines", "csv", "parquet", "arrow") else 0
        if reason is None or is_damaged:
            files[name] = file
        if reason is not None:
            (damaged if is_damaged else passed_over)[name] = reason
    texts = [name for name in files if kind_of(files[name]) == "text"]
    if files.keys() - damaged.keys() - {*texts} or row_bytes > sum(files[name].stat().st_size for name in texts):
        for name in [name for name in texts if _NOTES.fullmatch(files[name].name.lower())]:
            del files[name]
            damaged.pop(name, None)
            passed_over[name] = "a text file next to files of rows"
    readable = files.keys() - damaged.keys()
    if not readable:
        said = "; ".join(described(passed_over | damaged)[:3]) or "it is empty"
        raise UserError(f"data is {str(path)!r}: there is nothing to read in it: {said}")
    return DataFiles(folder, list(files.values()), damaged, passed_over)


@functools.cache
def _verdict(file: Path, size: int, mtime_ns: int, text_field: str) -> tuple[str | None, bool]:
    """Why a file is not read, if so, and whether it is damaged; `mtime_ns` is part of the cache's key only."""
    if kind_of(file) is None:
        return f"the ending is none of {ENDINGS}", False
    try:
        look(file, size, text_field)
    except NoText as error:
        return str(error), False
    except Unreadable as error:
        return str(error), True
    return None, False


def _candidates(root: Path, split: str, passed_over: dict[str, str]) -> Iterator[Path]:
    def forbidden(error: OSError) -> None:
        raise UserError(f"data: cannot read {error.filename}: {error.strerror}")

    for at, subfolders, names in os.walk(root, onerror=forbidden):
        folder = Path(at)

        def leave_out(name: str, reason: str, folder: Path = folder) -> None:
            path = folder / name
            passed_over[path.relative_to(root).as_posix() + ("/" if path.is_dir() else "")] = reason

        own = set(names)
        if "train_config.json" in own or ("config.json" in own and "checkpoints" in subfolders):
            if folder == root:
                raise UserError(f"data is {str(root)!r}: that is the folder of a run")
            leave_out("", "the folder of a run")
            subfolders.clear()
            continue
        if "dataset_dict.json" in own:
            splits = _read(folder / "dataset_dict.json").get("splits")
            if isinstance(splits, list) and split not in splits:
                raise UserError(f"data: {folder} has no split {split!r}: pass --data-split, one of {listed(splits)}")
            for name in [name for name in subfolders if name != split]:
                leave_out(name, f"another split than {split!r}, see --data-split")
                subfolders.remove(name)
        if {"state.json", "dataset_info.json"} <= own:
            parts = _read(folder / "state.json").get("_data_files")
            if isinstance(parts, list):
                own = {part.get("filename") for part in parts if isinstance(part, dict)}
        for name in [*subfolders, *names]:
            if name.startswith("."):
                leave_out(name, "hidden")
            elif name in subfolders:
                if (folder / name).is_symlink():
                    leave_out(name, "a link to a folder")
            elif name not in own:
                leave_out(name, "no part of the dataset that was saved there")
            elif not (folder / name).is_file():
                leave_out(name, "no regular file")
            else:
                yield folder / name
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]


def _read(file: Path) -> dict:
    try:
        return read_json(file)
    except UserError:
        return {}


def described(reasons: dict[str, str]) -> list[str]:
    """Files by the reason why they are not read, in lines of 20 names; of more than `MAX_NAMED`, the first."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in sorted(reasons.items()):
        by_reason.setdefault(reason, []).append(name if name.isprintable() else shown(name))
    lines = []
    for reason, names in by_reason.items():
        if len(names) > MAX_NAMED:
            names[MAX_NAMED:] = [f"and {len(names) - MAX_NAMED} more"]
        lines += [f"{', '.join(names[i : i + 20])} ({reason})" for i in range(0, len(names), 20)]
    return lines
