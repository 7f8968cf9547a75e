"""The log of a run in Weights & Biases or trackio, which have the same functions."""

import importlib
import os
import uuid
from pathlib import Path
from typing import Any

from jaxllm.errors import UserError, optional
from jaxllm.files import read_json, write_json
from jaxllm.packages import is_installed
from jaxllm.run.tensorboard import scalars

TRACKER_FILE = "tracker.json"
"""In a run's folder: the names of the run in each tracker, under which a resumed run continues."""

WANDB_VARIABLES = {"project": "WANDB_PROJECT", "name": "WANDB_NAME", "id": "WANDB_RUN_ID"}
"""What wandb would take from the environment if it were not given."""


def check_tracker(name: str) -> None:
    """Check that the library of `log_to` is installed. Raises UserError."""
    if name != "none" and not is_installed(name):
        raise UserError(f"log_to is {name!r}: it is not installed; pip install {name}, or leave the option out")


class Tracker:
    """The run in the library that `log_to` names, if any. A first error is a warning, and ends it."""

    def __init__(self, name: str, run: Path, options: dict[str, Any]):
        self._name, self._works = name, name != "none"
        if self._works:
            self._call("init", **self._identity(run), config=options)

    def _identity(self, run: Path) -> dict[str, Any]:
        """What names the run: at its first start by wandb's own environment variables, then as it was named."""
        file = run / TRACKER_FILE
        known = read_json(file) if file.is_file() else {}
        if new := self._name not in known:
            known[self._name] = {"project": "jaxllm", "name": run.absolute().name}
            if self._name == "wandb":  # trackio knows a run by its name
                given = {option: os.environ.get(variable) for option, variable in WANDB_VARIABLES.items()}
                given["id"] = given["id"] or uuid.uuid4().hex[:8]
                known[self._name] |= {option: value for option, value in given.items() if value}
            write_json(file, known)
        if self._name == "wandb":  # a value that may change: the number of steps
            return known[self._name] | {"resume": "allow", "allow_val_change": True}
        return known[self._name] | {"resume": "never" if new else "allow"}

    def write(self, record: dict[str, Any]) -> None:
        self._call("log", scalars(record), step=record["step"])

    def close(self, *, failed: bool = False) -> None:
        # trackio has no failed runs
        self._call("finish", **({"exit_code": 1} if failed and self._name == "wandb" else {}))
        self._works = False

    def _call(self, function: str, *args: Any, **options: Any) -> None:
        if self._works:
            self._works = False
            with optional(f"{self._name}.{function}"):
                getattr(importlib.import_module(self._name), function)(*args, **options)
                self._works = True
