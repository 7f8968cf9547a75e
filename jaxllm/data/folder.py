"""Which files of a folder are data, and why the others are not."""

import functools
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from jaxllm.config.groups import DataConfig
from jaxllm.data.chats import one_sided
from jaxllm.data.lines import COMPRESSIONS, SUFFIXES, NoText, Unreadable, kind_of
from jaxllm.data.reading import look
from jaxllm.data.splits import ALL, Ambiguous, missing_shards, of_card, recognized
from jaxllm.errors import UserError, listed, shown
from jaxllm.files import read_json

ENDINGS = f"{', '.join(SUFFIXES)}, all but the last two also with {', '.join(COMPRESSIONS)}"

_ABOUT = (
    r"(readme|licen[sc]e|copying|notice|changelog|authors|contribut(ing|ors)|citation|requirements|constraints|version"
    r"|manifest|todo|checksums?|(md5|sha\d+)sums?)([^a-z].*)?"
)
_CODE = r".*\.(md|py)(\..*)?"
_NOTES = re.compile(rf"{_ABOUT}|{_CODE}")
"""Names of text files that describe the data, in a folder that also has files of rows."""

MAX_NAMED = 1000
"""Files that are named for each reason why they are not read."""


@dataclass
class DataFiles:
    """The files of a folder, by their names relative to it."""

    folder: Path
    files: dict[str, Path] = field(default_factory=dict)  # those that are data, in order
    damaged: dict[str, str] = field(default_factory=dict)  # those of them that cannot be read: the reason
    passed_over: dict[str, str] = field(default_factory=dict)  # of other files, the reason
    splits: Mapping[str, int | None] = field(default_factory=dict)  # files of each split; None: not counted
    missing: list[str] = field(default_factory=list)  # what the files that are read lack, a line each

    def pass_over(self, name: str, reason: str) -> None:
        del self.files[name]
        self.damaged.pop(name, None)
        self.passed_over[name] = reason

    def check_readable(self, what: str, reasons: dict[str, str]) -> None:
        """Raise UserError if no file can be read."""
        if not self.files.keys() - self.damaged.keys():
            raise UserError(f"data is {what}: {'; '.join(described(reasons)[:3]) or 'it is empty'}")


def find_data(path: Path, data: DataConfig, skip: Callable[[str], bool] | None) -> DataFiles:
    """The file itself, or the files below a folder that hold text.

    Hidden files and the folders of runs are not data. Of a folder that `datasets` saved, only its own files are. Text
    files that describe the data (`_NOTES`) are left out where files of rows are read, or are the larger part but have
    another field. Of several splits, which `datasets` saved or the files' names tell, `data.split` is read.

    `skip`: whether a file's name is one that the user leaves out; None: names give no splits, as in earlier versions.

    Raises:
        UserError: there is none, or one may not be read.
    """
    found, saved = DataFiles(path.parent if path.is_file() else path), {}
    candidates = [path] if path.is_file() else _candidates(path, data.split, found.passed_over, saved)
    row_bytes, other_fields = 0, {}
    for file in sorted(candidates):
        name = file.relative_to(found.folder).as_posix()
        try:
            stat = file.stat()
            looked_at = _verdict(file, stat.st_size, stat.st_mtime_ns, data.text_field, skip is not None)
        except OSError as error:
            raise UserError(f"data: cannot read {file}: {error.strerror}") from None
        reason, is_damaged, others = looked_at
        row_bytes += stat.st_size if kind_of(file) in ("lines", "csv", "parquet", "arrow") else 0
        other_fields |= dict.fromkeys(others)
        if reason is None or is_damaged:
            found.files[name] = file
        if reason is not None:
            (found.damaged if is_damaged else found.passed_over)[name] = reason
    texts = [name for name, file in found.files.items() if kind_of(file) == "text"]
    rows = [name for name in found.files if name not in found.damaged and name not in texts]
    if skip is not None and not path.is_file():
        rows = _check_not_code(path, {n: file for n, file in found.files.items() if not skip(n)}, rows, row_bytes)
    if rows or row_bytes > sum(found.files[name].stat().st_size for name in texts):
        for name in [name for name in texts if _NOTES.fullmatch(found.files[name].name.lower())]:
            found.pass_over(name, "a text file next to files of rows")
    found.check_readable(f"{str(path)!r}: there is nothing to read in it", found.passed_over | found.damaged)
    found.splits = saved
    if skip is not None and not saved:
        _keep_split(found, path, data, skip)
    if not path.is_file():
        found.missing += missing_shards(list(found.files), [*found.files, *found.passed_over])
    if other_fields:
        found.missing.append(one_sided(data.text_field, other_fields))
    return found


