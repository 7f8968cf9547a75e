"""The frozen weights of a run with adapters, and the model that both make together."""

import functools
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from convert.adapter import read_adapter, write_adapter
from convert.model_card import CARD_FILE
from convert.mtp import is_beyond
from convert.new_folder import check_new, new_folder
from convert.to_flax import Place, read_model
from convert.weight_files import weight_files
from jaxllm.config import LoraConfig, ModelConfig
from jaxllm.config.families import is_interleaved, names_of
from jaxllm.errors import UserError
from jaxllm.files import StrPath, read_json, sha256_of
from jaxllm.model.adapters import merged_weights
from jaxllm.model.decoder import abstract_adapted, model_facts
from jaxllm.model.dtypes import Pytree
from jaxllm.model.inference import Hold, as_stored, is_narrow
from jaxllm.store.base import base_hash, check_there
from jaxllm.store.checkpoint import Weights, load_weights, read_newest
from jaxllm.store.folder import CONFIG_FILE, TOKENIZER, adapters_of, read_model_config
from jaxllm.store.source import hub_name, model_folder, read_source
from jaxllm.train.step import merged


class Base(NamedTuple):
    """What a run with adapters starts from."""

    weights: Weights
    """Frozen; matrices in the dtype of their files: that which holds all of them, where they differ."""
    adapters: Pytree | None
    """Of --adapter; None: new ones, or those of the run's checkpoint."""
    dtypes: dict[str, Any]
    """As in `Imported`."""
    matrix_dtype: str
    sha256: str | None
    """Of `weights_hash`; None: it was not computed."""


def read_base(
    init: Path, adapter: Path | None, model: ModelConfig, lora: LoraConfig, place: Place = None, hashed: bool = False
) -> Base:
    """The weights of --init, read to `place` as `read_model` does, and the adapters of --adapter.

    `hashed`: whether to compute the hash of the weights, too.

    Raises:
        UserError: the weights or the adapters cannot be read, or do not fit.
    """
    found = read_model(init, hold=as_stored, place=place)
    params, facts = found.weights.params, model_facts(found.config)[0]
    matrices = [w.dtype for w, known in zip(*map(jax.tree.leaves, (params, facts)), strict=True) if is_narrow(known)]
    dtype = functools.reduce(jnp.promote_types, matrices)
    params = jax.tree.map(
        lambda weight, known: weight.astype(dtype, copy=False) if is_narrow(known) else weight, params, facts
    )
    adapters = None
    if adapter is not None:
        shapes = abstract_adapted(model, lora).params
        adapters = read_adapter(adapter, model, shapes, is_interleaved(found.values))
    sha256 = weights_hash(model_folder(init)) if hashed else None
    return Base(Weights(params, found.weights.routing_bias), adapters, found.dtypes, dtype.name, sha256)


def weights_hash(source: Path) -> str:
    """The hash of those files of a folder, or of the single file, that are read for a base: others may be added."""
    layers = read_model_config(source.parent if source.is_file() else source).num_hidden_layers
    files = {file.name: file for file in weight_files(source, lambda name: not is_beyond(name, layers)).files}

    with ThreadPoolExecutor(min(len(files), os.cpu_count() or 1)) as pool:
        hashes = dict(zip(files, pool.map(sha256_of, files.values()), strict=True))
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def check_base(run: Path, folder: Path) -> None:
    """Raise a UserError if the weights in a folder are not those that the adapters of a run were trained on."""
    if weights_hash(folder) != base_hash(run):
        before = read_json(run / CONFIG_FILE).get("init")
        raise UserError(
            f"init is {str(folder)!r}: its weights are not those that the adapters in {run} were trained on, which "
            f"were in {before!r}; pass --init with a folder that holds those"
        )


def run_weights(run: StrPath, hold: Hold = as_stored) -> tuple[ModelConfig, Weights]:
    """Model config and newest weights of a run. Adapters are merged into their base, in float32.

    `hold` must not choose a wider dtype than `as_stored`, as which a base was frozen: of FP8 files it has other values.

    Raises:
        UserError: it is not a run folder, the checkpoint cannot be read, or the base is not what it was.
    """
    if (config := adapters_of(run)) is None:
        return load_weights(run, hold)
    model, lora = read_model_config(run), config.lora
    saved = read_newest(run, lambda saved: saved.adapters(model, lora))
    adapted = merged(abstract_adapted(model, lora).graph, *saved, run_base(run, config.init, hold))
    return model, Weights(merged_weights(adapted, hold), saved.routing_bias)


def run_base(run: StrPath, init: Path | None, hold: Hold) -> Pytree:
    """The frozen weights of a run with adapters, held as in `read_model`. Raises a UserError if they are other ones."""
    folder = None if init is None else model_folder(init)
    check_there(Path(run), folder)
    assert folder is not None
    check_base(Path(run), folder)
    return read_model(folder, hold=hold, place=jax.sharding.SingleDeviceSharding(jax.devices()[0])).weights.params


_CARD = """\
---
library_name: peft
{front}pipeline_tag: text-generation
tags: [lora]
---

# {name}

A low-rank adapter, trained with jaxllm.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base!r}{code})
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
        raise UserError(f"{str(run)!r} has no adapters: export the whole model, with `python -m convert to-torch`")
    assert config.init is not None
    model, lora = read_model_config(run), config.adapters
    base, revision = hub_name(config.init) or (str(config.init), None)
    saved = read_newest(run, lambda saved: saved.adapters(model, lora))
    with new_folder(out) as made:
        if (run / TOKENIZER).is_dir():
            shutil.copytree(run / TOKENIZER, made, dirs_exist_ok=True)
        code = ", trust_remote_code=True" if names_of(model) == "customllm" else ""
        # a path says where the model lies on someone's machine
        named, front = (base, f"base_model: {base}\n") if revision else (config.init.name, "")
        card = _CARD.format(front=front, base=named, name=run.absolute().name, code=code)
        (made / CARD_FILE).write_text(card, encoding="utf-8", errors="backslashreplace")
        write_adapter(made, model, lora, saved.params, base, is_interleaved(read_source(run)), revision)
