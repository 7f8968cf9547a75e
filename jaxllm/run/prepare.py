"""Prepares a run of either framework: refuses what would fail later, then writes the run's folder.

Imports neither JAX nor PyTorch.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple

import numpy as np

from jaxllm.config import RunConfig, families
from jaxllm.config.groups import CODE_PROMPTS, STORY_PROMPTS, SamplingConfig
from jaxllm.data.chats import first_question
from jaxllm.data.epochs import steps_for_epochs
from jaxllm.data.held_out import read_held_out
from jaxllm.data.mixture import holds_chats
from jaxllm.data.source import Source
from jaxllm.data.sources import check_new_data, open_source
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
from jaxllm.data.tokenizer_class import check_tokenizer_class
from jaxllm.errors import UserError, note, shown
from jaxllm.files import delete_leftovers, read_json, rename_durably, write_json
from jaxllm.model.batch import IGNORED, token_batch
from jaxllm.run.data_report import report_data
from jaxllm.run.trackers import check_tracker
from jaxllm.store.folder import (
    CONFIG_FILE,
    MODEL_FILE,
    OVERWRITING,
    SOURCE,
    TOKENIZER,
    Config,
    Framework,
    checkpoint_owner,
    clear,
)
from jaxllm.store.held_out_file import HeldOutFile
from jaxllm.store.lock import FolderLock
from jaxllm.store.resume import check_data, check_folder, check_init, check_resumable
from jaxllm.store.source import keep_source, model_folder, note_end_tokens, read_source, tokenizer_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MOST_CHATS = 1000
"""Most held-out chats that are searched for questions to answer in the samples."""


class Prepared(NamedTuple, Generic[Config]):
    config: Config  # aligned with the tokenizer
    tokenizer: PreTrainedTokenizerBase
    held_out: np.ndarray  # (n,T) int32, the rows that are evaluated (`jaxllm.model.batch`)
    resumes: bool  # whether the folder holds a run to resume

    @property
    def eval_targets(self) -> int | None:
        """Targets of these rows; None where all tokens but the first of a row are targets."""
        data = self.config.data
        return int((token_batch(self.held_out, data).labels[:, 1:] != IGNORED).sum()) if data.has_targets else None

    @property
    def bytes_per_target(self) -> float:
        """UTF-8 bytes of text for each token that the evaluation predicts."""
        return bytes_per_target(self.tokenizer, self.held_out, self.config.data)


def prepare(
    config: Config, framework: Framework, lock: FolderLock, processes: int = 1, bfloat16: str | None = None
) -> Prepared[Config]:
    """Check everything before anything is computed or deleted, and write what identifies the run's folder.

    Args:
        config: as the user gave it.
        framework: the one that trains.
        lock: of the run's folder; it is taken here.
        processes: number of processes that share the run; a new run has as many data streams, unless the config says.
        bfloat16: name of the devices' bfloat16 hardware, if they have it; decides the precision `auto` of a new run.

    Raises:
        UserError: the folder, the data, the tokenizer or a prompt does not fit the config.
    """
    if framework == "PyTorch" and families.names_of(config.model) != "customllm":
        raise UserError(
            f"preset is {shown(config.preset)}: python -m torch_ref.train trains only CustomLLM; use train.py"
        )
    check_tracker(config.logging.log_to)
    resumes, saved = _take_folder(config, framework, lock)
    config = _with_kept_options(config, saved, processes, bfloat16)
    source_folder, source_config = _origin(getattr(config, "init", None), config.folder, config.overwrite, resumes)
    own_tokenizer = config.folder / TOKENIZER
    kept = load_tokenizer(str(own_tokenizer)) if resumes and own_tokenizer.is_dir() else None
    if kept is not None:  # before anything else is refused: one message names all options that were changed
        with contextlib.suppress(UserError):  # a vocabulary that is too small is one of them
            config = align(config, kept)
        check_resumable(config)
    config, source = _open_data(config, saved, resumes)
    config = _with_targets(config, source, framework)
    given = _tokenizer_given(config.data.tokenizer, config.folder, source_folder, resumes)
    if kept is not None:
        tokenizer = kept
    elif given is not None:
        tokenizer = load_tokenizer(given)
        tokenizer = with_pad_token(tokenizer, config.given_vocab_size) if source_config is None else tokenizer
    else:
        tokenizer = train_or_recall_tokenizer(source, config.model.vocab_size, config.data.source)
    files = own_tokenizer if kept is not None else given and Path(given)
    if source_config is not None and not saved and files and files.is_dir():  # which are copied unchanged
        check_tokenizer_class(files, tokenizer, source_config)
    config = align(config, without_dropout(tokenizer))
    if resumes and kept is None:
        check_resumable(config)
    data, streams = config.data, config.data_streams
    check_streams(data, config.seed, streams)
    samples = config.logging.eval_samples
    held_out_file = HeldOutFile(config.folder, source, data, samples, streams)
    evaluated = held_out_file.read(config.model.vocab_size) if resumes else None
    evaluated = evaluated or read_held_out(data, samples, streams, tokenizer)
    chats, pairs = evaluated.encoded.chats, evaluated.encoded.pairs

    def length(prompt: str) -> int:
        return len(encode_prompt(tokenizer, prompt, data.special_tokens_in_text, as_chat=chats > 0))

    if chats + pairs:
        config = _with_their_prompts(config, length)
    _check_prompts(config.sampling, config.model.max_position_embeddings, length)
    if not bytes_per_target(tokenizer, evaluated.rows, data):
        raise UserError("data: the tokens of the held-out part decode to an empty text: pass another --tokenizer")
    if (epochs := config.schedule.epochs) is not None and saved.get("epochs") != epochs:
        config = config.with_options(steps=steps_for_epochs(epochs, data, config.seed, streams, tokenizer))
    if not resumes:
        clear(config.folder)
    # First what identifies the folder as ours: a process may be killed between any two lines.
    write_json(config.folder / CONFIG_FILE, config.to_dict())
    (config.folder / OVERWRITING).unlink(missing_ok=True)
    write_json(config.folder / MODEL_FILE, config.model.to_dict())
    if source_folder is not None:
        keep_source(source_folder, config.folder, Path(given or source_folder))
    elif source_config is not None and given is not None and not own_tokenizer.is_dir():
        tokenizer_files(Path(given)).write(config.folder)
    if source_config is not None and not saved:
        note_end_tokens(config.folder, config.model, tokenizer)
    if not own_tokenizer.is_dir():
        _save_tokenizer(tokenizer, own_tokenizer)
    held_out_file.write(evaluated)
    report_data(config, tokenizer, source, evaluated)
    return Prepared(config, tokenizer, evaluated.rows, resumes)


def _take_folder(config: RunConfig, framework: Framework, lock: FolderLock) -> tuple[bool, dict[str, Any]]:
    """Lock the folder; returns whether it holds a run to resume, and that run's saved options, if it was trained."""
    folder, overwrite = config.folder, config.overwrite
    check_folder(folder, framework, overwrite)  # before anything is written there
    lock.take()
    delete_leftovers(folder)
    if not check_folder(folder, framework, overwrite):
        return False, {}
    file = folder / CONFIG_FILE
    saved = read_json(file) if file.is_file() else {}
    check_init(getattr(config, "init", None), folder, saved)
    return True, saved


