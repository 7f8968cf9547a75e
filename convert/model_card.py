"""The model card of an exported run: README.md, as the Hugging Face Hub shows it."""

import shutil
from pathlib import Path

import jax

from jaxllm.config import ModelConfig, TrainConfig
from jaxllm.config.families import names_of
from jaxllm.errors import UserError
from jaxllm.files import read_json
from jaxllm.model import flops
from jaxllm.store.checkpoint import Weights
from jaxllm.store.folder import CHECKPOINTS, read_config
from jaxllm.store.metrics_file import last_evaluation

CARD_FILE = "README.md"

_FRONT = """\
---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A decoder with Multi-head Latent Attention and a mixture of experts, trained with jaxllm.

| | |
|---|---|
"""

_USE = """
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER"{model})
tokenizer = AutoTokenizer.from_pretrained("FOLDER"{tokenizer})
```

## What was compared

The weights are those of the JAX model, {values}. `python -m parity_tests FOLDER`, of jaxllm, compares the
two frameworks on them: logits, gradients, optimizer steps and cached generation.{compared}
"""

_COMPARED = " [The result of such a comparison]({page})."
PARITY_PAGE, PARITY_REPORT = "parity.html", "parity.json"
"""What `python -m parity_tests RUN --out RUN` writes; it goes with the weights that it is of."""


def write_model_card(
    run: Path, out: Path, config: ModelConfig, weights: Weights, dtypes: set[str], carried: int = 0
) -> None:
    """Write the card of a run's exported weights, of these dtypes; a run without a history has a shorter one.

    `carried` tensors are of multi-token prediction.
    """
    parameters = sum(leaf.size for leaf in jax.tree.leaves(weights.params))
    active = sum(flops.active_parameters(config).values())
    rows = {
        "parameters": f"{parameters:,}, of which a token uses {active:,}",
        "layers, hidden size": f"{config.num_hidden_layers}, {config.hidden_size}",
        "routed experts": f"{config.n_routed_experts}, {config.num_experts_per_tok} for a token",
        "shared experts": f"{config.n_shared_experts}",
        "vocabulary, positions": f"{config.vocab_size:,}, {config.max_position_embeddings:,}",
        **_training(run),
    }
    if carried:
        rows["multi-token prediction"] = f"{carried:,} tensors as they came: this training did not change them"
    page = run / PARITY_PAGE
    has_page = _is_of_these_weights(run)
    trust, own = ", trust_remote_code=True", names_of(config) == "customllm"
    rounded = f"in {' and '.join(sorted(dtypes))}, to which their float32 values are rounded"
    use = _USE.format(
        model=trust if own else "",
        tokenizer=trust if own or _has_tokenizer_code(out) else "",
        values="bit for bit in float32" if dtypes == {"float32"} else rounded,
        compared=_COMPARED.format(page=PARITY_PAGE) if has_page else "",
    )
    if has_page:
        shutil.copyfile(page, out / PARITY_PAGE)
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    card = _FRONT.format(name=_in_a_cell(run.absolute().name)) + table + use
    (out / CARD_FILE).write_text(card, encoding="utf-8", errors="backslashreplace")


def _is_of_these_weights(run: Path) -> bool:
    """Whether the page in a run is of a comparison of the run that passed, after its last checkpoint."""
    report, saved = run / PARITY_REPORT, run / CHECKPOINTS
    if not ((run / PARITY_PAGE).is_file() and report.is_file()):
        return False
    if saved.is_dir() and saved.stat().st_mtime > report.stat().st_mtime:
        return False
    found = read_json(report)
    return bool(found.get("passed")) and found.get("mutation") is None and found.get("model") == run.absolute().name


def _has_tokenizer_code(out: Path) -> bool:
    """Whether the tokenizer is a class of a Python file in the folder, or elsewhere on the Hub."""
    try:
        named = read_json(out / "tokenizer_config.json").get("auto_map")
    except UserError:  # there is none, or it is copied as it was found
        return False
    return isinstance(named, list) or (isinstance(named, dict) and "AutoTokenizer" in named)


def _training(run: Path) -> dict[str, str]:
    """What the run was trained on, and its last evaluation; nothing if it was not trained here."""
    try:
        config = read_config(run, TrainConfig)
    except UserError:  # there is none, or it is of an earlier format: the weights are read all the same
        return {}
    last = last_evaluation(run)
    if last is None:
        return {}
    tokens = last["step"] * config.tokens_per_step
    source = config.data.source
    # a path says where the data lie on someone's machine
    data = Path(source).name if Path(source).is_absolute() or Path(source).exists() else source
    bits = f", {last['eval_bits_per_byte']:.4f} bits per byte" if last.get("eval_bits_per_byte") else ""
    return {
        "data": _in_a_cell(data),
        "training": f"{last['step']:,} steps, {tokens:,} tokens, {config.optim.optimizer}, {config.precision}",
        "evaluation loss": f"{last['eval_loss']:.4f} nats per token{bits}, on held-out text",
    }


def _in_a_cell(text: str) -> str:
    """A name as it can stand in a table: on one line, without what would end the cell."""
    return " ".join(text.split()).replace("|", "\\|")