def _keep_split(found: DataFiles, path: Path, data: DataConfig, skip: Callable[[str], bool]) -> None:
    """Leave out the files of other splits than the one that is read, by the card or the names of files."""
    split, names, split_of = data.split, list(found.files), {}
    if data.subset is not None or (split != ALL and not path.is_file()):
        split_of = of_card(path, names, data.subset)
    if split != ALL and not path.is_file() and not split_of:
        split_of = _splits_by_name(path, names, skip)
    found.splits = Counter(known for known in split_of.values() if known is not None)
    check_split(f"data is {str(path)!r}", split, list(found.splits))
    wanted = {*found.splits} if split == ALL else {split}
    for name in [name for name in names if split_of and split_of.get(name) not in wanted]:
        found.pass_over(name, _another(split_of.get(name), split))
    found.check_readable(f"{str(path)!r}: nothing of its split {split!r} can be read", found.damaged)


def _check_not_code(path: Path, files: dict[str, Path], rows: list[str], row_bytes: int) -> list[str]:
    """Refuse a folder of code or pages with fewer bytes of rows; returns the files of rows that are not skipped."""
    rows = [name for name in rows if name in files]
    code = [name for name, file in files.items() if re.fullmatch(_CODE, file.name.lower())]
    code = [name for name in code if not re.fullmatch(_ABOUT, files[name].name.lower())]
    code_bytes = sum(files[name].stat().st_size for name in code)
    if rows and code_bytes > max(row_bytes, sum(files[name].stat().st_size for name in rows)):
        raise UserError(
            f"data is {str(path)!r}: {len(code)} files of text or code, such as {code[0]!r}, have more bytes than its "
            f"files of rows, such as {rows[0]!r}, so it is not clear which to train on: pass --skip-data with the "
            f"names or patterns of the ones to leave out, e.g. --skip-data {shown(rows[0])}"
        )
    return rows


def check_split(what: str, split: str, splits: Collection[str]) -> None:
    """Raise a UserError for a split that is neither one of `splits`, nor `train` where there are none, nor `all`."""
    if split in splits or split == ALL or (split == "train" and not splits):
        return
    if not splits:
        raise UserError(f"{what}: it has no splits, and data_split is {split!r}: leave out --data-split")
    raise UserError(f"{what}: it has no split {split!r}: pass --data-split, one of {listed(splits)}, or {ALL!r}")


def _splits_by_name(path: Path, names: list[str], skip: Callable[[str], bool]) -> dict[str, str | None]:
    """The split of each file by its name (`recognized`); without the files that the user leaves out, if those make it
    ambiguous."""
    names = [name for name in names if not re.fullmatch(_ABOUT, PurePosixPath(name).name.lower())]
    try:
        return recognized(names)
    except Ambiguous as ambiguous:
        try:
            return recognized([name for name in names if not skip(name)])
        except Ambiguous:
            raise UserError(
                f"data is {str(path)!r}: {ambiguous}, so it is not clear which files to train on: leave some out with "
                f"--skip-data NAME, or pass --data-split {ALL} to train on all"
            ) from None


def _another(split: str | None, wanted: str) -> str:
    return f"in no split, and {wanted!r} is read" if split is None else f"split {split!r}, and {wanted!r} is read"


@functools.cache
def _verdict(
    file: Path, size: int, mtime_ns: int, text_field: str, strict: bool
) -> tuple[str | None, bool, tuple[str, ...]]:
    """Why a file is not read, if so, whether it is damaged, and what `look` returns. `mtime_ns` is part of the key."""
    if kind_of(file) is None:
        return f"the ending is none of {ENDINGS}", False, ()
    try:
        return None, False, look(file, size, text_field, strict)
    except NoText as error:
        return str(error), False, ()
    except Unreadable as error:
        return str(error), True, ()


def _candidates(root: Path, split: str, passed_over: dict[str, str], saved: dict[str, int | None]) -> Iterator[Path]:
    """The files below a folder that may be data. `saved`: the splits that `datasets` saved there are added."""

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
                raise UserError(f"data is {str(root)!r}: that is the folder of a run; pass the folder of the text")
            leave_out("", "the folder of a run")
            subfolders.clear()
            continue
        if "dataset_dict.json" in own:
            splits = _read(folder / "dataset_dict.json").get("splits")
            splits = [name for name in splits if isinstance(name, str)] if isinstance(splits, list) else [split]
            check_split(f"data: {folder}", split, splits)
            saved |= dict.fromkeys(splits)
            for name in [name for name in subfolders if split not in (name, ALL)]:
                leave_out(name, _another(name, split))
                subfolders.remove(name)
        if {"state.json", "dataset_info.json"} <= own:
            state = _read(folder / "state.json")
            parts, own_split = state.get("_data_files"), state.get("_split")
            if own_split == split and not saved:
                saved[split] = None
            if isinstance(parts, list):
                own = {part.get("filename") for part in parts if isinstance(part, dict)}
        for name in [*subfolders, *names]:
            if name.startswith("."):
                leave_out(name, "hidden")
            elif name in subfolders:
                if (folder / name).is_symlink():
                    leave_out(name, "a link to a folder")
            elif name not in own:
                leave_out(name, "not a part of the dataset that was saved there")
            elif not (folder / name).is_file():
                leave_out(name, "not a regular file")
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
