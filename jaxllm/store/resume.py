"""Every reason to refuse the resume of a run. Imports neither JAX nor PyTorch.

In the order in which a start checks them: the folder is something else (`check_folder`); the run started from other
weights (`check_init`), with other options (`check_resumable`) or on other data (`check_data`); its checkpoints are
damaged, or not of this config and tokenizer (`choose_checkpoint`), or of another format (`check_format`). A value that
a checkpoint stores is checked by what decodes it: `Position.from_bytes`, `History.from_json`, and the source that
takes up its position (file by file: `jaxllm.data.fingerprint`).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.config import FORMAT, SPECIAL_TOKENS, RunConfig, changed_options, families
from jaxllm.config.groups import DataConfig
from jaxllm.data.sources import is_fingerprint
from jaxllm.errors import UserError, shown
from jaxllm.files import StrPath, read_json
from jaxllm.store.base import BASE_FILE
from jaxllm.store.checksums import checkpoint_context, find_damage, read_list
from jaxllm.store.folder import (
    CHECKPOINTS,
    CONFIG_FILE,
    MODEL_FILE,
    OVERWRITING,
    TOKENIZER,
    Framework,
    checkpoint_owner,
    checkpoint_steps,
    is_run,
    read_config,
    read_model_config,
)
from jaxllm.store.lock import LOCK_FILE
from jaxllm.store.source import model_folder

# How a run is handed over to each framework.
HAND_OVER = {"JAX": "python -m convert to-flax {run} OUT", "PyTorch": "python -m convert to-torch {run} OUT --training"}


def check_folder(folder: Path, framework: Framework, overwrite: bool) -> bool:
    """Whether a run's folder holds a run to resume, which `overwrite` prevents; nothing is changed.

    Raises:
        UserError: the folder is something else, or a run of the other framework.
    """
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise UserError(f"run_dir is {str(folder)!r}: that is a file; pass another --run-dir")
    owner = checkpoint_owner(folder)
    # Not `checkpoint-*`: any project's Trainer writes such folders, next to any config.json.
    ours = (folder / CONFIG_FILE).is_file() or is_run(folder) or (folder / OVERWRITING).exists()
    if not ours and not all(path.name.startswith((LOCK_FILE, f".{CONFIG_FILE}.")) for path in folder.iterdir()):
        raise UserError(f"run_dir is {str(folder)!r}: the folder holds something else; pass another --run-dir")
    if not ours or overwrite or (folder / OVERWRITING).exists():
        return False
    if not (folder / CONFIG_FILE).is_file() and not checkpoint_steps(folder):
        raise UserError(
            f"run_dir is {str(folder)!r}: `convert to-flax` was stopped there before it wrote the weights; convert "
            "again into a new folder"
        )
    if owner not in (None, framework):
        raise UserError(
            f"run_dir is {str(folder)!r}: it holds a {owner} run; hand it over with "
            f"`{HAND_OVER[framework].format(run=folder)}`, or pass another --run-dir"
        )
    return True


def check_init(init: Path | None, run: Path, saved: dict[str, Any]) -> None:
    """Raise a UserError if a run with these saved options started from something else than --init. A run of an earlier
    version does not know what it started from."""
    if init is None or (saved and "init" not in saved) or saved.get("lora_rank"):  # of a base the content decides
        return
    before = saved.get("init")
    if before is None or Path(before).resolve() != model_folder(init).resolve():
        start = "the weights in it" if not saved else "new weights" if before is None else repr(before)
        raise UserError(
            f"init is {str(init)!r}, and the run in {run} started from {start}: leave the option out to "
            "resume it, or pass another --run-dir"
        )


def check_resumable(config: RunConfig) -> None:
    """Raise a UserError, which names them, if options that change a run's numbers are not those in its folder."""
    if (config.folder / CONFIG_FILE).is_file():
        saved = read_config(config.folder, type(config)).to_dict()
        saved |= {"data_streams": saved.get("data_streams") or 1} if "data_streams" in saved else {}
    else:  # made by the converter: weights without a training history, which take the tokenizer's special tokens
        model = read_json(config.folder / MODEL_FILE)
        model |= {name: config.model.to_dict()[name] for name in SPECIAL_TOKENS}
        saved = config.to_dict() | {"model": model}
    if changed := changed_options(saved, config):
        was = "; ".join(f"{name} is {shown(now)}, and the run has {shown(before)}" for name, before, now in changed)
        raise UserError(
            f"{was}: the run in {config.folder} cannot be resumed with "
            f"{'that; leave the option out' if len(changed) == 1 else 'these; leave the options out'}, or pass another "
            "--run-dir"
        )