def _with_kept_options(config: Config, saved: dict[str, Any], processes: int, bfloat16: str | None) -> Config:
    """Set what a run decides at its first start and then keeps.

    That is its precision, its data streams, the dataset's commit and the source of its weights.
    """
    facts: dict[str, Any] = {}
    if config.precision == "auto":
        facts["precision"] = saved.get("precision", "bfloat16" if bfloat16 else "float32")
    if "init" in config.options() and (init := config.options()["init"] or saved.get("init")) is not None:
        facts["init"] = model_folder(init).absolute()
    if (adapter := config.options().get("adapter")) is not None:
        facts["adapter"] = Path(adapter).absolute()
    if "data_streams" in config.options() and config.options()["data_streams"] is None:
        facts["data_streams"] = (saved.get("data_streams") or 1) if saved else processes
    if config.data.revision is None:
        facts["data_revision"] = saved.get("data_revision")
    facts["hold_out"] = saved.get("hold_out", "count") if saved else None
    for name, earlier in (("train_on", "all"), ("documents", "joined")):
        if saved and getattr(config.data, name) is None:
            facts[name] = saved.get(name, earlier)
    return config.with_options(**facts)


def _origin(init: Path | None, run: Path, overwrite: bool, resumes: bool) -> tuple[Path | None, dict[str, Any] | None]:
    """The folder of --init, unless the run has all of it already; and the config.json that the weights came with."""
    taken = checkpoint_owner(run) is not None or (run / SOURCE).is_dir()
    folder = None if init is None or (taken and not overwrite) else model_folder(init)
    values = read_json(folder / MODEL_FILE) if folder is not None else read_source(run) if resumes else None
    families.check_trainable(values or {})
    return folder, values


