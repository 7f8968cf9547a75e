"""The rows of the tables: what is measured, and its yardstick. ROWS run on a CPU, and PARTS on a GPU."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from benchmarks import decoding, mixtures, starting, training
from benchmarks.finding import Finding
from benchmarks.gpu import parts
from benchmarks.session import Session
from benchmarks.sizes import EXPERTS


class Row(NamedTuple):
    what: str
    measure: Callable[[Session], list[Finding]]
    yardstick: str = ""
    timed: bool = True  # whether other work would disturb it; rows that are not timed run first, at the same time
    planned: bool = False  # whether it is arithmetic on a compiled program, which needs no GPU


_torch_ref = partial(training.step, yardstick="reference_steps")
_transformers = partial(training.step, yardstick="stock_steps", experts=EXPERTS)
_float32 = {"ours": ["float32"], "theirs": ["float32"]}
_eager = partial(_torch_ref, limit=1.45, **_float32)
_autocast = partial(_torch_ref, limit=1.25, theirs=["bfloat16"])
_compiled = partial(_torch_ref, limit=1.25, **_float32, compiled=True)
_theirs = "transformers DeepseekV3ForCausalLM, best precision"

ROWS: dict[str, Row] = {
    "step-eager": Row("train step, float32", _eager, "torch_ref eager, the same weights and batch"),
    "step-compiled": Row("train step, float32", _compiled, "torch_ref under torch.compile"),
    "step-autocast": Row("train step, best precision", _autocast, "torch_ref, bfloat16 autocast"),
    "step-transformers": Row("train step, best precision", partial(_transformers, limit=1.4), _theirs),
    "step-tiny": Row(
        "train step of the default run's size, best precision", partial(_transformers, limit=1.6, size="adamw"), _theirs
    ),
    "step-peak": Row("model FLOPs of the train step", training.against_peak, "the fastest matrix product"),
    "experts-dense": Row("routed experts, both passes", mixtures.against_dense, "k dense experts, no routing"),
    "experts-many": Row("routed experts, both passes, E=64", mixtures.many_experts, "the same with E=8"),
    "compile": Row("compile time, 24 layers", starting.compile_time, "2 layers"),
    "memory": Row("customllm-1b's AdamW step, 4 x 256, remat", starting.full_size_memory, "16 bytes a parameter"),
    "decode": Row(
        "decoding, one row and eight, latent cache", decoding.decode, "torch_ref's cached decoding; full K and V"
    ),
    "checkpoint": Row("a checkpoint every 100 steps", starting.checkpoint_cost, "the same bytes to a file"),
    "start-up": Row("python train.py", starting.start_up, "-"),
}

_stock = "DeepseekV3ForCausalLM, grouped_mm"
_grouped = partial(parts.yardstick, function="stock_steps", what=_stock, experts=["grouped_mm"])
_inductor = partial(parts.yardstick, function="reference_steps", what="torch.compile", compiled=True)
_plan = partial(Row, timed=False, planned=True)
_ladder = partial(Row, timed=False)

# what others compare with comes first, the longest compilation last
PARTS: dict[str, Row] = {
    "plan-remat": _plan("customllm-1b, 8 x 2,048, bfloat16, remat: plan", partial(parts.plan, remat=True)),
    "plan": _plan("the same without remat: plan", partial(parts.plan, remat=False)),
    "self-check": Row("each kernel of the step, on small inputs", parts.self_check, timed=False),
    "ladder-float32": _ladder("parity ladder, float32", partial(parts.ladder, precision="float32")),
    "ladder-bfloat16": _ladder("parity ladder, bfloat16", partial(parts.ladder, precision="bfloat16")),
    "ceilings": Row("what the card reaches", parts.ceilings),
    "step-remat": Row("customllm-1b, 8 x 2,048, bfloat16, remat", partial(parts.step, remat=True)),
    "step": Row("the same without remat", partial(parts.step, remat=False)),
    "transformers": Row("the same step by transformers", _grouped),
    "experts": Row("routed experts of a layer, both passes", mixtures.against_dense),
    "decode": Row("decoding customllm-1b, bfloat16", decoding.decode_on_gpu),
    "default-run": Row("python train.py", parts.default_run),
    "torch-ref": Row("the same step by torch_ref", _inductor),
}