def check_data(data: DataConfig, saved: dict[str, Any]) -> None:
    """Raise a UserError if the data differ from those of the run's saved config. They may have another name. Of files
    by the same name, the data position shows which one differs."""
    before = saved.get("data")
    has_same_name = data.source == before and is_fingerprint(data.revision)
    if data.revision != saved.get("data_revision") and not has_same_name:
        raise UserError(
            f"data is {shown(data.source)}, and the run has {shown(before)}: the content differs; leave the option "
            "out, pass --overwrite to start over, or another --run-dir"
        )


class Choice(NamedTuple):
    """Which checkpoint of a run is read."""

    step: int | None  # the newest undamaged one; None: the run has no checkpoint
    damaged: list[int]  # newer ones


def choose_checkpoint(run: StrPath, *, strict: bool = False, before: int | None = None) -> Choice:
    """The newest checkpoint whose checksums agree; each damaged one that is newer is named in a line on stderr.

    A run that is training may remove a checkpoint while it is read, because it has saved a newer one: that is read.

    Args:
        run: the run's folder.
        strict: refuse to use an older checkpoint in place of a damaged one.
        before: consider only checkpoints of earlier steps than this.

    Raises:
        UserError: all are damaged, or one is and `strict` is set; or the model's config or the tokenizer is not the
            one that the checkpoint was written with.
    """
    run = Path(run)
    folder, steps = run / CHECKPOINTS, checkpoint_steps(run)
    damaged: list[int] = []
    for step in reversed(steps):
        if before is not None and step >= before:
            continue
        damage = find_damage(folder / str(step))
        if damage is None:
            _check_context(run, folder / str(step))
            return Choice(step, damaged)
        if checkpoint_steps(run)[-1:] > steps[-1:]:
            return choose_checkpoint(run, strict=strict, before=before)
        if strict:
            raise UserError(
                f"the checkpoint {folder / str(step)} is damaged ({damage}): "
                "leave out --strict to use the one before it, or put the file back"
            )
        print(f"warning: the checkpoint {folder / str(step)} is damaged ({damage})", file=sys.stderr)
        damaged.append(step)
    if damaged:
        earlier = "" if before is None else f" before step {before}"
        raise UserError(
            f"{folder} holds no checkpoint{earlier} that is not damaged: put the files back, or start "
            "over in another --run-dir"
        )
    return Choice(None, damaged)


def _check_context(run: Path, checkpoint: Path) -> None:
    written, now = read_list(checkpoint) or {}, checkpoint_context(run)
    if written.get("base") != now["base"]:
        raise UserError(f"{run / BASE_FILE} is not the file that {checkpoint} was written with: put it back")
    if now["tokenizer"] is not None and written.get("tokenizer") not in (None, now["tokenizer"]):
        raise UserError(
            f"{run / TOKENIZER / 'tokenizer.json'} is not the file that {checkpoint} was written with: put it back"
        )
    if written.get("model") is None:
        return
    model = read_model_config(run)
    # weights from elsewhere take the special tokens of the tokenizer that they are trained with
    free = SPECIAL_TOKENS if written.get("tokenizer") is None or checkpoint.name == "0" else ()
    if families.read_config(written["model"] | {name: model.to_dict()[name] for name in free}) != model:
        raise UserError(f"{run / MODEL_FILE} is not the config that {checkpoint} was written with: put it back")


def check_format(checkpoint: Path) -> None:
    """Raise a UserError for training state of another version's format; its weights can be read."""
    if (written := (read_list(checkpoint) or {}).get("format", FORMAT)) != FORMAT:
        raise UserError(
            f"the checkpoint {checkpoint} has format {written}, and this version resumes format "
            f"{FORMAT} (see CHANGELOG.md): finish the run with the version that wrote it, or export its weights "
            "with `python -m convert to-torch` and start a new run from them"
        )
