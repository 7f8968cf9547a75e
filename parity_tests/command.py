"""What `python -m parity_tests` does: load a model in both frameworks, climb the ladder, report."""

from __future__ import annotations

import dataclasses
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoModelForCausalLM

from convert.to_flax import read_folder
from convert.to_torch import AUTO_CLASSES, export_run, modeling_source, read_source
from jaxllm.config import ModelConfig, preset
from jaxllm.config.families import is_interleaved, names_of
from jaxllm.errors import UserError, listed, one_line, shown
from jaxllm.files import read_bounded, read_json
from jaxllm.generate import tokenizer_folder
from jaxllm.run.runtime import start_jax
from jaxllm.store.checkpoint import Weights, load_weights
from jaxllm.store.folder import CONFIG_FILE, is_run
from parity_tests import hf_side
from parity_tests.compare import Row
from parity_tests.engine.report import first_divergence, print_table
from parity_tests.forward import random_weights, torch_model
from parity_tests.hf_mutations import STOCK_MUTATIONS
from parity_tests.ladder import Ladder
from parity_tests.mutations import MUTATIONS, Mutation
from parity_tests.options import RUNGS, ParityArgs
from parity_tests.report import NAMED, draw_report, write_report
from parity_tests.text import read_tokens
from torch_ref import CustomLLM as TorchCustomLLM

OWN_CODE = "torch_ref/model.py"
COMPARED = ("AutoConfig", "AutoModelForCausalLM")
"""What the ladder loads; the others are classes of the same file."""

MAX_CODE_BYTES = 2**20


class Pair(NamedTuple):
    config: ModelConfig
    weights: Weights
    model: Any
    """CustomLLM in PyTorch, or transformers' model of the DeepSeek family."""
    code: str
    """What computes in PyTorch, for the verdict."""
    source: dict[str, Any] | None = None
    """The config.json that weights of the DeepSeek family came with."""


def load_pair(args: ParityArgs) -> Pair:
    """The Flax weights, and the PyTorch model, loaded as a user loads it from an exported folder. Dropout is off.

    Raises:
        UserError: there is no model, or it cannot be read.
    """
    if args.weights is None:
        config = dataclasses.replace(preset(args.preset), dropout=0.0)
        if args.layers is not None:
            config = dataclasses.replace(config, num_hidden_layers=args.layers)
        weights = random_weights(config, args.seed)
        model = torch_model(config, weights, args.precision)
        return Pair(config, weights, model, _stock(model) if names_of(config) == "deepseek" else OWN_CODE)
    if args.weights.is_file():
        raise UserError(f"weights is {str(args.weights)!r}: name the folder that a user would load")
    if is_run(args.weights):
        config, weights = load_weights(args.weights)
        if args.trust_remote_code:
            raise UserError(f"trust_remote_code is set: the run {str(args.weights)!r} holds no code, leave it out")
        if names_of(config) == "deepseek":
            return _deepseek_pair(args, config, weights, read_source(args.weights), folder=None)
        with tempfile.TemporaryDirectory() as scratch:
            export_run(args.weights, Path(scratch) / "exported")
            model, code = TorchCustomLLM.from_pretrained(Path(scratch) / "exported"), OWN_CODE
    else:
        source = read_json(args.weights / "config.json") if args.weights.is_dir() else {}
        own = source.get("model_type") in (None, TorchCustomLLM.config_class.model_type)
        code = check_code(args.weights, source, trusted=args.trust_remote_code) if own else ""  # before what is slow
        tokenizer = args.weights / "tokenizer_config.json"
        if own and tokenizer.is_file() and read_json(tokenizer).get("auto_map"):
            code += f"; not the code that {tokenizer} names in auto_map"
        config, weights, source = read_folder(args.weights)
        if names_of(config) == "deepseek":
            return _deepseek_pair(args, config, weights, source, folder=args.weights)
        kind = AutoModelForCausalLM if args.trust_remote_code else TorchCustomLLM
        try:
            model = kind.from_pretrained(args.weights, **{"trust_remote_code": True} if args.trust_remote_code else {})
        except Exception as error:  # of whatever the folder's code does
            raise UserError(f"{code} does not load {args.weights}: {one_line(error)}") from None
    model.dropout.p = 0.0
    config = dataclasses.replace(config, dropout=0.0)
    return Pair(config, weights, (model.double() if args.precision == "float64" else model.float()).eval(), code)


def check_code(folder: Path, source: Mapping[str, Any], *, trusted: bool) -> str:
    """The code of a CustomLLM's folder that is compared: this project's own, where the folder has the same bytes.

    Nothing in the folder is executed unless `trusted`.

    Raises:
        UserError: a user who loads the folder runs other code.
    """
    config = folder / "config.json"
    if not isinstance(source.get("auto_map"), dict) or not source["auto_map"]:
        if trusted:
            raise UserError(f"trust_remote_code is set: {config} names no code, leave it out")
        return f"{OWN_CODE} ({config} names no code)"
    remedy = (
        "export the weights again (`python -m convert to-flax` and `to-torch`), or pass --trust-remote-code to run "
        "and compare what is there"
    )
    passed_over = []
    for auto, entry in (dict.fromkeys(COMPARED) | source["auto_map"]).items():
        for name in entry if isinstance(entry, list) else [entry]:
            module, _, kind = str(name).rpartition(".")
            file = folder / f"{module}.py"
            if trusted and auto not in COMPARED:
                passed_over += [] if name is None else [str(name)]
                continue
            what = f"{config}: auto_map gives {listed([auto])} as {shown(name)}"
            if not re.fullmatch(r"\w+", module) or not file.is_file():
                put = "put the file there" if trusted else remedy
                raise UserError(f"{what}, which is not a class of a file in that folder: {put}")
            if not trusted and kind != AUTO_CLASSES.get(auto):
                raise UserError(f"{what}, and {OWN_CODE} has {AUTO_CLASSES.get(auto, 'no such class')}: {remedy}")
            if not trusted and read_bounded(file, MAX_CODE_BYTES) != modeling_source().read_bytes():
                raise UserError(f"{file} is not this version's {OWN_CODE}, but an older one or edited: {remedy}")
    of_model = str(source["auto_map"][COMPARED[1]]).rpartition(".")[0]
    passed_over = [name for name in passed_over if name.rpartition(".")[0] != of_model]
    compared = folder / f"{of_model}.py"
    code = str(compared) if trusted else f"{OWN_CODE}, which {compared} equals byte for byte"
    return code + (f"; not {listed(passed_over)}, which auto_map names too" if passed_over else "")


