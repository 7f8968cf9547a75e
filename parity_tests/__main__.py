"""Run the parity ladder: check that both frameworks compute and train the same model.

python -m parity_tests                                      # random weights of `tiny`
python -m parity_tests RUN                                  # a training run
python -m parity_tests DIR                                  # an exported folder, or one of the DeepSeek family
python -m parity_tests --preset tiny-deepseek --seq-len 90  # against transformers' DeepseekV3ForCausalLM
python -m parity_tests --preset customllm-1b --layers 2 --rungs weights layers logits
python -m parity_tests --precision float64
python -m parity_tests --optimizer muon --rungs step trajectory
python -m parity_tests --mutate rope_halves_swapped         # plant a fault; a rung must catch it
python -m parity_tests pair my_pair.py                      # any pair of models; also `record` and `compare`
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # both frameworks on one device, else the comparison is between devices

from parity_tests.engine.command import COMMANDS
from parity_tests.engine.command import main as compare_pair

if __name__ == "__main__" and sys.argv[1:] and sys.argv[1] in COMMANDS:
    sys.exit(compare_pair(sys.argv[1:]))  # before the imports of both frameworks, of which it may need one

from convert.to_flax import read_folder
from convert.to_torch import export_run, read_source
from jaxllm.command_line import parse
from jaxllm.config import ModelConfig, preset
from jaxllm.config.families import is_interleaved, names_of
from jaxllm.errors import UserError, exit_on_user_error
from jaxllm.files import read_json
from jaxllm.generate import tokenizer_folder
from jaxllm.run.checkpoint import Weights, is_run, load_weights
from jaxllm.run.prepare import CONFIG_FILE
from jaxllm.run.runtime import check_devices
from parity_tests.compare import Row
from parity_tests.engine.report import first_divergence, print_table
from parity_tests.forward import random_weights, torch_model
from parity_tests.hf_mutations import STOCK_MUTATIONS
from parity_tests.ladder import MIN_STEPS, RUNGS, Ladder, Rung
from parity_tests.mutations import MUTATIONS, Mutation
from parity_tests.report import NAMED, draw_report, write_report
from parity_tests.text import read_tokens
from torch_ref import CustomLLM as TorchCustomLLM


@dataclass(frozen=True)
class ParityArgs:
    """Compare a model in both frameworks, from its weights to its training."""

    weights: Annotated[Path | None, tyro.conf.Positional] = None
    """A run or an exported folder; none: random weights for a preset."""
    preset: str = "tiny"
    """The preset, if no folder is given."""
    layers: int | None = None
    """The number of layers, instead of the preset's."""
    rungs: tuple[Rung, ...] = RUNGS
    """The comparisons to make."""
    precision: Literal["float32", "float64", "bfloat16"] = "float32"
    """float64 distinguishes errors from rounding."""
    seq_len: int = 500
    """Tokens in the forward comparisons; short texts miss position faults."""
    steps: int = 50
    """Steps of the training trajectory."""
    optimizer: Literal["adamw", "muon"] | None = None
    """Of the training rungs; none: that of the run, or adamw."""
    text: Path | None = None
    """A text file to compare on; none: the standard library's source code."""
    tokenizer: Path | None = None
    """A tokenizer folder; none: that of the weights, or a new one trained on the text."""
    mutate: str | None = None
    """A fault to plant in the PyTorch model; the ladder must catch it."""
    out: Path = Path("runs/parity")
    """The folder for parity.json and parity.png."""
    seed: int = 0
    """Seed of the random weights."""

    def __post_init__(self) -> None:
        for name, minimum in (("layers", 1), ("steps", MIN_STEPS), ("seq_len", 2), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise UserError(f"{name} is {value}: it must be at least {minimum}")
        if not self.rungs:
            raise UserError(f"rungs is empty: choose from {', '.join(RUNGS)}")
        known = [*MUTATIONS, *STOCK_MUTATIONS]
        if self.mutate is not None and self.mutate not in known:
            raise UserError(f"mutate is {self.mutate!r}: choose one of {', '.join(known)}")
        if self.weights is not None and self.layers is not None:
            raise UserError(f"layers is {self.layers}: it applies to a preset, not to given weights")


class Pair(NamedTuple):
    config: ModelConfig
    weights: Weights
    model: Any
    """CustomLLM in PyTorch, or transformers' model of the DeepSeek family."""
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
        return Pair(config, weights, torch_model(config, weights, args.precision))
    if is_run(args.weights):
        config, weights = load_weights(args.weights)
        if names_of(config) == "deepseek":
            return _deepseek_pair(args, config, weights, read_source(args.weights))
        with tempfile.TemporaryDirectory() as scratch:
            export_run(args.weights, Path(scratch) / "exported")
            model = TorchCustomLLM.from_pretrained(Path(scratch) / "exported")
    else:
        config, weights, source = read_folder(args.weights)
        if names_of(config) == "deepseek":
            return _deepseek_pair(args, config, weights, source)
        model = TorchCustomLLM.from_pretrained(args.weights)
    model.dropout.p = 0.0
    config = dataclasses.replace(config, dropout=0.0)
    return Pair(config, weights, (model.double() if args.precision == "float64" else model.float()).eval())


def _deepseek_pair(args: ParityArgs, config: ModelConfig, weights: Weights, source: dict[str, Any] | None) -> Pair:
    config = dataclasses.replace(config, dropout=0.0)
    return Pair(config, weights, torch_model(config, weights, args.precision, source), source)


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


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    args: ParityArgs = parse(ParityArgs, argv, "python -m parity_tests", __doc__)
    check_devices()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out is {str(args.out)!r}: it must be a folder that can be made ({error.strerror})") from None
    config, weights, model, source = load_pair(args)
    tokens = read_tokens(
        config, Ladder.tokens_needed(config, args.seq_len, args.steps), args.text, find_tokenizer(args)
    )
    interleaved = is_interleaved(source)
    optimizer = args.optimizer or (_optimizer_of(args.weights) if args.weights else None) or "adamw"
    ladder = Ladder(config, weights, tokens, args.precision, args.seq_len, args.steps, optimizer, interleaved)
    rows: list[Row] = []
    seconds: dict[str, float] = {}
    with nullcontext() if args.mutate is None else find_mutation(args.mutate, config, optimizer).plant(model):
        started = time.perf_counter()
        for rung, found in ladder.climb(model, args.rungs):
            rows += found
            seconds[rung] = time.perf_counter() - started
            started = time.perf_counter()
            print(
                f"{rung}: {'ok' if all(row.passed for row in found) else 'BREACH'}, {seconds[rung]:.1f} s", flush=True
            )

    name = str(args.weights or f"random weights of {args.preset}")
    if args.layers:
        name += f", {args.layers} layers"
    title = f"JAX and PyTorch on {name}, {ladder.ids.size} tokens, {args.precision}, {optimizer}"
    print_table(rows, title, NAMED)
    about = {"model": name, "precision": args.precision, "optimizer": optimizer, "mutation": args.mutate}
    about["config"] = config.to_dict()
    write_report(args.out / "parity.json", rows, ladder.curve, seconds, about)
    draw_report(args.out / "parity.png", rows, ladder.curve, title)
    for tolerance in ladder.tolerances.named():
        print(f"{tolerance.name}: relative L2 at most {tolerance.relative_l2:g} ({tolerance.reason})")
    divergence = first_divergence(rows)
    print(f"\nThe report is in {args.out}: parity.json, parity.png")
    print("The two frameworks agree." if divergence is None else f"BREACH, first in: {divergence}")
    return 0 if divergence is None else 1


if __name__ == "__main__":
    sys.exit(main())
