"""What precedes training in either framework: the command line, the run's folder, the tokenizer, the held-out rows.

Everything that can be refused is refused here. Imports neither JAX nor PyTorch.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np

from jaxllm.command_line import expanded, parse
from jaxllm.config import (
    DEFAULT_RECIPE,
    SPECIAL_TOKENS,
    ModelConfig,
    RunConfig,
    TrainConfig,
    changed_options,
    families,
    recipe,
)
from jaxllm.data.epochs import steps_for_epochs
from jaxllm.data.sources import check_new_data, is_fingerprint, open_source
from jaxllm.data.stream import check_streams
from jaxllm.data.tokenizer import (
    align,
    bytes_per_target,
    encode_prompt,
    load_tokenizer,
    save_tokenizer,
    train_or_recall_tokenizer,
    with_pad_token,
    without_dropout,
)
from jaxllm.errors import UserError, shown
from jaxllm.files import StrPath, delete_leftovers, read_json, rename_durably, write_json
from jaxllm.run import held_out
from jaxllm.run.hardware import bfloat16_hardware
from jaxllm.run.lock import LOCK_FILE, FolderLock
from jaxllm.run.metrics import DATA_REPORT
from jaxllm.run.source import SOURCE, keep_source, model_folder, note_end_tokens, read_source, tokenizer_files
from jaxllm.run.trackers import check_tracker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG_FILE = "train_config.json"
OVERWRITING = f".{CONFIG_FILE}.overwriting"
"""In the folder of an earlier run while --overwrite deletes it: what is left of that run is not resumed."""

INIT_LEARNING_RATE = 2e-5
"""Peak learning rate of a run that starts from trained weights, read by --init or made by the converter."""

Framework = Literal["JAX", "PyTorch"]

# How a run is handed over to each framework.
HAND_OVER = {"JAX": "python -m convert to-flax {run} OUT", "PyTorch": "python -m convert to-torch {run} OUT --training"}

Config = TypeVar("Config", bound=RunConfig)


class Prepared(NamedTuple, Generic[Config]):
    config: Config  # aligned with the tokenizer
    tokenizer: PreTrainedTokenizerBase
    held_out: np.ndarray  # (n,T) int32, the rows that are evaluated
    resumes: bool  # whether the folder holds a run to resume

    @property
    def bytes_per_target(self) -> float:
        """UTF-8 bytes of text for each token that the evaluation predicts."""
        return bytes_per_target(self.tokenizer, self.held_out)


def parse_args(argv: Sequence[str] | None, prog: str, description: str | None, kind: type[Config]) -> Config:
    """The config of a command line.

    The defaults are those of the run in the folder, or else of the recipe and the preset; options override single
    values.

    Raises:
        UserError: the folder's config, the recipe, the preset or a value is not valid.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    first.add_argument("--recipe")
    first.add_argument("--run-dir", type=expanded)
    first.add_argument("--overwrite", "--no-overwrite", dest="start_over", action="store_true")
    first.add_argument("--mesh")
    first.add_argument("--parallel")
    if kind is TrainConfig:
        first.add_argument("--init", type=expanded)
    first.add_argument("--steps")
    first.add_argument("--epochs")
    chosen, _ = first.parse_known_args(argv)
    if None not in (chosen.steps, chosen.epochs):
        raise UserError(
            f"epochs is {shown(chosen.epochs)}: --steps {chosen.steps} says the same, leave out one of them"
        )
    default = recipe(chosen.recipe or "default", chosen.preset or "tiny", kind)
    if kind is TrainConfig and default.recipe == "default" and bfloat16_hardware():
        default = default.with_options(precision="bfloat16")
    start: Path | None = getattr(chosen, "init", None)
    if start is not None:
        if chosen.preset is not None:
            raise UserError(f"preset is {shown(chosen.preset)}: --init gives the model, leave out one of the two")
        model = read_model_config(model_folder(start))
        default = _of_trained(default, model).with_options(init=start, tokenizer=str(model_folder(start)))
    folder = chosen.run_dir or default.folder
    resumes = not (chosen.start_over or (folder / OVERWRITING).exists())
    saved = _saved_config(folder, kind) if resumes else None
    if saved is None and chosen.preset is None and start is None and resumes and _is_converted(folder):
        default = _of_trained(default, read_model_config(folder))
    if saved is not None:
        same = chosen.preset in (None, saved.preset) and chosen.recipe in (None, saved.recipe)
        default = saved if same else default
        if chosen.mesh is not None or chosen.parallel is not None:  # one choice: the saved half of it does not hold
            default = default.with_options(mesh="", parallel="jit")
    if chosen.steps is not None:
        default = default.with_options(epochs=None)  # those of the run in the folder
    return parse(kind, argv, prog, description, default=default)


