"""Flax to PyTorch: write the folder that `AutoModelForCausalLM.from_pretrained` reads. Needs no PyTorch.

A CustomLLM comes with its code; a model of the DeepSeek family is of a class that transformers has.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from convert import mtp
from convert.base import run_weights
from convert.mapping import PARAMS, ROUTING_BIAS, entries
from convert.model_card import CARD_FILE, write_model_card
from convert.new_folder import check_new, new_folder
from convert.weight_files import MAX_INDEX_BYTES
from convert.write_files import DTYPES, Tensor, write_safetensors
from jaxllm.config import SPECIAL_TOKENS, ModelConfig
from jaxllm.config.families import is_interleaved, names_of, write_config
from jaxllm.data.tokenizer import export_tokenizer, load_tokenizer
from jaxllm.errors import shown
from jaxllm.files import StrPath, read_json, write_json
from jaxllm.model.decoder import CustomLLM, split_model
from jaxllm.model.dtypes import check_dtype
from jaxllm.packages import ROOT, check_own
from jaxllm.store.checkpoint import Weights
from jaxllm.store.folder import CONFIG_FILE, SOURCE_DTYPES, TOKENIZER, adapters_of
from jaxllm.store.source import GENERATION_CONFIG, kept_files, read_source

MODELING_FILE = "modeling_customllm.py"
AUTO_CLASSES = {
    "AutoConfig": "CustomLLMConfig",
    "AutoModel": "CustomLLMModel",
    "AutoModelForCausalLM": "CustomLLM",
    "AutoModelForSequenceClassification": "CustomLLMForSequenceClassification",
    "AutoModelForTokenClassification": "CustomLLMForTokenClassification",
}
"""As in `torch_ref.model`, whose import needs PyTorch."""


def export_run(run: StrPath, out: StrPath, *, dtype: Any = None, drop_mtp: bool = False) -> None:
    """Export the newest weights of a run, with a model card, its tokenizer, and the files that the weights came with.

    Those files are the same, byte for byte, except for changes that a message names. So are tensors of multi-token
    prediction, which are read where the weights came from. Adapters are merged into the weights.

    Args:
        dtype: of the weights; None: that of the folder that they came from, or float32.
        drop_mtp: whether to leave out multi-token prediction.

    Raises:
        UserError: `run` is not a run folder, or `out` holds something already, or the source of its MTP tensors is
            not there.
    """
    run, out = Path(run), Path(out)
    check_new(out)
    asked = None if dtype is None else check_dtype(dtype, allowed=DTYPES).name
    kept, stored, source = kept_files(run), _stored_dtypes(run), read_source(run)
    named = (source or {}).get("dtype") or (source or {}).get("torch_dtype")
    given = asked or stored.get("dtype") or (named if named in DTYPES else "float32")
    others = None if asked else stored.get("others")
    with ExitStack() as stack:
        carried: list[Tensor] = []
        if mtp.KEY in stored and not drop_mtp:
            files = mtp.carried(stored[mtp.KEY], kept.get("config.json"), given, asked is not None)
            carried = stack.enter_context(files)
            print(f"{len(carried)} tensors of multi-token prediction are those of the source, which were not trained")
        elif mtp.KEY in stored:
            print("Multi-token prediction is left out")
        config, weights = run_weights(run)
        trained = (run / CONFIG_FILE).is_file()
        if trained and others is not None and not adapters_of(run):
            moved = {entry.torch_name: "float32" for entry in entries(config) if entry.float32}
            if any(others.get(name, given) != "float32" for name in moved):
                print("The correction biases are in float32: training moves them by less than the source's dtype holds")
            others = others | moved
        made = stack.enter_context(new_folder(out))
        write_model(config, weights, made, given, source, others, carried)
        if source is None:
            if (run / TOKENIZER / "tokenizer.json").is_file():
                export_tokenizer(load_tokenizer(str(run / TOKENIZER)), config, made)
        else:
            _copy_kept(kept, made, config, trained)
        tensors = (*torch_tensors(config, weights, given, others=others), *carried)
        write_model_card(run, made, config, weights, {tensor.dtype for tensor in tensors}, len(carried))


def _stored_dtypes(run: Path) -> dict[str, Any]:
    """What a run keeps of the weights that it started from (`convert.to_flax.Imported`), if it does."""
    file = run / SOURCE_DTYPES
    return read_json(file, MAX_INDEX_BYTES) if file.is_file() else {}


def _copy_kept(kept: Mapping[str, Path], out: Path, config: ModelConfig, trained: bool) -> None:
    """Copy what came with the weights into their export; a line names each file of it that is changed or left out.

    After training, generation_config.json ends texts with the tokens that ended them in training.
    """
    source, written = read_json(kept["config.json"]), {"config.json": read_json(out / "config.json")}
    if "auto_map" in source and _code_files(source["auto_map"]) <= kept.keys():
        written["config.json"].setdefault("auto_map", source["auto_map"])
    if GENERATION_CONFIG in kept:
        generation = read_json(kept[GENERATION_CONFIG])
        ends = generation.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [ends]
        if trained and not all(token in ends for token in config.eos_token_ids):
            generation["eos_token_id"] = config.to_dict()["eos_token_id"]
        written[GENERATION_CONFIG] = generation
    for name, file in kept.items():
        if name in written and (changes := _changes(read_json(file), written[name])):
            write_json(out / name, written[name])
            print(f"{name} is copied from the source, except: {changes}")
        elif name == CARD_FILE or (name == MODELING_FILE and (out / name).exists()):
            if name == CARD_FILE or (out / name).read_bytes() != file.read_bytes():
                print(f"{name} is written anew: the source's is left out")
        else:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, out / name)


def _code_files(auto_map: Any) -> set[str]:
    """The Python files that an auto_map names in its own folder; an entry may have several classes."""
    found = set()
    for entry in auto_map.values() if isinstance(auto_map, dict) else ():
        classes = entry if isinstance(entry, list) else [entry]
        found |= {f"{name.partition('.')[0]}.py" for name in classes if isinstance(name, str) and "--" not in name}
    return found


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    changes = [f"{key} is left out" for key in before if key not in after]
    for key, value in after.items():
        if key not in before:
            changes.append(f"{key} is {shown(value)}")
        elif value != before[key]:
            changes.append(f"{key} is {shown(value)}, not {shown(before[key])}")
    return ", ".join(changes)


def save_pretrained(model: CustomLLM, out: StrPath, *, dtype: Any = "float32") -> None:
    """Export a model in memory: config.json, safetensors and, for a CustomLLM, the PyTorch modelling code.

    A model of `for_inference` is exported with its matrices as they are, of which float32 holds every value.

    Args:
        dtype: of the file: float32, bfloat16 or float16, by its name or as a dtype.

    Raises:
        UserError: `out` holds something already, there is no such dtype, or a weight is not a finite number in it.
    """
    _, params, routing_bias = split_model(model)
    with new_folder(out) as made:
        write_model(model.config, Weights(params, routing_bias), made, dtype)


def torch_tensors(
    config: ModelConfig,
    weights: Weights,
    dtype: str = "float32",
    interleaved: bool = True,
    others: Mapping[str, str] | None = None,
) -> Iterator[Tensor]:
    """The PyTorch state_dict of given weights, each tensor made when it is read; `others` as in `write_model`."""
    trees = {PARAMS: weights.params, ROUTING_BIAS: weights.routing_bias}
    for entry in entries(config, interleaved):
        own = "float32" if entry.float32 and others is None else (others or {}).get(entry.torch_name, dtype)
        yield Tensor(entry.torch_name, entry.shape(trees), lambda entry=entry: entry.to_torch(trees), own)


def modeling_source() -> Path:
    """The PyTorch model's file, found without importing it (its import needs PyTorch)."""
    check_own("torch_ref")
    return ROOT / "torch_ref" / "model.py"


