"""What `python -m parity_tests` does: load a model in both frameworks, climb the ladder, report."""

from __future__ import annotations

import dataclasses
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from transformers import AutoModelForCausalLM

from convert.base import run_weights
from convert.to_flax import read_folder
from convert.to_torch import AUTO_CLASSES, export_run, modeling_source, read_source
from jaxllm.config import ModelConfig, TrainConfig, preset
from jaxllm.config.families import is_interleaved, names_of
from jaxllm.data.tokenizer_files import has_tokenizer
from jaxllm.errors import UserError, listed, one_line, shown
from jaxllm.files import read_bounded, read_json
from jaxllm.generate import tokenizer_folder
from jaxllm.run.runtime import start_jax, use_compilation_cache
from jaxllm.store.checkpoint import Weights
from jaxllm.store.folder import CONFIG_FILE, is_run, read_config
from parity_tests import hf_side
from parity_tests.adapter_mutations import ADAPTER_MUTATIONS
from parity_tests.adapters import has_peft, read_adapters
from parity_tests.compare import Row
from parity_tests.engine.report import first_divergence, print_table
from parity_tests.executed import Executed, in_short
from parity_tests.forward import random_weights, torch_model
from parity_tests.hf_mutations import STOCK_MUTATIONS
from parity_tests.jax_mutations import BFLOAT16_MUTATIONS, JAX_MUTATIONS
from parity_tests.ladder import Ladder
from parity_tests.mutations import MUTATIONS, Mutation
from parity_tests.options import RUNGS, ParityArgs
from parity_tests.report import NAMED, draw_report, write_page, write_report
from parity_tests.settings import Settings
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
        config = dataclasses.replace(preset(args.random_preset), dropout=0.0)
        if args.layers is not None:
            config = dataclasses.replace(config, num_hidden_layers=args.layers)
        weights = random_weights(config, args.seed or 0)
        model = torch_model(config, weights, args.precision)
        return Pair(config, weights, model, _stock(model) if names_of(config) == "deepseek" else OWN_CODE)
    if args.weights.is_file():
        raise UserError(f"weights is {str(args.weights)!r}: name the folder that a user would load")
    if is_run(args.weights):
        config, weights = run_weights(args.weights)
        weights = Weights(*jax.tree.map(lambda leaf: leaf.astype(np.float32), tuple(weights)))
        if args.trust_remote_code:
            raise UserError(f"trust_remote_code is set: the run {str(args.weights)!r} holds no code, leave it out")
        if names_of(config) == "deepseek":
            return _deepseek_pair(args, config, weights, read_source(args.weights), folder=None)
        with tempfile.TemporaryDirectory() as scratch:
            export_run(args.weights, Path(scratch) / "exported", dtype="float32")
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


def find_mutation(name: str, config: ModelConfig, optimizer: str, adapted: bool) -> Mutation:
    """
    Args:
        adapted: whether adapters are compared.

    Raises:
        UserError: the model or its optimizer cannot have this fault.
    """
    if names_of(config) == "deepseek":
        possible = {name: known.mutation for name, known in STOCK_MUTATIONS.items() if known.applies(config)}
    else:
        possible = {name: known for name, known in MUTATIONS.items() if known.optimizer in (None, optimizer)}
    possible |= JAX_MUTATIONS | BFLOAT16_MUTATIONS | (ADAPTER_MUTATIONS if adapted else {})
    if name not in possible:
        raise UserError(f"mutate is {name!r}: this model with {optimizer} can have one of {', '.join(possible)}")
    return possible[name]


def _run_of(folder: Path | None) -> TrainConfig | None:
    """The settings of a training run; None: the folder is none, or of a version whose settings cannot be read."""
    if folder is None or not (folder / CONFIG_FILE).is_file():
        return None
    try:
        return read_config(folder, TrainConfig)
    except UserError as error:
        print(f"The rungs have no settings of the run: {error}", file=sys.stderr)
        return None


def find_tokenizer(args: ParityArgs) -> Path | None:
    if args.tokenizer is not None or args.weights is None:
        return args.tokenizer
    folder = tokenizer_folder(args.weights)
    return folder if has_tokenizer(folder) else None