def _stock(model: Any) -> str:
    return f"{type(model).__name__} of transformers {version('transformers')}"


def _deepseek_pair(
    args: ParityArgs, config: ModelConfig, weights: Weights, source: dict[str, Any] | None, folder: Path | None
) -> Pair:
    config = dataclasses.replace(config, dropout=0.0)
    if args.trust_remote_code:
        raise UserError("trust_remote_code is set: the DeepSeek family is compared with transformers' classes")
    model = torch_model(config, weights, args.precision, source, folder)
    code = _stock(model)
    if folder is not None and (source or {}).get("auto_map"):
        code += f"; not the code that {folder / 'config.json'} names in auto_map"
    if folder is not None and not hf_side.loads_itself(source):
        code += "; the quantized weights as this project reads them"
    return Pair(config, weights, model, code, source)


def find_mutation(name: str, config: ModelConfig, optimizer: str) -> Mutation:
    """
    Raises:
        UserError: the model or its optimizer cannot have this fault.
    """
    if names_of(config) == "deepseek":
        possible = {name: known.mutation for name, known in STOCK_MUTATIONS.items() if known.applies(config)}
    else:
        possible = {name: known for name, known in MUTATIONS.items() if known.optimizer in (None, optimizer)}
    if name not in possible:
        raise UserError(f"mutate is {name!r}: this model with {optimizer} can have one of {', '.join(possible)}")
    return possible[name]


def _optimizer_of(folder: Path) -> str | None:
    """The optimizer of a training run; None: the folder is none, or of a version that had one optimizer."""
    file = folder / CONFIG_FILE
    return read_json(file).get("optimizer") if file.is_file() else None


def find_tokenizer(args: ParityArgs) -> Path | None:
    if args.tokenizer is not None or args.weights is None:
        return args.tokenizer
    folder = tokenizer_folder(args.weights)
    return folder if (folder / "tokenizer.json").is_file() else None


def compare(args: ParityArgs) -> int:
    """Make the comparisons, print and write the report; returns the exit code.

    Raises:
        UserError: an option, the weights, their code or the text cannot be compared.
    """
    known = [*MUTATIONS, *STOCK_MUTATIONS]
    if args.mutate is not None and args.mutate not in known:
        raise UserError(f"mutate is {args.mutate!r}: choose one of {', '.join(known)}")
    start_jax()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out is {str(args.out)!r}: it must be a folder that can be made ({error.strerror})") from None
    config, weights, model, code, source = load_pair(args)
    tokens = read_tokens(
        config, Ladder.tokens_needed(config, args.seq_len, args.steps), args.text, find_tokenizer(args)
    )
    interleaved = is_interleaved(source)
    optimizer = args.optimizer or (_optimizer_of(args.weights) if args.weights else None) or "adamw"
    ladder = Ladder(config, weights, tokens, args.precision, args.seq_len, args.steps, optimizer, interleaved)
    rows: list[Row] = []
    seconds: dict[str, float] = {}
    try:
        with nullcontext() if args.mutate is None else find_mutation(args.mutate, config, optimizer).plant(model):
            started = time.perf_counter()
            for rung, found in ladder.climb(model, args.rungs):
                rows += found
                seconds[rung] = time.perf_counter() - started
                started = time.perf_counter()
                print(
                    f"{rung}: {'ok' if all(row.passed for row in found) else 'BREACH'}, {seconds[rung]:.1f} s",
                    flush=True,
                )
    except Exception as error:  # of whatever the folder's code does
        if isinstance(error, UserError) or not args.trust_remote_code:
            raise
        print(f"error: {code} fails in a comparison: {type(error).__name__}: {one_line(error)}", file=sys.stderr)
        return 1

    name = str(args.weights or f"random weights of {args.preset}")
    if args.layers:
        name += f", {args.layers} layers"
    title = f"JAX and PyTorch on {name}, {ladder.ids.size} tokens, {args.precision}, {optimizer}"
    print_table(rows, title, NAMED)
    about = {"model": name, "precision": args.precision, "optimizer": optimizer, "mutation": args.mutate}
    about |= {"pytorch": code, "config": config.to_dict()}
    write_report(args.out / "parity.json", rows, ladder.curve, seconds, about)
    draw_report(args.out / "parity.png", rows, ladder.curve, title)
    for tolerance in ladder.tolerances.named():
        print(f"{tolerance.name}: relative L2 at most {tolerance.relative_l2:g} ({tolerance.reason})")
    divergence = first_divergence(rows)
    print(f"\nThe report is in {args.out}: parity.json, parity.png")
    print(f"PyTorch's side: {code}")
    if left_out := [rung for rung in RUNGS if rung not in args.rungs]:
        print(f"Not compared: {', '.join(left_out)}")
    print("The two frameworks agree." if divergence is None else f"BREACH, first in: {divergence}")
    if args.mutate is not None and divergence is None:
        print(f"The planted fault {args.mutate} was not seen.")
    return 0 if divergence is None else 1
