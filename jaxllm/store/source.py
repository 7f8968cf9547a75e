"""The folder that a run's weights came from: found, and its other files kept byte for byte for the export.

A run keeps them in RUN/source, and the tokenizer's, if it is read, in RUN/tokenizer. Python files are copied and never
imported.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.config import ModelConfig
from jaxllm.data.tokenizer_files import has_tokenizer, is_tokenizer_file
from jaxllm.errors import UserError, listed, shown
from jaxllm.files import StrPath, read_json, rename_durably
from jaxllm.store.folder import SOURCE, TOKENIZER

GENERATION_CONFIG = "generation_config.json"

WEIGHT_ENDINGS = (
    ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json", ".pkl", ".ckpt",
)  # fmt: skip
"""Of files that hold weights, or say where they are: other files are kept."""

MAX_BYTES = 64 * 2**20
MAX_FILES = 1000
"""Limits of what is kept: a larger folder is not a model's."""


class SourceFiles(NamedTuple):
    """Files to keep."""

    places: dict[str, Path]
    """For each path in the run, the file that is copied there."""
    left_out: list[str]
    """What is not kept, and is neither weights nor hidden."""

    def write(self, run: Path) -> None:
        """Copy them into a run's folder: each of its folders atomically."""
        parts = {name.partition("/")[0] for name in self.places}
        for part in sorted(parts, reverse=True):  # `SOURCE` last: it marks the copy as complete
            if (run / part).exists():
                continue
            with tempfile.TemporaryDirectory(dir=run, prefix=f".{part}.") as scratch:
                for name, file in self.places.items():
                    if name.startswith(f"{part}/"):
                        copy = Path(scratch) / name
                        copy.parent.mkdir(parents=True, exist_ok=True)
                        shutil.copyfile(file, copy)
                rename_durably(Path(scratch) / part, run / part)
        if self.left_out:
            print(f"Not kept for the export, too large or not a file: {listed(self.left_out)}", file=sys.stderr)


def model_folder(given: StrPath) -> Path:
    """A folder or a file as it is; for a model's Hub name, its folder in the Hub's cache; else a UserError."""
    path = Path(given)
    if path.exists() or path.is_absolute() or len(path.parts) != 2 or path.parts[0] in ("..", "~"):
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), local_files_only=True))
    except Exception:  # the client's own kinds: not cached, or no name of a model
        raise UserError(
            f"{str(path)!r} is not a folder, and the Hub's cache does not hold a model of that name: "
            f"`hf download {path}` puts it there"
        ) from None


def hub_name(folder: Path) -> tuple[str, str] | None:
    """The repository and the commit of a folder in the Hub's cache; None: it is another folder."""
    kind, *name = folder.parent.parent.name.split("--")
    return ("/".join(name), folder.name) if kind == "models" and folder.parent.name == "snapshots" else None


def source_files(folder: Path, tokenizer: bool = True) -> SourceFiles:
    """The files of a model's folder that a run keeps.

    Args:
        folder: of the model; without a config.json, only what is a model's by its name is kept.
        tokenizer: whether the run takes its tokenizer, if that is of a kind that is read.
    """
    tokenizer = tokenizer and has_tokenizer(folder)  # else its files return in the export
    places, left_out = {}, []
    whole = (folder / "config.json").is_file()
    for file in _files(folder, recursive=whole):
        name = file.relative_to(folder).as_posix()
        of_tokenizer = is_tokenizer_file(name)
        if not (whole or of_tokenizer or name == GENERATION_CONFIG):
            continue
        if len(places) == MAX_FILES or not _may_be_kept(file, folder):
            left_out.append(name)
        else:
            places[f"{TOKENIZER if tokenizer and of_tokenizer else SOURCE}/{name}"] = file
    return SourceFiles(places, left_out)


def tokenizer_files(folder: Path) -> SourceFiles:
    """The files of a folder's tokenizer, for a run that takes it in place of its source's."""
    found = source_files(folder).places if folder.is_dir() else {}  # a Hub name has no files here
    return SourceFiles({name: file for name, file in found.items() if name.startswith(f"{TOKENIZER}/")}, [])


def keep_source(folder: Path, run: Path, tokenizer: Path) -> None:
    """Keep a model's folder in a run that starts from it, with the tokenizer of that folder or of another."""
    own = tokenizer.resolve() == folder.resolve()
    if not own:
        print(f"The tokenizer is that of {tokenizer}: the export will have it in place of the one of {folder}")
        tokenizer_files(tokenizer).write(run)
    source_files(folder, tokenizer=own).write(run)


def note_end_tokens(run: Path, model: ModelConfig, tokenizer: Any) -> None:
    """Say in a line where a source's files end a text with other tokens than training does."""
    eos, named = tokenizer.eos_token_id, {}
    for name in ("config.json", GENERATION_CONFIG):
        if (file := kept_files(run).get(name)) is not None:
            named[name] = read_json(file).get("eos_token_id")
    if any(ids not in (None, eos, [eos]) for ids in named.values()):
        said = ", ".join(f"{name} {shown(ids)}" for name, ids in named.items())
        ours = listed(map(str, model.eos_token_ids))
        print(f"End of a text: in training the token {eos}; of the source, {said}; in the export's config.json {ours}")


def _files(folder: Path, recursive: bool) -> list[Path]:
    """All files but weights and hidden ones, in order."""
    found = []
    for inner, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if recursive and not name.startswith((".", "__pycache__"))]
        found += [Path(inner, name) for name in names if not name.startswith(".") and not name.endswith(WEIGHT_ENDINGS)]
    return sorted(found)


def _may_be_kept(file: Path, folder: Path) -> bool:
    """A regular file of some megabytes; a link only within the folder, or to the blobs of the Hub's cache."""
    real = file.resolve()
    homes = (folder.resolve(), folder.absolute().parent.parent / "blobs")
    return real.is_file() and real.stat().st_size <= MAX_BYTES and any(real.is_relative_to(home) for home in homes)


def kept_files(run: Path) -> dict[str, Path]:
    """The files that a run keeps of its source's folder, by their path there; the tokenizer of the run among them."""
    found = {}
    for part in (SOURCE, TOKENIZER):
        if part == TOKENIZER and (run / part).is_dir():  # it replaces the source's
            found = {name: file for name, file in found.items() if not is_tokenizer_file(name)}
        folder = run / part
        found |= {file.relative_to(folder).as_posix(): file for file in _files(folder, recursive=True)}
    for old, name in (("source_config.json", "config.json"), (GENERATION_CONFIG, GENERATION_CONFIG)):
        if (run / old).is_file():  # of a run of an earlier version
            found[name] = run / old
    return found


def read_source(run: StrPath) -> dict[str, Any] | None:
    """The config.json that a run's weights came with; None: they came from no folder."""
    file = kept_files(Path(run)).get("config.json")
    return None if file is None else read_json(file)
