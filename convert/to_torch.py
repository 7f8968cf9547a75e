"""Flax to PyTorch: write the folder that `AutoModelForCausalLM.from_pretrained` reads. Needs no PyTorch."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from convert.mapping import PARAMS, ROUTING_BIAS, entries, leaf, torch_shape
from convert.tensor_files import DTYPES, Tensor, write_safetensors
from jaxllm.config import SPECIAL_TOKENS, ModelConfig
from jaxllm.data.tokenizer import export_tokenizer, load_tokenizer
from jaxllm.errors import UserError
from jaxllm.files import write_json
from jaxllm.model.decoder import CustomLLM, split_model
from jaxllm.run.checkpoint import Weights, load_weights

MODELING_FILE = "modeling_customllm.py"
AUTO_CLASSES = {
    "AutoConfig": "CustomLLMConfig",
    "AutoModel": "CustomLLMModel",
    "AutoModelForCausalLM": "CustomLLM",
    "AutoModelForSequenceClassification": "CustomLLMForSequenceClassification",
    "AutoModelForTokenClassification": "CustomLLMForTokenClassification",
}
"""As in `torch_ref.model`, whose import needs PyTorch."""


def export_run(run: Path, out: Path, *, dtype: str = "float32") -> None:
    """Export the newest weights of a run, with its tokenizer.

    Raises:
        UserError: `run` is no run, or `out` holds something already.
    """
    check_new(out)
    config, weights = load_weights(run)
    write_model(config, weights, out, dtype)
    if (run / "tokenizer" / "tokenizer.json").is_file():
        export_tokenizer(load_tokenizer(str(run / "tokenizer")), config, out)


def save_pretrained(model: CustomLLM, out: str | Path, *, dtype: str = "float32") -> None:
    """Export a model in memory: config.json, safetensors and the PyTorch modelling code.

    Raises:
        UserError: `out` holds something already.
    """
    check_new(Path(out))
    _, params, routing_bias = split_model(model)
    write_model(model.config, Weights(params, routing_bias), Path(out), dtype)


def check_new(out: Path) -> None:
    """Check that nothing would be overwritten.

    Raises:
        UserError: `out` is a file, a folder that is not empty, or no place for a folder.
    """
    if out.is_symlink() and not out.exists():
        raise UserError(f"{out} is a symlink to nothing: pass a new folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty: pass a new folder")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{out} cannot be made: {parent} is no folder that can be written to")


def hf_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The exported `config.json`: the model's shape in transformers' words, and the file of its code."""
    module = Path(MODELING_FILE).stem
    return {
        "architectures": ["CustomLLM"],
        "model_type": "customllm",
        "auto_map": {auto: f"{module}.{own}" for auto, own in AUTO_CLASSES.items()},
        "dtype": dtype,
        "transformers_version": version("transformers"),
        "use_cache": True,
        **config.to_dict(),
    }


def torch_tensors(config: ModelConfig, weights: Weights) -> Iterator[Tensor]:
    """The PyTorch state_dict of given weights, each tensor made when it is read."""
    trees = {PARAMS: weights.params, ROUTING_BIAS: weights.routing_bias}
    for entry in entries(config):
        array = np.asarray(leaf(trees[entry.tree], entry.path))  # a view of a CPU array
        shape = torch_shape(entry, array.shape)
        yield Tensor(entry.torch_name, shape, lambda entry=entry, array=array: entry.to_torch(array))


def modeling_source() -> Path:
    """The PyTorch model's file, found without importing it (its import needs PyTorch)."""
    package = importlib.util.find_spec("torch_ref")
    if package is None or package.origin is None:
        raise UserError("the package torch_ref is not installed: install this project with pip install -e .")
    return Path(package.origin).parent / "model.py"


def write_model(config: ModelConfig, weights: Weights, out: Path, dtype: str) -> None:
    """Write config.json, safetensors and the modelling code into a folder.

    Raises:
        UserError: there is no such dtype.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}: choose one of {', '.join(DTYPES)}")
    out.mkdir(parents=True, exist_ok=True)
    write_safetensors(out, torch_tensors(config, weights), dtype)
    shutil.copyfile(modeling_source(), out / MODELING_FILE)
    generation = {name: getattr(config, name) for name in SPECIAL_TOKENS}
    generation["transformers_version"] = version("transformers")
    write_json(out / "generation_config.json", generation)
    write_json(out / "config.json", hf_config(config, dtype))  # last: it makes the folder a model
