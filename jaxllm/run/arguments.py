"""The options of a run that a command line gives, over the defaults of its folder, its weights or its recipe.

Imports neither JAX nor PyTorch.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from jaxllm.command_line import expanded, parse
from jaxllm.config import DEFAULT_RECIPE, ModelConfig, TrainConfig, recipe
from jaxllm.errors import UserError, shown
from jaxllm.files import read_json
from jaxllm.store.adapter_folder import adapter_options
from jaxllm.store.folder import CONFIG_FILE, OVERWRITING, Config, is_run, read_model_config
from jaxllm.store.source import model_folder

INIT_LEARNING_RATE = 2e-5
"""Peak learning rate of a run that starts from trained weights, read by --init or made by the converter."""

LORA_SCHEDULE = {"learning_rate": 10 * INIT_LEARNING_RATE, "warmup_steps": 20}
"""Of a run that trains adapters, with alpha = 2 r: B begins at zero, and A and B need larger steps than weights do."""


def parse_args(argv: Sequence[str] | None, prog: str, description: str | None, kind: type[Config]) -> Config:
    """The config of a command line.

    The defaults are those of the run in the folder, or else of the recipe and the preset; options override single
    values.

    Raises:
        UserError: the folder's config, the recipe, the preset or a value is not valid.
    """
    return parse(kind, argv, prog, description, default=_defaults(_deciding_options(argv, kind), kind))


def _deciding_options(argv: Sequence[str] | None, kind: type[Config]) -> argparse.Namespace:
    """The options on which the defaults of the others depend, as they are written."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--run-dir", type=expanded)
    first.add_argument("--overwrite", "--no-overwrite", dest="start_over", action="store_true")
    if kind is TrainConfig:
        first.add_argument("--init", type=expanded)
        first.add_argument("--adapter", type=expanded)
        first.add_argument("--lora-rank")
    for name in ("--preset", "--recipe", "--mesh", "--parallel", "--steps", "--epochs"):
        first.add_argument(name)
    return first.parse_known_args(argv)[0]


def _defaults(given: argparse.Namespace, kind: type[Config]) -> Config:
    if None not in (given.steps, given.epochs):
        raise UserError(f"epochs is {shown(given.epochs)}: --steps {given.steps} says the same, leave out one of them")
    default = recipe(given.recipe or "default", given.preset or "tiny", kind)
    if kind is TrainConfig and default.recipe == "default":
        default = default.with_options(precision="auto")
    start: Path | None = getattr(given, "init", None)
    if start is not None:
        if given.preset is not None:
            raise UserError(f"preset is {shown(given.preset)}: --init gives the model, leave out one of the two")
        model = read_model_config(model_folder(start))
        default = _of_trained(default, model).with_options(init=start, tokenizer=str(model_folder(start)))
    if (adapter := getattr(given, "adapter", None)) is not None:
        default = default.with_options(adapter=adapter, **adapter_options(adapter))
    if start is not None and (adapter is not None or getattr(given, "lora_rank", None) not in (None, "0")):
        default = default.with_options(**LORA_SCHEDULE)
    folder = given.run_dir or default.folder
    resumes = not (given.start_over or (folder / OVERWRITING).exists())
    saved = _saved_config(folder, kind) if resumes else None
    if saved is None and given.preset is None and start is None and resumes and is_run(folder):
        default = _of_trained(default, read_model_config(folder))  # made by the converter
    if saved is not None:
        same = given.preset in (None, saved.preset) and given.recipe in (None, saved.recipe)
        default = saved if same else default
        if given.mesh is not None or given.parallel is not None:  # one choice: the saved half of it does not hold
            default = default.with_options(mesh="", parallel="jit")
    if given.steps is not None:
        default = default.with_options(epochs=None)  # those of the run in the folder
    return default


def _of_trained(config: Config, model: ModelConfig) -> Config:
    """A config for a model that is trained already: AdamW at a low rate, rows no longer than the model's positions."""
    if config.recipe == "default":  # which is for new weights
        plain = type(config)().options()
        config = config.with_options(**{name: plain[name] for name in DEFAULT_RECIPE})
    seq_len = min(config.data.seq_len, model.max_position_embeddings)
    return config.with_options(model=model, seq_len=seq_len, learning_rate=INIT_LEARNING_RATE)


def _saved_config(folder: Path, kind: type[Config]) -> Config | None:
    """The config of the run in a folder; None if the folder has none, or if the run is of the other framework."""
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