def _of_trained(config: Config, model: ModelConfig) -> Config:
    """A config for a model that is trained already: AdamW at a low rate, rows no longer than the model's positions."""
    if config.recipe == "default":  # which is for new weights
        plain = type(config)().options()
        config = config.with_options(**{name: plain[name] for name in DEFAULT_RECIPE})
    seq_len = min(config.data.seq_len, model.max_position_embeddings)
    return config.with_options(model=model, seq_len=seq_len, learning_rate=INIT_LEARNING_RATE)


def read_model_config(folder: StrPath) -> ModelConfig:
    """The model's shape from the config.json of a run or of a folder with weights.

    Raises:
        UserError: there is none, its family is not known, or it is not valid.
    """
    file = Path(folder, "config.json")
    if not file.is_file():
        raise UserError(f"{str(file.parent)!r} is no run and no exported model: it holds no config.json")
    try:
        return families.read_config(read_json(file))
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _is_converted(folder: Path) -> bool:
    """Whether it is a run's folder that the converter made: weights without a training history."""
    return (folder / "config.json").is_file() and (folder / "checkpoints").is_dir()


def _saved_config(folder: Path, kind: type[Config]) -> Config | None:
    """The config of the run in a folder; None if there is none, or if the run is of the other framework."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        return None
    values = read_json(file)
    known = kind().to_dict().keys()
    if not values.keys() <= known:
        return None  # `check_folder` refuses it with a better message
    try:
        return kind.from_dict(values).with_options(run_dir=folder)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def read_config(run: StrPath, kind: type[Config]) -> Config:
    """The config of a run.

    Raises:
        UserError: there is none, or it is not valid.
    """
    run = Path(run)
    try:
        return kind.from_dict(read_json(run / CONFIG_FILE)).with_options(run_dir=run)
    except UserError as error:
        raise UserError(f"{str(run)!r} is no training run: {error}") from None


def checkpoint_owner(folder: StrPath) -> Framework | None:
    """The framework whose checkpoints a run's folder holds; None: it holds none yet."""
    if any(Path(folder).glob("checkpoint-*/")):
        return "PyTorch"
    if any(Path(folder).glob("checkpoints/*/")):
        return "JAX"
    return None


def check_folder(config: RunConfig, framework: Framework) -> bool:
    """Whether the run's folder holds a run to resume; nothing is changed.

    Raises:
        UserError: the folder is something else, or a run of the other framework.
    """
    folder = config.folder
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise UserError(f"run_dir is {str(folder)!r}: that is a file")
    owner = checkpoint_owner(folder)
    # Not `checkpoint-*`: any project's Trainer writes such folders, next to any config.json.
    ours = (folder / CONFIG_FILE).is_file() or _is_converted(folder) or (folder / OVERWRITING).exists()
    if not ours and not all(path.name.startswith((LOCK_FILE, f".{CONFIG_FILE}.")) for path in folder.iterdir()):
        raise UserError(f"run_dir is {str(folder)!r}: the folder holds something else; pass another --run-dir")
    if not ours or config.overwrite or (folder / OVERWRITING).exists():
        return False
    if owner not in (None, framework):
        raise UserError(
            f"run_dir is {str(folder)!r}: it holds a {owner} run; hand it over with "
            f"`{HAND_OVER[framework].format(run=folder)}`, or pass another --run-dir"
        )
    return True