def write_model(
    config: ModelConfig,
    weights: Weights,
    out: StrPath,
    dtype: Any,
    source: Mapping[str, Any] | None = None,
    others: Mapping[str, str] | None = None,
    carried: Sequence[Tensor] = (),
) -> None:
    """Write config.json, safetensors and, for a CustomLLM, the modelling code into a folder.

    Args:
        dtype: of the weights.
        source: the config.json that the weights came with.
        others: where the dtypes are those of the source's files, the tensors that have another one. What the source's
            config.json says of its dtype stays then.

    Raises:
        UserError: there is no such dtype, a weight is not a finite number in it, or no PyTorch model has all options of
            the config.
    """
    dtype = check_dtype(dtype, allowed=DTYPES).name
    said = dtype if source is None or others is None else source.get("dtype", source.get("torch_dtype", dtype))
    out, values = Path(out), write_config(config, said, source, mtp=bool(carried))
    out.mkdir(parents=True, exist_ok=True)
    write_safetensors(out, (*torch_tensors(config, weights, dtype, is_interleaved(source), others), *carried))
    generation = {name: config.to_dict()[name] for name in SPECIAL_TOKENS}
    if names_of(config) == "customllm":
        shutil.copyfile(modeling_source(), out / MODELING_FILE)
        module = Path(MODELING_FILE).stem
        values |= {"auto_map": {auto: f"{module}.{own}" for auto, own in AUTO_CLASSES.items()}, "use_cache": True}
        if source is None:
            made_with = {"transformers_version": version("transformers")}
            values, generation = values | made_with, generation | made_with
    write_json(out / GENERATION_CONFIG, generation)
    write_json(out / "config.json", values)  # last: it makes the folder a model
