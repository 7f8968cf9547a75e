"""A run that starts from trained weights, `--init`: its options may not change their shapes."""

import dataclasses
from typing import Any

import jax

from jaxllm.config import ModelConfig, TrainConfig, changed_options
from jaxllm.errors import UserError, shown
from jaxllm.model.decoder import abstract_model
from jaxllm.run.prepare import read_model_config


def check_shapes(config: TrainConfig) -> None:
    """Check that the model has the shapes of the weights that `config.init` names.

    Raises:
        UserError: options change them, all of which are named.
    """
    assert config.init is not None
    trained = read_model_config(config.init)
    shapes = _shapes(trained)
    if _shapes(config.model) == shapes:
        return
    changed = changed_options(config.to_dict() | {"model": trained.to_dict()}, config)
    alone = [change for change in changed if _with(trained, change[0], change[2]) != shapes]
    was = "; ".join(
        f"{name} is {shown(now)}, and the weights have {shown(before)}" for name, before, now in alone or changed
    )
    raise UserError(f"{was}: --init gives the model of {config.init}, leave the option out")


def _with(model: ModelConfig, option: str, value: Any) -> Any:
    """The shapes of the model with another value of one option; None: no model has it alone."""
    try:
        return _shapes(dataclasses.replace(model, **{option.removeprefix("model."): value}))
    except (UserError, TypeError):  # TypeError: an option of a part, such as the router
        return None


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(abstract_model(model)[1:])
    heads = {"head": (model.nope_head_dim, model.rope_head_dim, model.value_head_dim)}  # as which a matrix is read
    return heads | {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}
