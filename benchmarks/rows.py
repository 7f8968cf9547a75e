"""The rows of the table: what is measured, and its yardstick."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from benchmarks import decoding, mixtures, saving, starting, training
from benchmarks.finding import Finding


class Row(NamedTuple):
    what: str
    yardstick: str
    measure: Callable[[bool, int], list[Finding]]  # (quick, rounds)


ROWS: dict[str, Row] = {
    "step-eager": Row("train step, float32", "torch_ref eager, the same weights and batch", training.against_eager),
    "step-compiled": Row("train step, float32", "torch_ref under torch.compile", training.against_compiled),
    "step-autocast": Row("train step, best precision", "torch_ref, bfloat16 autocast", training.against_autocast),
    "step-transformers": Row(
        "train step, best precision",
        "transformers DeepseekV3ForCausalLM, best precision",
        training.against_transformers,
    ),
    "step-tiny": Row(
        "train step of the default run's size, best precision",
        "transformers DeepseekV3ForCausalLM, best precision",
        training.tiny_against_transformers,
    ),
    "step-peak": Row("model FLOPs of the train step", "the fastest matrix product", training.against_peak),
    "experts-dense": Row("routed experts, both passes", "k dense experts, no routing", mixtures.against_dense),
    "experts-many": Row("routed experts, both passes, E=64", "the same with E=8", mixtures.many_experts),
    "compile": Row("compile time, 24 layers", "2 layers", starting.compile_time),
    "memory": Row("customllm-1b's AdamW step, 4 x 256, remat", "16 bytes a parameter", starting.full_size_memory),
    "decode": Row(
        "decoding, one row and eight, latent cache", "torch_ref's cached decoding; full K and V", decoding.decode
    ),
    "checkpoint": Row("a checkpoint every 100 steps", "the same bytes to a file", saving.checkpoint_cost),
    "start-up": Row("python train.py", "-", starting.start_up),
}
