"""Text generation with a trained model: the command line.

python -m jaxllm.generate RUN --prompt "def " --max-new-tokens 100 --temperature 0.8 --top-p 0.95
python -m jaxllm.generate RUN --chat
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from flax import nnx

from jaxllm.command_line import parse
from jaxllm.config import MAX_SEED, KernelsOption, Precision
from jaxllm.config.fields import check_fields, option
from jaxllm.config.groups import MAX_TEMPERATURE
from jaxllm.data.encode import encoder_of
from jaxllm.data.tokenizer import decode_after, encode_prompt, load_tokenizer
from jaxllm.errors import UserError, exit_on_user_error, shown
from jaxllm.files import StrPath
from jaxllm.model.decoder import CustomLLM, abstract_model
from jaxllm.model.decoding import Sampling, generate, stream
from jaxllm.model.dtypes import check_dtype
from jaxllm.model.inference import for_compute
from jaxllm.packages import check_own
from jaxllm.run.runtime import start_jax, use_compilation_cache
from jaxllm.run.self_check import kernels_to_avoid
from jaxllm.store.checkpoint import load_weights
from jaxllm.store.folder import SOURCE, TOKENIZER, adapters_of, is_run, read_model_config
from jaxllm.store.source import model_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SAMPLING = Sampling(temperature=0.8, top_p=0.95)
"""The defaults."""


def load_model(folder: StrPath, precision: Precision = "float32", kernels: KernelsOption = "auto") -> CustomLLM:
    """The model of a run or of an exported folder; raises a UserError if the folder is neither.

    Its matrices are held in bfloat16 for that precision, else in the dtype in which they are stored. Adapters of a run
    are merged into their base.
    """
    dtype = check_dtype(precision, "precision")
    if not is_run(folder) and not Path(folder).is_file():
        read_model_config(folder)  # nothing to convert
    if not is_run(folder):
        check_own("convert")
        from convert.to_flax import model_of

        return model_of(folder, dtype, for_compute(dtype), kernels=kernels)
    if adapters_of(folder) is None:
        config, weights = load_weights(folder, for_compute(dtype))
    else:
        check_own("convert")
        from convert.base import run_weights

        config, weights = run_weights(folder, for_compute(dtype))
    graph, _, _ = abstract_model(config, dtype=dtype, without=kernels_to_avoid(config, dtype, kernels))
    return nnx.merge(graph, *weights)


def tokenizer_folder(folder: StrPath) -> Path:
    """The folder of the tokenizer of a run, or of an exported folder or one in the Hub's cache."""
    kept = (Path(folder, name) for name in (TOKENIZER, SOURCE) if is_run(folder))
    return next((path for path in kept if path.is_dir()), model_folder(folder))


def chat(args: GenerateArgs, model: CustomLLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Answer the lines of stdin until it ends; with a chat template as a conversation, else each line as a prompt."""
    turns: list[dict[str, str]] = []
    encoder, eos = encoder_of(tokenizer, args.special_tokens_in_text), end_tokens(args, model, tokenizer)
    print(f"One line is one {'message' if tokenizer.chat_template else 'prompt'}; Ctrl-D ends.")
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        turns.append({"role": "user", "content": line})
        ids = encode_prompt(tokenizer, line, args.special_tokens_in_text)
        while tokenizer.chat_template:
            ids = encoder.chat_ids(turns, add_generation_prompt=True).tolist()
            if len(turns) == 1 or len(ids) + args.max_new_tokens <= model.config.max_position_embeddings:
                break
            del turns[:2]  # the oldest message and its answer
        if len(ids) >= model.config.max_position_embeddings:
            print(f"(that line is too long: max_position_embeddings is {model.config.max_position_embeddings})")
        said, printed = [], ""
        for new in stream(model, ids, args.max_new_tokens, args.sampling, seed=args.seed, eos_token_ids=eos):
            said += new
            text = str(tokenizer.decode(said)).rstrip("\ufffd")  # the rest of a character is still to come
            print(text[len(printed) :], end="", flush=True)
            printed = text
        print()
        turns.append({"role": "assistant", "content": printed})


@dataclass(frozen=True)
class GenerateArgs:
    """Continue prompts with a trained model."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, or an exported folder."""
    prompt: tuple[str, ...] | None = None
    """One or more prompts; default: an empty one."""
    chat: bool = False
    """Answer what is typed, line by line, in place of --prompt."""
    special_tokens_in_text: Literal["text", "keep"] = "text"
    """What becomes of special tokens that a prompt or a message spells: `text`, encoded as other characters are, or
    `keep`, control tokens."""
    max_new_tokens: int = option(100, ge=1)
    """Most tokens to add to a prompt."""
    temperature: float | None = option(None, ge=0, le=MAX_TEMPERATURE)
    """0 is greedy; default: 0.8."""
    top_k: int | None = option(None, ge=0)
    """0, the default: all tokens."""
    top_p: float | None = option(None, gt=0, le=1)
    """Only the likeliest tokens that together reach this probability; default: 0.95."""
    greedy: bool = False
    """Always the likeliest token."""
    seed: int = option(0, ge=0, le=MAX_SEED)
    """Of the random choices."""
    ignore_eos: bool = False
    """Continue after an end-of-sequence token."""
    precision: Precision = "float32"
    """Compute precision; bfloat16 needs half of the memory and reads half of the bytes."""
    kernels: KernelsOption = "auto"
    """`auto`: the fastest kernels of the device, checked once on a GPU; `plain`: those of any device, unchecked."""

    def __post_init__(self) -> None:
        check_fields(self)
        _ = self.sampling
        if self.chat and self.prompt is not None:
            raise UserError(f"prompt is {shown(self.prompt)}: --chat answers what is typed, leave out one of the two")

    @property
    def sampling(self) -> Sampling:
        """How the next token is chosen, by these options and the defaults.

        Raises:
            UserError: an option of sampling is given together with greedy choice, or is not valid.
        """
        options = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        greedy = "greedy is set" if self.greedy else "temperature is 0" if self.temperature == 0 else None
        for name, value in given.items() if greedy else ():
            if self.greedy or name != "temperature":
                raise UserError(f"{name} is {shown(value)}, and {greedy}, which ignores it: leave out one of the two")
        return Sampling(temperature=0.0) if greedy else dataclasses.replace(SAMPLING, **given)


def end_tokens(args: GenerateArgs, model: CustomLLM, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a text: the tokenizer's, and those that the model's config.json names."""
    own: Any = tokenizer.eos_token_id
    return () if args.ignore_eos else tuple({own, *model.config.eos_token_ids} - {None})


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    args: GenerateArgs = parse(GenerateArgs, argv, "python -m jaxllm.generate", __doc__)
    start_jax()
    use_compilation_cache()
    model = load_model(args.run, args.precision, args.kernels)
    tokenizer = load_tokenizer(str(tokenizer_folder(args.run)))
    if args.chat:
        chat(args, model, tokenizer)
        return
    texts = args.prompt or ("",)
    prompts = [encode_prompt(tokenizer, prompt, args.special_tokens_in_text) for prompt in texts]
    eos = end_tokens(args, model, tokenizer)
    made = generate(model, prompts, args.max_new_tokens, args.sampling, seed=args.seed, eos_token_ids=eos)
    for text, prompt, new in zip(texts, prompts, made, strict=True):
        print(text + decode_after(tokenizer, prompt, new))


if __name__ == "__main__":
    sys.exit(main())
