"""What a run has learned, in numbers that do not depend on its tokenizer.

python -m benchmarks.learning RUN [RUN ...]

Bits per byte of the evaluation, and the share of samples of Python that parse. The last line of a sample is cut off in
the middle, so it is left out; `ast.parse` must accept the others. The prompt is the beginning of a document.
"""

import ast
import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jaxllm import load_model
from jaxllm.command_line import parse
from jaxllm.config.fields import check_fields, option
from jaxllm.data.tokenizer import load_tokenizer
from jaxllm.errors import UserError, exit_on_user_error
from jaxllm.model.decoding import Sampling, generate
from jaxllm.store.metrics_file import last_evaluation


@dataclass(frozen=True)
class LearningArgs:
    """Which runs to look at, and how many samples to draw."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs."""
    samples: int = option(64, ge=1)
    """How many samples are drawn of each run."""
    tokens: int = 100
    """New tokens of a sample."""
    temperature: float = 0.5
    """Of the samples."""
    seed: int = 0
    """Of the samples."""

    def __post_init__(self) -> None:
        check_fields(self)


def parses(sample: str) -> bool:
    """Whether the completed lines of a sample, one at least that is not blank, are Python."""
    completed = sample.rpartition("\n")[0]
    if not completed.strip():
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in strings
            ast.parse(completed)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def share_that_parses(run: Path, args: LearningArgs) -> float:
    model, tokenizer = load_model(run), load_tokenizer(str(run / "tokenizer"))
    sampling, start = Sampling(temperature=args.temperature), [tokenizer.eos_token_id]
    made = generate(model, [start] * args.samples, args.tokens, sampling, seed=args.seed)
    texts = [str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in made]
    return sum(map(parses, texts)) / len(texts)


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    args = parse(LearningArgs, argv, "python -m benchmarks.learning", __doc__)
    for run in args.runs:
        last = last_evaluation(run)
        if last is None:
            raise UserError(f"runs has {str(run)!r}: it is no run, or was not evaluated")
        bits = last.get("eval_bits_per_byte") or math.nan
        print(
            f"{run}: step {last['step']}, evaluation loss {last['eval_loss']:.4f}, {bits:.4f} bits per byte, "
            f"{share_that_parses(run, args):.0%} of {args.samples} samples parse"
        )


if __name__ == "__main__":
    sys.exit(main())
