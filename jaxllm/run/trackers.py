"""The log of a run in Weights & Biases or trackio, which have the same functions."""

import importlib
import importlib.util
from typing import Any

from jaxllm.config import RunConfig
from jaxllm.errors import UserError, optional
from jaxllm.run.tensorboard import scalars


def check_tracker(config: RunConfig) -> None:
    """Check that the library of `log_to` is installed. Raises UserError."""
    name = config.logging.log_to
    if name != "none" and importlib.util.find_spec(name) is None:
        raise UserError(f"log_to is {name!r}: it is not installed; pip install {name}, or leave the option out")


class Tracker:
    """The run in the library that the config names, if any. A first error is a warning, and ends it."""

    def __init__(self, config: RunConfig):
        self._name, self._works = config.logging.log_to, config.logging.log_to != "none"
        self._call("init", project="jaxllm", name=config.folder.name, config=config.options())

    def write(self, record: dict[str, Any]) -> None:
        self._call("log", scalars(record), step=record["step"])

    def close(self) -> None:
        self._call("finish")
        self._works = False

    def _call(self, function: str, *args: Any, **options: Any) -> None:
        if self._works:
            self._works = False
            with optional(f"{self._name}.{function}"):
                getattr(importlib.import_module(self._name), function)(*args, **options)
                self._works = True
