"""The frozen weights of a run with adapters, and the model that both make together."""

import functools
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from convert.adapter import read_adapter, write_adapter
from convert.mapping import entries, leaf
from convert.model_card import CARD_FILE
from convert.new_folder import check_new, new_folder
from convert.to_flax import Imported, read_model
from jaxllm.config import ModelConfig, TrainConfig
from jaxllm.config.families import is_interleaved
from jaxllm.errors import UserError
from jaxllm.files import StrPath
from jaxllm.model.adapters import merged_weights
from jaxllm.model.decoder import abstract_adapted, model_facts
from jaxllm.model.dtypes import Pytree
from jaxllm.model.inference import is_narrow
from jaxllm.store.base import base_of, check_base
from jaxllm.store.checkpoint import Weights, load_weights, read_newest
from jaxllm.store.folder import CONFIG_FILE, TOKENIZER, is_run, read_config, read_model_config
from jaxllm.store.source import model_folder, read_source
from jaxllm.train.step import merged


class Base(NamedTuple):
    """What a run with adapters starts from."""

    weights: Weights
    """Frozen; matrices in the dtype of their files: that which holds all of them, where they differ."""
    adapters: Pytree | None
    """Of --adapter; None: new ones."""
    dtypes: dict[str, Any]
    """As in `Imported`."""
    matrix_dtype: str


def read_base(config: TrainConfig) -> Base:
    """The weights of --init, and the adapters of --adapter.

    Raises:
        UserError: the weights or the adapters cannot be read, or do not fit.
    """
    assert config.init is not None
    found = read_model(config.init)
    dtype, (facts, _) = _matrix_dtype(found), model_facts(found.config)
    params = jax.tree.map(
        lambda weight, known: weight.astype(dtype) if is_narrow(known) else weight, found.weights.params, facts
    )
    adapters = None
    if config.adapter is not None:
        shapes = abstract_adapted(config.model, config.lora).params
        adapters = read_adapter(config.adapter, config.model, shapes, is_interleaved(found.values))
    return Base(Weights(params, found.weights.routing_bias), adapters, found.dtypes, dtype.name)


def _matrix_dtype(found: Imported) -> np.dtype:
    """The narrowest dtype that holds every matrix of a folder."""
    facts, main, others = model_facts(found.config)[0], found.dtypes["dtype"], found.dtypes["others"]
    held = {
        others.get(entry.torch_name, main)
        for entry in entries(found.config, is_interleaved(found.values))
        if entry.is_parameter and is_narrow(leaf(facts, entry.parts[0].path))
    }
    return functools.reduce(jnp.promote_types, map(jnp.dtype, held))


def adapters_of(run: StrPath) -> TrainConfig | None:
    """The config of a run that trains adapters; None: it trains all weights, or is no run."""
    if not is_run(run) or not Path(run, CONFIG_FILE).is_file():
        return None
    config = read_config(run, TrainConfig)
    return config if config.adapters else None


def run_weights(run: StrPath) -> tuple[ModelConfig, Weights]:
    """Model config and newest weights of a run, adapters merged into their base, in float32.

    Raises:
        UserError: it is no run, the checkpoint cannot be read, or the base is no longer what it was.
    """
    config = adapters_of(run)
    if config is None:
        return load_weights(run)
    model, lora = read_model_config(run), config.adapters
    found = run_base(run, config)
    saved = read_newest(run, lambda saved: saved.weights(model, lora=lora))
    assert lora is not None
    graph = abstract_adapted(model, lora).graph
    whole: Any = jax.jit(lambda *trees: merged_weights(merged(graph, *trees)))
    masters = jax.tree.map(lambda weight: np.asarray(weight, np.float32), found.weights.params)
    return model, Weights(whole(*saved, masters), saved.routing_bias)


def run_base(run: StrPath, config: TrainConfig) -> Imported:
    """The base of a run with adapters.

    Raises:
        UserError: it is not where it was, or is not what it was.
    """
    if config.init is None or not model_folder(config.init).exists():
        raise UserError(
            f"init is {str(config.init)!r}, the base of the adapters in {run}, and there is nothing: put it back, or "
            "resume the run once with --init and the folder where it is now"
        )
    folder = model_folder(config.init)
    check_base(Path(run), base_of(folder))
    return read_model(folder)


_CARD = """\
---
library_name: peft
base_model: {base}
pipeline_tag: text-generation
tags: [lora]
---

# {name}

A low-rank adapter, trained with jaxllm.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(model, "FOLDER")
```
"""


def export_adapter(run: StrPath, out: StrPath) -> None:
    """Write the newest adapters of a run as PEFT has them, with the run's tokenizer.

    Raises:
        UserError: `run` has none, or `out` holds something already.
    """
    run, config = Path(run), adapters_of(run)
    check_new(out)
    if config is None or config.adapters is None:
        raise UserError(f"{str(run)!r} has no adapters")
    model, lora, base = read_model_config(run), config.adapters, str(config.init)
    saved = read_newest(run, lambda saved: saved.weights(model, lora=lora))
    with new_folder(out) as made:
        if (run / TOKENIZER).is_dir():
            shutil.copytree(run / TOKENIZER, made, dirs_exist_ok=True)
        card = _CARD.format(base=base, name=run.absolute().name)
        (made / CARD_FILE).write_text(card, encoding="utf-8", errors="backslashreplace")
        write_adapter(made, model, lora, saved.params, base, is_interleaved(read_source(run)))