def check_resumable(config: RunConfig) -> None:
    """Compare with the config in the run's folder.

    Raises:
        UserError: options that change the run's numbers have other values; all of them are named.
    """
    if (config.folder / CONFIG_FILE).is_file():
        saved = read_config(config.folder, type(config)).to_dict()
        saved |= {"data_streams": saved.get("data_streams") or 1} if "data_streams" in saved else {}
    else:  # made by the converter: weights without a training history, which take the tokenizer's special tokens
        model = read_json(config.folder / "config.json")
        model |= {name: config.model.to_dict()[name] for name in SPECIAL_TOKENS}
        saved = config.to_dict() | {"model": model}
    if changed := changed_options(saved, config):
        was = "; ".join(f"{name} is {shown(now)}, and the run has {shown(before)}" for name, before, now in changed)
        raise UserError(
            f"{was}: the run in {config.folder} cannot be resumed with "
            f"{'that' if len(changed) == 1 else 'these'}; leave the option out, or "
            "pass another --run-dir"
        )


def check_data(config: RunConfig, saved: dict[str, Any]) -> None:
    """Compare the data with those of the run's saved config. They may have another name.

    Raises:
        UserError: they are others. Of files by the same name, the data position tells which one differs.
    """
    name, before = config.data.source, saved.get("data")
    if config.data.revision != saved.get("data_revision") and not (
        name == before and is_fingerprint(config.data.revision)
    ):
        raise UserError(
            f"data is {shown(name)}, and the run has {shown(before)}: the content is another; leave the option out, "
            "pass --overwrite to start over, or another --run-dir"
        )


def prepare(config: Config, framework: Framework, lock: FolderLock, processes: int = 1) -> Prepared[Config]:
    """Check everything before anything is computed or deleted, and write what identifies the run's folder.

    Args:
        config: as the user gave it.
        framework: the one that trains.
        lock: of the run's folder; it is taken here.
        processes: that share the run; a new run then has as many data streams, unless the config says otherwise.

    Raises:
        UserError: the folder, the data, the tokenizer or a prompt does not fit the config.
    """
    if framework == "PyTorch" and families.names_of(config.model) != "customllm":
        raise UserError(f"preset is {shown(config.preset)}: python -m torch_ref.train trains CustomLLM alone")
    check_tracker(config)
    check_folder(config, framework)  # before anything is written there
    lock.take()
    delete_leftovers(config.folder)
    resumes = check_folder(config, framework)
    file = config.folder / CONFIG_FILE
    saved = read_json(file) if resumes and file.is_file() else {}
    if resumes:
        _check_init(config, saved)
    config = _with_kept_options(config, saved, processes)
    source_folder = _new_source(config)
    if source_folder is not None:
        origin = read_json(source_folder / "config.json")
    else:
        origin = read_source(config.folder) if resumes else None
    families.check_trainable(origin or {})
    own_tokenizer = config.folder / "tokenizer"
    tokenizer = load_tokenizer(str(own_tokenizer)) if resumes and own_tokenizer.is_dir() else None
    if tokenizer is not None:  # before anything else is refused: one message names all options that were changed
        with contextlib.suppress(UserError):  # a vocabulary that is too small is one of them
            config = align(config, tokenizer)
        check_resumable(config)
    source = open_source(config)
    if not resumes:
        check_new_data(config, source)
    for line in source.notes:
        print(f"Not read: {line}")
    config = config.with_options(data_revision=source.revision, hold_out=source.hold_out)
    if saved:
        check_data(config, saved)
    given = config.data.tokenizer
    if given is None and (source_folder is not None or (resumes and checkpoint_owner(config.folder))):
        # never a new one for weights that are trained
        given = str(
            next(path for path in (source_folder, config.folder / SOURCE, config.folder) if path and path.is_dir())
        )
    if tokenizer is None and given is not None:
        tokenizer = load_tokenizer(given)
        tokenizer = with_pad_token(tokenizer, config) if origin is None else tokenizer
    elif tokenizer is None:
        tokenizer = train_or_recall_tokenizer(source, config.model.vocab_size, config.data.source)
    config = align(config, without_dropout(tokenizer))
    if resumes and not own_tokenizer.is_dir():
        check_resumable(config)
    limit, sampling = config.model.max_position_embeddings, config.sampling
    special = config.data.special_tokens_in_text
    longest = max((len(encode_prompt(tokenizer, prompt, special)) for prompt in sampling.prompts), default=0)
    if sampling.sample_tokens and longest >= limit:
        raise UserError(
            f"prompts has one of {longest} tokens: max_position_embeddings = {limit} leaves no room after it; pass "
            "shorter --prompts or --sample-tokens 0"
        )
    check_streams(config)
    evaluated = held_out.read_or_make(config, tokenizer, source, resumes)
    if not bytes_per_target(tokenizer, evaluated.rows):
        raise UserError("data: the tokens of the held-out part have no text: pass another --tokenizer")
    if config.schedule.epochs is not None and saved.get("epochs") != config.schedule.epochs:
        config = config.with_options(steps=steps_for_epochs(config, tokenizer))
    if not resumes:
        _clear(config.folder)
    # First what identifies the folder as ours: a process may be killed between any two lines.
    write_json(file, config.to_dict())
    (config.folder / OVERWRITING).unlink(missing_ok=True)
    write_json(config.folder / "config.json", config.model.to_dict())
    if source_folder is not None:
        keep_source(source_folder, config.folder, Path(given or source_folder))
    elif origin is not None and given is not None and not own_tokenizer.is_dir():
        tokenizer_files(Path(given)).write(config.folder)
    if origin is not None and not saved:
        note_end_tokens(config.folder, config.model, tokenizer)
    if not own_tokenizer.is_dir():
        _save_tokenizer(tokenizer, own_tokenizer)
    held_out.keep(config, source, evaluated)
    report = held_out.data_report(config, tokenizer, source, evaluated)
    write_json(config.folder / DATA_REPORT, report.to_dict())
    for line in report.lines():
        print(f"Data: {line}")
    return Prepared(config, tokenizer, evaluated.rows, resumes)