def compare(args: ParityArgs) -> int:
    """Make the comparisons, print and write the report; returns the exit code.

    Raises:
        UserError: an option, the weights, their code or the text cannot be compared.
    """
    known = [*MUTATIONS, *STOCK_MUTATIONS, *JAX_MUTATIONS, *BFLOAT16_MUTATIONS, *ADAPTER_MUTATIONS]
    if args.mutate is not None and args.mutate not in known:
        raise UserError(f"mutate is {args.mutate!r}: choose one of {', '.join(known)}")
    start_jax()
    use_compilation_cache()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out is {str(args.out)!r}: it must be a folder that can be made ({error.strerror})") from None
    executed, run = Executed(), _run_of(args.weights)
    passes, settings = plan_passes(args, run)
    with executed.watching():  # from the start: what follows from a config is computed once in a process
        pair = load_pair(args)
    config, code, adapters = pair.config, pair.code, None
    if run is not None and args.weights is not None and "adapters" in passes[0].rungs:
        adapters = read_adapters(args.weights, config, run)
    tokens = read_tokens(config, Ladder.tokens_needed(config, settings), args.text, find_tokenizer(args))
    ladders: list[Ladder] = []
    rows: list[Row] = []
    seconds: dict[str, float] = {}
    try:
        for precision, rungs, of_pass in passes:
            if ladders and "step" in rungs:
                of_pass = dataclasses.replace(of_pass, norms=ladders[0].training.norms)
            with executed.watching():
                interleaved = is_interleaved(pair.source)
                compared = adapters if "adapters" in rungs else None
                ladders.append(Ladder(config, pair.weights, tokens, precision, of_pass, interleaved, compared))
                for rung, found in climb(args, pair, ladders[-1], rungs, seconds, len(passes) > 1):
                    rows += [dataclasses.replace(row, rung=rung) for row in found]
    except Exception as error:  # of whatever the folder's code does
        if isinstance(error, UserError) or not args.trust_remote_code:
            raise
        print(f"error: {code} fails in a comparison: {type(error).__name__}: {one_line(error)}", file=sys.stderr)
        return 1

    name = model = args.weights.absolute().name if args.weights else f"random weights of {args.random_preset}"
    if args.layers:
        name += f", {args.layers} layers"
    precisions, ladder = [precision for precision, _, _ in passes], ladders[0]
    optimizer = ladder.plan.config.optim.optimizer
    title = f"JAX and PyTorch on {name}, {ladder.ids.size} tokens, {' and '.join(precisions)}, {optimizer}"
    print_table(rows, title, NAMED)
    left_out, never = not_compared(args, passes, ladders, run), executed.missed()
    about = {"model": model, "precision": precisions[0], "optimizer": optimizer, "mutation": args.mutate}
    about |= {"pytorch": code, "config": config.to_dict(), "not_compared": left_out}
    about |= {"never_executed": [missed._asdict() for missed in never]}
    write_report(args.out / "parity.json", rows, ladder.curve, seconds, about)
    draw_report(args.out / "parity.png", rows, ladder.curve, title)
    for tolerance in dict.fromkeys(t for ladder in ladders for t in ladder.tolerances.named()):
        print(f"{tolerance.name}: relative L2 at most {tolerance.relative_l2:g} ({tolerance.reason})")
    divergence = first_divergence(rows)
    print(f"\nThe report is in {args.out}: parity.html, parity.json, parity.png")
    lines = [f"PyTorch's side: {code}"]
    lines += [f"Training in {ladder.precision}: {ladder.plan.described()}" for ladder in ladders]
    lines += [f"Adapters in {ladder.precision}: {ladder.adapters.described()}" for ladder in ladders if ladder.adapters]
    lines += [
        f"Not compared: {'; '.join(left_out)}",
        f"Never ran, in parts or whole (lines: parity.json): {in_short(never)}",
    ]
    verdict = "The two frameworks agree." if divergence is None else f"BREACH, first in: {divergence}"
    print(*lines, verdict, sep="\n")
    write_page(args.out / "parity.html", rows, [f"{title}: {verdict}", *lines], about | {"options": _public(args)})
    if args.mutate is not None and divergence is None:
        print(f"The planted fault {args.mutate} was not seen.")
    return 0 if divergence is None else 1


def _public(args: ParityArgs) -> dict[str, Any]:
    """The options, with the names of files and folders alone: the page is published with an export."""
    return {name: value.name if isinstance(value, Path) else value for name, value in vars(args).items()}


