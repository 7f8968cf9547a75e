"""What a run's folder holds, and whose it is. Imports neither JAX nor PyTorch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal, TypeVar

from jaxllm.config import ModelConfig, RunConfig, TrainConfig, families
from jaxllm.errors import UserError
from jaxllm.files import StrPath, read_json
from jaxllm.store.lock import LOCK_FILE

MODEL_FILE = "config.json"  # the model's shape
CONFIG_FILE = "train_config.json"  # how it is trained
TOKENIZER = "tokenizer"  # a folder
SOURCE = "source"  # folder of the files that came with the weights
SOURCE_DTYPES = "source_dtypes.json"  # of the weights that the run started from
CHECKPOINTS = "checkpoints"  # in it, for each saved step: weights, training, history, positions; checksums.json
METRICS_FILE = "metrics.jsonl"
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's: transformers adds the adapter of that file to weights beside it
DATA_REPORT = "data_report.json"  # what the run reads (`jaxllm.data.report`), as its last start found it
OVERWRITING = f".{CONFIG_FILE}.overwriting"  # while --overwrite deletes an earlier run: what is left is not resumed

Framework = Literal["JAX", "PyTorch"]

Config = TypeVar("Config", bound=RunConfig)


def is_run(folder: StrPath) -> bool:
    """Whether a folder holds JAX checkpoints: a run of train.py, or one that the converter made without a history."""
    return Path(folder, MODEL_FILE).is_file() and Path(folder, CHECKPOINTS).is_dir()


def checkpoint_owner(folder: StrPath) -> Framework | None:
    """The framework whose checkpoints a run's folder holds; None: it has no checkpoints yet."""
    if any(Path(folder).glob("checkpoint-*/")):
        return "PyTorch"
    if any(Path(folder, CHECKPOINTS).glob("*/")):
        return "JAX"
    return None


def checkpoint_steps(run: StrPath) -> list[int]:
    """Steps of the checkpoints in a run's folder, ascending."""
    names = [path.name for path in Path(run, CHECKPOINTS).glob("*/")]
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))


def read_config(run: StrPath, kind: type[Config]) -> Config:
    """The config of a run. Raises a UserError if the file is missing or not valid."""
    run = Path(run)
    try:
        return kind.from_dict(read_json(run / CONFIG_FILE)).with_options(run_dir=run)
    except UserError as error:
        raise UserError(f"{str(run)!r} is not a training run: {error}") from None


def adapters_of(run: StrPath) -> TrainConfig | None:
    """The config of a run that trains adapters; None: it trains all weights, or is not a run folder."""
    file = Path(run, CONFIG_FILE)
    # a run of another format has no adapters, and its weights can be read
    has_adapters = is_run(run) and file.is_file() and read_json(file).get("lora_rank")
    return read_config(run, TrainConfig) if has_adapters else None


def read_model_config(folder: StrPath) -> ModelConfig:
    """The model's shape from the config.json of a run or of a folder with weights.

    Raises:
        UserError: the file is missing, its family is not known, or it is not valid.
    """
    file = Path(folder, MODEL_FILE)
    if not file.is_file() and (file.parent / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{str(file.parent)!r} holds an adapter without its model: pass the run that trained it, or what "
            f"`{merging(file.parent)}` writes; to continue it, pass it to train.py as --adapter, beside --init with "
            "its model"
        )
    if not file.is_file():
        raise UserError(f"{str(file.parent)!r} is neither a run folder nor an exported model: it has no config.json")
    try:
        return families.read_config(read_json(file))
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def merging(adapter: Path) -> str:
    """How PEFT merges an adapter into its model."""
    return f"PeftModel.from_pretrained(MODEL, {str(adapter)!r}).merge_and_unload().save_pretrained(OUT)"


def clear(folder: Path) -> None:
    """Delete an earlier run. A process may be killed meanwhile: a file then says that the rest is to be deleted."""
    (folder / OVERWRITING).touch()
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != OVERWRITING and not path.name.startswith(LOCK_FILE):
            path.unlink()