def _new_source(config: RunConfig) -> Path | None:
    """The folder of --init, unless the run has its weights, and the files that came with them, already."""
    init = getattr(config, "init", None)
    taken = checkpoint_owner(config.folder) is not None or (config.folder / SOURCE).is_dir()
    return None if init is None or (taken and not config.overwrite) else model_folder(init)


def _check_init(config: RunConfig, saved: dict[str, Any]) -> None:
    """Compare --init with what a run started from; a run of an earlier version does not know it.

    Raises:
        UserError: it started from something else, and would go on from that.
    """
    init = getattr(config, "init", None)
    if init is None or (saved and "init" not in saved):
        return
    before = saved.get("init")
    if before is None or Path(before).resolve() != model_folder(init).resolve():
        start = "the weights in it" if not saved else "new weights" if before is None else repr(before)
        raise UserError(
            f"init is {str(init)!r}, and the run in {config.folder} started from {start}: leave the option out to "
            "resume it, or pass another --run-dir"
        )


def keep_left_out(config: RunConfig, left_out: Iterable[str]) -> None:
    """Name damaged files in the run's config: they may be gone when it is resumed."""
    skip = ",".join(dict.fromkeys([*config.data.skip_data.split(","), *(name.replace(",", "?") for name in left_out)]))
    write_json(config.folder / CONFIG_FILE, config.with_options(skip_data=skip.strip(",")).to_dict())


def _with_kept_options(config: Config, saved: dict[str, Any], processes: int) -> Config:
    """Set what a run decides at its first start and then keeps: streams, dataset commit, the source of its weights."""
    facts: dict[str, Any] = {}
    if "init" in config.options() and (init := config.options()["init"] or saved.get("init")) is not None:
        facts["init"] = model_folder(init).absolute()
    if "data_streams" in config.options() and config.options()["data_streams"] is None:
        facts["data_streams"] = (saved.get("data_streams") or 1) if saved else processes
    if config.data.revision is None:
        facts["data_revision"] = saved.get("data_revision")
    facts["hold_out"] = saved.get("hold_out", "count") if saved else None
    return config.with_options(**facts)


def _clear(folder: Path) -> None:
    """Delete an earlier run. A process may be killed meanwhile: a file then says that the rest is to be deleted."""
    (folder / OVERWRITING).touch()
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != OVERWRITING and not path.name.startswith(LOCK_FILE):
            path.unlink()


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save it atomically: an incomplete one would be read as the run's tokenizer."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        made = Path(scratch) / folder.name
        try:
            made.mkdir()
            save_tokenizer(tokenizer, made)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(folder)) from None  # not the scratch folder
        rename_durably(made, folder)
