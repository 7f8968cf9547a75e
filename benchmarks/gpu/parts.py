"""The parts of the table, in their order. What others compare with comes first, the longest compilation last."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.gpu import ceilings, commands, decoding, layers, plans, steps
from benchmarks.gpu.line import Line
from benchmarks.gpu.session import Session


class Part(NamedTuple):
    what: str
    measure: Callable[[Session], list[Line]]
    timed: bool = True
    """Whether other work would disturb it; the parts that are not timed run first, at the same time."""
    on_gpu: bool = True


PARTS: dict[str, Part] = {
    "plan-remat": Part(
        "customllm-1b, 8 x 2,048, bfloat16, remat: plan", plans.plan_with_remat, timed=False, on_gpu=False
    ),
    "plan": Part("the same without remat: plan", plans.plan_without_remat, timed=False, on_gpu=False),
    "ladder-float32": Part("parity ladder, float32", commands.ladder_float32, timed=False),
    "ladder-bfloat16": Part("parity ladder, bfloat16", commands.ladder_bfloat16, timed=False),
    "ceilings": Part("what the card reaches", ceilings.ceilings),
    "step-remat": Part("customllm-1b, 8 x 2,048, bfloat16, remat", steps.with_remat),
    "step": Part("the same without remat", steps.without_remat),
    "transformers": Part("the same step by transformers", steps.transformers),
    "experts": Part("routed experts of a layer, both passes", layers.experts),
    "decode": Part("decoding customllm-1b, bfloat16", decoding.decode),
    "default-run": Part("python train.py", commands.default_run),
    "torch-ref": Part("the same step by torch_ref", steps.torch_ref),
}
