"""The rung `adapters`: the training of a run's adapters (LoRA) beside its frozen weights, against PEFT's.

PEFT gets the folder that `python -m convert to-torch RUN` writes. The comparisons are those of the other rungs.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from transformers.utils.versions import require_version

from convert.adapter import write_adapter
from convert.base import run_base
from jaxllm.config import LoraConfig, ModelConfig, TrainConfig
from jaxllm.config.families import is_interleaved
from jaxllm.errors import UserError, one_line
from jaxllm.model.dtypes import Pytree
from jaxllm.model.inference import as_stored
from jaxllm.packages import is_installed
from jaxllm.store.checkpoint import Weights, read_newest
from jaxllm.store.source import read_source
from parity_tests.compare import Row
from parity_tests.forward import Base, torch_model
from parity_tests.forward_rungs import ForwardRungs, Subject
from parity_tests.settings import Plan
from parity_tests.training_rungs import TrainingRungs


class Adapters(NamedTuple):
    """What a run with adapters has trained, and on what."""

    weights: Weights
    """The adapters in the place of parameters, and the routing bias."""
    base: Base
    source: dict[str, Any] | None
    """The config.json that the base came with."""
    note: str = ""
    """In what they differ from the run's."""


def has_peft() -> bool:
    """Whether a PEFT that reads our adapters is installed."""
    if not is_installed("peft"):
        return False
    try:
        require_version("peft>=0.21")
    except ImportError:  # an older one
        return False
    return True


def read_adapters(run: Path, model: ModelConfig, config: TrainConfig) -> Adapters:
    """Those of a run's newest checkpoint. Where B is zero, it is noise, else the gradient of A would be zero.

    Raises:
        UserError: as `run_weights` does.
    """
    saved = jax.device_get(read_newest(run, lambda saved: saved.adapters(model, config.lora)))
    # the values that were frozen: of FP8 files they are rounded to bfloat16
    frozen = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), run_base(run, config.init, as_stored))
    params, note = with_noise(saved.params, config.lora)
    return Adapters(saved._replace(params=params), Base(config.lora, frozen), read_source(run), note)


def with_noise(params: Pytree, lora: LoraConfig) -> tuple[Pytree, str]:
    rng, filled, matrices = np.random.default_rng(0), 0, 0

    def fill(path: Any, leaf: np.ndarray) -> np.ndarray:  # (...,in,r) or (...,r,out)
        nonlocal filled, matrices
        if path[-1].key != "b":
            return leaf
        zero = ~leaf.any(axis=(-2, -1), keepdims=True)
        filled, matrices = filled + int(zero.sum()), matrices + zero.size
        noise = 0.1 / (lora.scale * lora.rank**0.5) * rng.standard_normal(leaf.shape, np.float32)
        return np.where(zero, noise, leaf)

    params = jax.tree_util.tree_map_with_path(fill, params)
    return params, f"noise in {filled} of {matrices} B, which are zero and would hide A" if filled else ""


def in_peft(config: ModelConfig, adapters: Adapters, precision: str) -> Any:
    """The PyTorch model with the adapters in PEFT, as a user loads both."""
    from peft import PeftModel

    weights, base, source = adapters.weights, adapters.base, adapters.source
    model = torch_model(config, weights._replace(params=base.frozen), precision, source)
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(folder, config, base.lora, weights.params, "base", is_interleaved(source))
        adapted = PeftModel.from_pretrained(model, folder, is_trainable=True, autocast_adapter_dtype=False)
    return adapted.to(torch.float64 if precision == "float64" else torch.float32).eval()


class AdapterRung:
    """Compares adapters with PEFT's: as they are read, logits, gradients of each A and B, a step. The Flax side is
    computed once.

    Args:
        subject: its weights are replaced.
        plan, tokens: as in `TrainingRungs`.
        ids: (1,T), for the logits.
    """

    def __init__(self, subject: Subject, adapters: Adapters, plan: Plan, tokens: np.ndarray, ids: np.ndarray):
        subject = subject._replace(weights=adapters.weights, base=adapters.base)
        config = plan.config.with_options(optimizer="adamw")  # which trains all adapters
        plan = dataclasses.replace(plan, config=config, norms=None, notes=[adapters.note] if adapters.note else [])
        self.subject, self.adapters = subject, adapters
        self.forward, self.training = ForwardRungs(subject, ids), TrainingRungs(subject, plan, tokens)

    def described(self) -> str:
        """One line for the verdict."""
        lora, notes = self.adapters.base.lora, self.training.plan.notes
        return "; ".join([f"rank {lora.rank}, alpha {lora.resolved_alpha:g}, {lora.targets}, in PEFT", *notes])

    def compare(self) -> Iterator[Row]:
        try:
            adapted = in_peft(self.subject.config, self.adapters, self.subject.precision)
        except UserError:
            raise
        except Exception as error:  # whatever PEFT has against the folder
            yield Row("adapters", "adapters", "", False, "loads", note=f"PEFT does not load them: {one_line(error)}")
            return
        model = adapted.get_base_model()  # in which PEFT has replaced the layers
        self.forward.start()
        for rung in (self.forward.weights, self.forward.logits, self.training.gradients, self.training.step):
            yield from (dataclasses.replace(row, rung="adapters") for row in rung(model))
