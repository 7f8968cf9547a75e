"""The splits of a dataset, recognized by its card or the names of its files and folders, as on the Hugging Face Hub.

The Hub's documented words for a split are delimited by `-`, `_`, `.`, spaces or digits. That is how files of rows are
named. Words of a language occur in the names of any text, so a text file needs the exact name (`train.txt`,
`wiki.valid.txt`, `test/...`) unless every file belongs to a split. Code has folders `test` of its own: it is split only
if all of it lies in folders of splits.
"""

import contextlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from jaxllm.data.lines import kind_of
from jaxllm.errors import UserError, listed, shown
from jaxllm.files import MAX_JSON_BYTES

WORDS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip

VALIDATION = ("validation", "valid", "val", "dev")
"""Splits that a run is evaluated on, if its data has one and the user names no other."""

ALL = "all"
"""As --data-split: every file, whatever split its name tells."""

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\b.*")
_EXACT = re.compile(rf"(?:.*\.)?({'|'.join(WORDS)})(?:[-_. ]?\d+(?:-of-\d+)?)?")
_SEVERAL = "?"


class Ambiguous(Exception):
    """Some names give a split that is not trained on, and others give none, or two. The message says which."""


def recognized(names: list[str]) -> dict[str, str | None]:
    """The split of each data file (None: none); empty if the names tell of no split besides `train`.

    Args:
        names: of the files that hold data, relative to the folder, without those that describe it.

    Raises:
        Ambiguous: it cannot be told which files are to be trained on.
    """
    shards = {name: _SHARD.fullmatch(PurePosixPath(name).name) for name in names}
    by_shard = {name: match[1] for name, match in shards.items() if match}
    if len(by_shard) == len(names) and len({*by_shard.values()}) > 1 and any(map(_told, by_shard.values())):
        return {**by_shard}
    return _by(names, _of_folders, code=True) or _by(names, _of_name, code=False)


def missing_shards(names: list[str], present: list[str]) -> list[str]:
    """Shards that are not there, of the datasets whose shards are read, a line each.

    Args:
        names: of the files that are read.
        present: of all that are there.
    """
    numbers: dict[tuple[str, int], set[int]] = {}
    for name in present:
        if match := _SHARD.fullmatch(name):
            numbers.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    read = {(match[1], int(match[3])) for match in map(_SHARD.fullmatch, names) if match}
    lines = []
    for stem, count in sorted(read):
        found = numbers[stem, count]
        first = 1 if 0 not in found and count in found else 0  # some count from one
        if gone := [str(number) for number in range(first, first + count) if number not in found]:
            said = f"shard {gone[0]} of {count} is" if len(gone) == 1 else f"shards {listed(gone)} of {count} are"
            lines.append(f"{stem}: {said} missing")
    return lines


def of_card(folder: Path, names: list[str], config: str | None) -> dict[str, str | None]:
    """The split of each file by the folder's dataset card, README.md; empty if the card does not say.

    Raises:
        UserError: it has no such configuration, or several of which none is chosen.
    """
    from huggingface_hub import metadata_load

    file, card = folder / "README.md", {}
    with contextlib.suppress(Exception):  # YAML has errors of its own; such a card says nothing
        card = (metadata_load(file) or {}) if file.is_file() and file.stat().st_size <= MAX_JSON_BYTES else {}
    entries = [entry for entry in _list(card.get("configs")) if isinstance(entry, dict) and "data_files" in entry]
    configs = {str(entry.get("config_name", "default")): entry for entry in entries}
    if config is None:
        by_default = (name for name, entry in configs.items() if entry.get("default") or name == "default")
        config = next(iter(configs if len(configs) == 1 else by_default), None)
    if config is None and configs:
        raise UserError(
            f"data is {str(folder)!r}, of several configurations: pass --data-config, one of {listed(configs)}"
        )
    if config is None:
        return {}
    if config not in configs:
        has = f"it has {listed(configs)}" if configs else "only datasets have one, by their card; leave it out"
        raise UserError(f"data_config is {shown(config)}: {str(folder)!r} has no such configuration: {has}")
    found: dict[str, str | None] = dict.fromkeys(names)
    for part in _list(configs[config]["data_files"]):
        split, patterns = (part.get("split"), part.get("path")) if isinstance(part, dict) else ("train", part)
        for pattern in _list(patterns):
            with contextlib.suppress(ValueError, NotImplementedError, OSError):  # not a pattern below the folder
                matching = {path.relative_to(folder).as_posix() for path in folder.glob(str(pattern))}
                found |= {name: str(split) for name in names if name in matching}
    return found if any(found.values()) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _by(names: list[str], split_of: Callable[[str, bool], str | None], code: bool) -> dict[str, str | None]:
    found = {name: split_of(name, False) if code or not _is_code(name) else None for name in names}
    splits = {*found.values()}
    if not {None, _SEVERAL} & splits and (len(splits) > 1 or not any(map(_is_text, names))):  # each belongs to one
        return found if splits != {"train"} else {}
    found = {name: None if _is_code(name) else split_of(name, _is_text(name)) for name in names}
    if {*found.values()} <= {None, "train"}:
        return {}
    told = [name for name, split in found.items() if split not in (None, _SEVERAL)]
    free = [name for name in names if name not in told]
    texts, code_files = (list(filter(test, free)) for test in (_is_text, _is_code))
    unclear = _SEVERAL in found.values() or (free and "train" not in found.values())
    if unclear or (texts and any(map(_is_text, told))) or len(code_files) > len(told):
        raise Ambiguous(_said(found))
    return found


def _said(found: Mapping[str, str | None]) -> str:
    told = next(name for name, split in found.items() if split not in (None, "train"))
    free = next((name for name, split in found.items() if split is None), None)
    if found[told] == _SEVERAL:
        return f"{told!r} tells two splits"
    return f"{told!r} tells the split {found[told]!r}, and {free!r} tells none"


def _is_code(name: str) -> bool:
    return not {".py", ".md"}.isdisjoint(PurePosixPath(name.lower()).suffixes)


def _is_text(name: str) -> bool:
    return kind_of(PurePosixPath(name)) == "text" and not _is_code(name)


def _of_folders(name: str, exact: bool) -> str | None:
    return _one({split for part in PurePosixPath(name).parts[:-1] if (split := _told(part, exact))})


def _of_name(name: str, exact: bool) -> str | None:
    file = PurePosixPath(name).name
    while kind_of(PurePosixPath(file)) is not None:  # without its endings
        file = file.rpartition(".")[0]
    return _told(file, exact)


def _told(part: str, exact: bool = False) -> str | None:
    if exact:
        match = _EXACT.fullmatch(part.lower())
        return WORDS[match[1]] if match else None
    return _one({WORDS[word] for word in re.split(r"[-._ \d]+", part.lower()) if word in WORDS})


def _one(splits: set[str]) -> str | None:
    return None if not splits else splits.pop() if len(splits) == 1 else _SEVERAL