def _open_data(config: Config, saved: dict[str, Any], resumes: bool) -> tuple[Config, Source]:
    """The training data, and the config that names their content."""
    source = open_source(config.data, config.seed)
    if not resumes:
        check_new_data(config.data, source)
    for line in source.notes:
        print(f"Not read: {line}")
    config = config.with_options(data_revision=source.revision, hold_out=source.hold_out)
    if saved:
        check_data(config.data, saved)
    return config, source


def _with_targets(config: Config, source: Source, framework: Framework) -> Config:
    """Decide, at a run's first start, what it is trained on and how documents fill its rows.

    Raises:
        UserError: the data have no assistant, or the framework cannot do that.
    """
    data = config.data
    if None in (data.train_on, data.documents) or data.train_on == "assistant":
        chats = holds_chats(source)
        if data.train_on == "assistant" and not chats:
            raise UserError(
                f"train_on is 'assistant': the rows of {data.source!r} are texts, without an assistant; leave out "
                "--train-on"
            )
        apart = "separate" if chats and framework == "JAX" else "joined"
        found = {"train_on": "assistant" if chats else "all", "documents": apart}
        config = config.with_options(
            train_on=data.train_on or found["train_on"], documents=data.documents or found["documents"]
        )
    if framework == "PyTorch" and config.data.documents == "separate":
        raise UserError(
            "documents is 'separate': python -m torch_ref.train trains on joined documents only; pass --documents "
            "joined, or train with train.py"
        )
    return config


def _tokenizer_given(option: str | None, run: Path, source_folder: Path | None, resumes: bool) -> str | None:
    """The tokenizer of the option, or else of the weights' folder: never a new one for trained weights."""
    if option is not None or not (source_folder or (resumes and checkpoint_owner(run))):
        return option
    return str(next(path for path in (source_folder, run / SOURCE, run) if path and path.is_dir()))


def _with_their_prompts(config: Config, length: Callable[[str], int]) -> Config:
    """Replace a recipe's prompts (code or stories) by the first questions of held-out chats.

    `length` returns the tokens of a prompt.
    """
    sampling = config.sampling
    if sampling.prompts not in (CODE_PROMPTS, STORY_PROMPTS) or not sampling.sample_tokens:
        return config
    room, found = config.model.max_position_embeddings - sampling.sample_tokens, {}
    for chunk in itertools.islice(open_source(config.data, 0).held_out(), MOST_CHATS):
        asked = first_question(chunk.text)
        if asked and length(asked) <= room:
            found[asked] = None
        if len(found) == len(sampling.prompts):
            break
    if not found:
        note(
            f"no question of the first {MOST_CHATS} held-out chats leaves room for an answer of "
            f"{sampling.sample_tokens} tokens: the samples continue the prompts of the recipe; pass --prompts or a "
            "smaller --sample-tokens"
        )
    return config.with_options(prompts=(*found,)) if found else config


def _check_prompts(sampling: SamplingConfig, limit: int, length: Callable[[str], int]) -> None:
    longest = max(map(length, sampling.prompts), default=0)
    if sampling.sample_tokens and longest >= limit:
        raise UserError(
            f"prompts has one of {longest} tokens: max_position_embeddings = {limit} leaves no room after it; pass "
            "shorter --prompts or --sample-tokens 0"
        )


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


def keep_left_out(config: RunConfig, left_out: Iterable[str]) -> None:
    """Name damaged files in the run's config: they may be gone when it is resumed."""
    skip = ",".join(dict.fromkeys([*config.data.skip_data.split(","), *(name.replace(",", "?") for name in left_out)]))
    write_json(config.folder / CONFIG_FILE, config.with_options(skip_data=skip.strip(",")).to_dict())
