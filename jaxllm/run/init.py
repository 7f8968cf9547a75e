"""A run that starts from trained weights, `--init`: its options may not change their shapes."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from jaxllm.config import ModelConfig
from jaxllm.config.train import changed_model
from jaxllm.errors import UserError, shown
from jaxllm.model.decoder import abstract_model
from jaxllm.store.folder import read_model_config
from jaxllm.store.source import model_folder


def check_shapes(init: Path, model: ModelConfig) -> None:
    """Raise a UserError, which names the options, if a model has other shapes than the weights of `--init`."""
    trained = read_model_config(model_folder(init))
    shapes = _shapes(trained)
    if _shapes(model) == shapes:
        return
    changed = changed_model(trained, model)
    alone = [(name, before, now) for name, before, now in changed if _reshapes(trained, name, now, shapes)]
    was = "; ".join(
        f"{name} is {shown(now)}, and the weights have {shown(before)}" for name, before, now in alone or changed
    )
    raise UserError(f"{was}: --init gives the model of {init}, leave out what is named")


def _reshapes(model: ModelConfig, option: str, value: Any, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether another value of one option changes the shapes, or needs others to change with it."""
    name = option.removeprefix("model.")
    if name not in {field.name for field in dataclasses.fields(model)}:  # of the router or the angles: no shape
        return False
    try:
        return _shapes(dataclasses.replace(model, **{name: value})) != shapes
    except UserError:
        return True


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(abstract_model(model)[1:])
    heads = {"head": (model.nope_head_dim, model.rope_head_dim, model.value_head_dim)}  # as which a matrix is read
    return heads | {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}