def climb(
    args: ParityArgs, pair: Pair, ladder: Ladder, rungs: Iterable[str], seconds: dict[str, float], several: bool
) -> Iterator[tuple[str, list[Row]]]:
    """Climb with the fault of `args`, print a line for each rung, and enter its time.

    Args:
        several: whether bfloat16 comes after float32; its rungs are then named so.
    """
    optimizer = ladder.plan.config.optim.optimizer
    adapted = ladder.adapters is not None
    mutation = None if args.mutate is None else find_mutation(args.mutate, pair.config, optimizer, adapted)
    with nullcontext() if mutation is None else mutation.plant(pair.model):
        started = time.perf_counter()
        for rung, rows in ladder.climb(pair.model, rungs):
            name = f"{rung}, bfloat16" if several and ladder.precision == "bfloat16" else rung
            seconds[name] = time.perf_counter() - started
            started = time.perf_counter()
            verdict = "ok" if all(row.passed for row in rows) else "BREACH"
            print(f"{name}: {verdict if rows else 'nothing to compare'}, {seconds[name]:.1f} s", flush=True)
            yield name, rows


class Pass(NamedTuple):
    """One climb of the ladder."""

    precision: str
    rungs: tuple[str, ...]
    settings: Settings


BFLOAT16_RUNGS = ("parts", "gradients", "step", "trajectory")
"""What is climbed again in the precision of a run that computes in bfloat16, after float32."""

BFLOAT16_STEPS = 10

NOT_QUICK = ("padding", "evaluation")
"""What `--quick` leaves out: a program for each is compiled."""


def plan_passes(args: ParityArgs, run: TrainConfig | None) -> tuple[list[Pass], Settings]:
    """The climbs, and the settings of the first.

    Raises:
        UserError: the rung of adapters is asked for, and cannot be climbed.
    """
    reason = _without_adapters(args, run)
    if reason and "adapters" in args.rungs and args.rungs != RUNGS:
        raise UserError(f"rungs has adapters, and {reason}")
    settings = Settings(
        args.seq_len, args.most_steps, args.optimizer, run, widens=not args.quick, greedy=not args.quick
    )
    left_out = (*(NOT_QUICK if args.quick else ()), *(("adapters",) if reason else ()))
    rungs = tuple(rung for rung in args.rungs if rung not in left_out)
    passes = [Pass(args.precision or "float32", rungs, settings)]
    if args.precision is None and not args.quick and run is not None and run.precision == "bfloat16":
        again = tuple(rung for rung in rungs if rung in BFLOAT16_RUNGS)
        passes.append(Pass("bfloat16", again, dataclasses.replace(settings, most_steps=BFLOAT16_STEPS)))
    return passes, settings


def _without_adapters(args: ParityArgs, run: TrainConfig | None) -> str | None:
    """Why no adapters are compared; None: they are."""
    if run is None or not run.adapters:
        return "there is no run that trains adapters: leave the rung out"
    if args.precision == "bfloat16":
        return "they are compared in float32 or float64: pass another --precision"
    return None if has_peft() else "they are compared with PEFT: pip install 'peft>=0.21'"


def not_compared(args: ParityArgs, passes: list[Pass], ladders: list[Ladder], run: TrainConfig | None) -> list[str]:
    """What this comparison says nothing about, besides code that never ran."""
    without = _without_adapters(args, run)
    rungs = [rung for rung in RUNGS if rung not in passes[0].rungs and not (without and rung == "adapters")]
    found = [f"the rungs {', '.join(rungs)}"] if rungs else []
    for precision, climbed, _ in passes[1:]:
        found.append(f"in {precision}: {', '.join(rung for rung in passes[0].rungs if rung not in climbed)}")
    found += dict.fromkeys(line for ladder in ladders for line in ladder.not_compared)
    if not ladders[0].plan.beyond_thresholds:
        found += ["the code beyond its thresholds (blocks of queries, chunks of the loss, large groups of an expert)"]
    computes = run.precision if run else None
    if computes and computes not in [precision for precision, _, _ in passes]:
        found.append(f"{computes}, in which the run computes")
    if run is not None:
        if run.model.dropout:
            found.append(f"dropout {run.model.dropout:g}, which the frameworks draw differently")
        if run.adapters:
            what = "more than one step of" if "adapters" in passes[0].rungs else "the training of"
            remedy = f" ({without})" if without else ""
            found.append(f"{what} the run's adapters{remedy}: the other rungs merge them and train all weights")
        if run.data.documents == "separate":
            found.append("padding after the last document of a row: the rungs' rows are full")
        if run.data.has_targets:
            found.append("which tokens of a chat are targets: the rungs choose their own")
        if run.mesh.parallel != "jit" or run.mesh.axes:
            found.append(f"the run's devices ({run.mesh.axes or run.mesh.parallel}): one is compared")
    if "step" in passes[0].rungs:
        found.append("steps that are not finite, in which JAX changes nothing")
    return [*found, "sampling, which the frameworks draw differently"]
