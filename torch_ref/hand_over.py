"""Write and read the optimizer state of a Trainer checkpoint by parameter name, for `python -m convert`.

The checkpoint itself numbers the parameters in the order of the optimizer's groups.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import TrainerState

from jaxllm.config import ModelConfig, RunConfig
from jaxllm.config.groups import OptimConfig
from jaxllm.errors import UserError
from torch_ref.checkpoint import OPTIMIZER_FILE, SCHEDULER_FILE, STATE_FILE, reading, trainer_state
from torch_ref.model import CustomLLM
from torch_ref.muon import moment_names
from torch_ref.step import make_optimizer, make_schedule


class Moments(NamedTuple):
    """The optimizer's moments of one parameter, in its shape."""

    mu: np.ndarray
    """AdamW's first moment, or Muon's momentum."""
    nu: np.ndarray | None
    """AdamW's second moment; None: Muon updates the parameter."""


class _Known(NamedTuple):
    """Facts about a parameter, known before its moments are read."""

    shape: torch.Size
    moments: tuple[str, ...]
    """Their names in the optimizer's state."""


def _optimizer(model: ModelConfig, optim: OptimConfig) -> tuple[torch.optim.AdamW, dict[str, _Known]]:
    """The run's optimizer over meta parameters, and their names, shapes and moments in the order of its groups."""
    with torch.device("meta"):
        reference = CustomLLM(model)
    optimizer = make_optimizer(reference, optim, "float32")  # the state is the same in either precision
    names = {parameter: name for name, parameter in reference.named_parameters()}
    known = {}
    for group in optimizer.param_groups:
        known |= {names[p]: _Known(p.shape, moment_names(group)) for p in group["params"]}
    return optimizer, known


def write_training(folder: Path, config: RunConfig, step: int, moments: Callable[[str], Moments]) -> None:
    """Write `optimizer.pt`, `scheduler.pt` and, last, `trainer_state.json`.

    Args:
        folder: the checkpoint, which holds the weights already.
        config: of the run.
        step: updates done.
        moments: returns a parameter's moments, given its name.
    """
    optimizer, parameters = _optimizer(config.model, config.optim)
    schedule = make_schedule(optimizer, config.schedule, config.optim.learning_rate, step)
    state: dict[int, dict[str, torch.Tensor]] = {}
    for i, (name, known) in enumerate(parameters.items()):
        found = zip(known.moments, moments(name), strict=False)  # Muon's has one
        tensors = {key: torch.from_numpy(np.array(values, order="C")) for key, values in found}
        state[i] = {"step": torch.tensor(float(step)), **tensors}
    torch.save(optimizer.state_dict() | {"state": state}, folder / OPTIMIZER_FILE)
    torch.save(schedule.state_dict(), folder / SCHEDULER_FILE)
    TrainerState(
        global_step=step,
        max_steps=config.schedule.steps,
        epoch=step / config.schedule.steps,
        train_batch_size=config.data.batch_size,
    ).save_to_json(str(folder / STATE_FILE))


def read_training(folder: Path, model: ModelConfig, optim: OptimConfig) -> tuple[int, dict[str, Moments]]:
    """The updates done and each parameter's moments. No code in the files is executed.

    Raises:
        UserError: the files cannot be read, or belong to another model.
    """
    file = folder / OPTIMIZER_FILE
    state = trainer_state(folder)
    if state is None:
        raise UserError(f"{folder / STATE_FILE} is missing or has no step count")
    with reading(folder):
        saved = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    _, parameters = _optimizer(model, optim)
    found = saved.get("state") if isinstance(saved, dict) else None
    if not isinstance(found, dict) or found.keys() != set(range(len(parameters))):
        raise UserError(f"{file} does not hold the moments of this model's {len(parameters)} parameters")
    moments = {}
    for i, (name, known) in enumerate(parameters.items()):
        saved_state = found[i] if isinstance(found[i], dict) else {}
        of_muon = len(known.moments) == 1
        tensors: list[Any] = [saved_state.get(key) for key in ("step", *known.moments)]
        if not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
            raise UserError(f"{file}: the parameter {name} has no moments of {'Muon' if of_muon else 'AdamW'}")
        count, *values = tensors
        for value in values:
            if value.shape != known.shape or value.dtype != torch.float32:
                raise UserError(
                    f"{file}: the moments of {name} must be float32 of shape {list(known.shape)}, not "
                    f"{str(value.dtype).removeprefix('torch.')} of {list(value.shape)}"
                )
        if count.numel() != 1 or int(count) != state["global_step"]:
            raise UserError(f"{file}: {name} has another step count than {STATE_FILE}'s {state['global_step']}")
        moments[name] = Moments(values[0].numpy(), None if of_muon else values[1].numpy())
    return state["global_step"], moments
