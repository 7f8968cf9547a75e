"""Flax to PyTorch: write the folder that `AutoModelForCausalLM.from_pretrained` reads. Needs no PyTorch.

A CustomLLM comes with its code; a model of the DeepSeek family is of a class that transformers has.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from convert.mapping import PARAMS, ROUTING_BIAS, entries
from convert.model_card import write_model_card
from convert.tensor_files import DTYPES, Tensor, write_safetensors
from jaxllm.config import SPECIAL_TOKENS, ModelConfig
from jaxllm.config.families import is_interleaved, names_of, write_config
from jaxllm.data.tokenizer import export_tokenizer, load_tokenizer
from jaxllm.errors import UserError
from jaxllm.files import StrPath, read_json, write_json
from jaxllm.model.decoder import CustomLLM, split_model
from jaxllm.packages import ROOT, check_own
from jaxllm.run.checkpoint import Weights, load_weights
from jaxllm.run.prepare import GENERATION_CONFIG, SOURCE_CONFIG

MODELING_FILE = "modeling_customllm.py"
AUTO_CLASSES = {
    "AutoConfig": "CustomLLMConfig",
    "AutoModel": "CustomLLMModel",
    "AutoModelForCausalLM": "CustomLLM",
    "AutoModelForSequenceClassification": "CustomLLMForSequenceClassification",
    "AutoModelForTokenClassification": "CustomLLMForTokenClassification",
}
"""As in `torch_ref.model`, whose import needs PyTorch."""


def export_run(run: StrPath, out: StrPath, *, dtype: str | None = None) -> None:
    """Export the newest weights of a run, with its tokenizer and a model card.

    Args:
        dtype: of the weights; None: that of the folder that they came from, or float32.

    Raises:
        UserError: `run` is no run, or `out` holds something already.
    """
    run, out = Path(run), Path(out)
    check_new(out)
    config, weights = load_weights(run)
    source = read_source(run)
    given = (source or {}).get("dtype") or (source or {}).get("torch_dtype")
    write_model(config, weights, out, dtype or (given if given in DTYPES else "float32"), source)
    if (run / GENERATION_CONFIG).is_file():
        shutil.copyfile(run / GENERATION_CONFIG, out / GENERATION_CONFIG)
    if source is not None and (run / "tokenizer").is_dir():  # it came with the weights
        shutil.copytree(run / "tokenizer", out, dirs_exist_ok=True)
    elif (run / "tokenizer" / "tokenizer.json").is_file():
        export_tokenizer(load_tokenizer(str(run / "tokenizer")), config, out)
    write_model_card(run, out, config, weights)


def read_source(run: StrPath) -> dict[str, Any] | None:
    """The config.json that a run's weights came with; None: they are of no folder of the DeepSeek family."""
    file = Path(run, SOURCE_CONFIG)
    return read_json(file) if file.is_file() else None


def save_pretrained(model: CustomLLM, out: StrPath, *, dtype: str = "float32") -> None:
    """Export a model in memory: config.json, safetensors and, for a CustomLLM, the PyTorch modelling code.

    Raises:
        UserError: `out` holds something already.
    """
    check_new(out)
    _, params, routing_bias = split_model(model)
    write_model(model.config, Weights(params, routing_bias), out, dtype)


def check_new(out: StrPath) -> None:
    """Check that nothing would be overwritten.

    Raises:
        UserError: `out` is a file, a folder that is not empty, or no place for a folder.
    """
    out = Path(out)
    if out.is_symlink() and not out.exists():
        raise UserError(f"{out} is a symlink to nothing: pass a new folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty: pass a new folder")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{out} cannot be made: {parent} is no folder that can be written to")


def torch_tensors(
    config: ModelConfig, weights: Weights, dtype: str = "float32", interleaved: bool = True
) -> Iterator[Tensor]:
    """The PyTorch state_dict of given weights, each tensor made when it is read."""
    trees = {PARAMS: weights.params, ROUTING_BIAS: weights.routing_bias}
    for entry in entries(config, interleaved):
        own = "float32" if entry.float32 else dtype
        yield Tensor(entry.torch_name, entry.shape(trees), lambda entry=entry: entry.to_torch(trees), own)


def modeling_source() -> Path:
    """The PyTorch model's file, found without importing it (its import needs PyTorch)."""
    check_own("torch_ref")
    return ROOT / "torch_ref" / "model.py"


def write_model(
    config: ModelConfig, weights: Weights, out: StrPath, dtype: str, source: Mapping[str, Any] | None = None
) -> None:
    """Write config.json, safetensors and, for a CustomLLM, the modelling code into a folder.

    Args:
        source: the config.json that the weights came with.

    Raises:
        UserError: there is no such dtype, or no PyTorch model has all options of the config.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}: choose one of {', '.join(DTYPES)}")
    out, values = Path(out), write_config(config, dtype, source)
    out.mkdir(parents=True, exist_ok=True)
    write_safetensors(out, torch_tensors(config, weights, dtype, is_interleaved(source)))
    generation = {name: config.to_dict()[name] for name in SPECIAL_TOKENS}
    if names_of(config) == "customllm":
        shutil.copyfile(modeling_source(), out / MODELING_FILE)
        module, made_with = Path(MODELING_FILE).stem, {"transformers_version": version("transformers")}
        values |= {"auto_map": {auto: f"{module}.{own}" for auto, own in AUTO_CLASSES.items()}, "use_cache": True}
        values, generation = values | made_with, generation | made_with
    write_json(out / GENERATION_CONFIG, generation)
    write_json(out / "config.json", values)  # last: it makes the folder a model
