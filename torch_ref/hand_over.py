"""Write and read the optimizer state of a Trainer checkpoint by parameter name, for `python -m convert`.

The checkpoint itself numbers the parameters in the order of the optimizer's groups.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import TrainerState

from jaxllm.config import RunConfig
from jaxllm.errors import UserError
from torch_ref.checkpoint import OPTIMIZER_FILE, SCHEDULER_FILE, STATE_FILE, reading, trainer_state
from torch_ref.model import CustomLLM
from torch_ref.step import make_optimizer, make_schedule


class Moments(NamedTuple):
    """AdamW's moments of one parameter, in its shape."""

    mu: np.ndarray
    nu: np.ndarray


def _optimizer(config: RunConfig) -> tuple[torch.optim.AdamW, dict[str, torch.Size]]:
    """The run's optimizer over meta parameters, and their names and shapes in the order of its groups."""
    with torch.device("meta"):
        reference = CustomLLM(config.model)
    optimizer = make_optimizer(reference, config)
    names = {parameter: name for name, parameter in reference.named_parameters()}
    return optimizer, {names[p]: p.shape for group in optimizer.param_groups for p in group["params"]}


def write_training(folder: Path, config: RunConfig, step: int, moments: Callable[[str], Moments]) -> None:
    """Write `optimizer.pt`, `scheduler.pt` and, last, `trainer_state.json`.

    Args:
        folder: the checkpoint, which holds the weights already.
        config: of the run.
        step: updates done.
        moments: returns a parameter's moments, given its name.
    """
    optimizer, shapes = _optimizer(config)
    schedule = make_schedule(optimizer, config, step)
    state = {}
    for i, name in enumerate(shapes):
        mu, nu = (torch.from_numpy(np.array(values, order="C")) for values in moments(name))
        state[i] = {"step": torch.tensor(float(step)), "exp_avg": mu, "exp_avg_sq": nu}
    torch.save(optimizer.state_dict() | {"state": state}, folder / OPTIMIZER_FILE)
    torch.save(schedule.state_dict(), folder / SCHEDULER_FILE)
    TrainerState(
        global_step=step,
        max_steps=config.schedule.steps,
        epoch=step / config.schedule.steps,
        train_batch_size=config.data.batch_size,
    ).save_to_json(str(folder / STATE_FILE))


def read_training(folder: Path, config: RunConfig) -> tuple[int, dict[str, Moments]]:
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
    _, shapes = _optimizer(config)
    found = saved.get("state") if isinstance(saved, dict) else None
    if not isinstance(found, dict) or found.keys() != set(range(len(shapes))):
        raise UserError(f"{file} does not hold the moments of this model's {len(shapes)} parameters")
    moments = {}
    for i, (name, shape) in enumerate(shapes.items()):
        tensors = [found[i].get(key) for key in ("step", "exp_avg", "exp_avg_sq")] if isinstance(found[i], dict) else []
        if not tensors or not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
            raise UserError(f"{file}: the parameter {name} has no moments of AdamW")
        count, mu, nu = tensors
        if mu.shape != shape or nu.shape != shape or mu.dtype != torch.float32 or nu.dtype != torch.float32:
            raise UserError(
                f"{file}: the moments of {name} must be float32 of shape {list(shape)}, not {list(mu.shape)}"
            )
        if count.numel() != 1 or int(count) != state["global_step"]:
            raise UserError(f"{file}: {name} has another step count than {STATE_FILE}'s {state['global_step']}")
        moments[name] = Moments(mu.numpy(), nu.numpy())
    return state["global_step"], moments
