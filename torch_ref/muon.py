"""Muon for the matrices of the layers, with AdamW for the other parameters: the optimizer of `jaxllm.train.muon`.

`torch.optim.Muon` has the same update, but iterates in bfloat16 only, and does not take AdamW's parameters.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
STEPS = 5
EPS = 1e-7
RMS = 0.2

Blocks = Sequence[tuple[int, Tensor]]
"""The matrices that a parameter joins: along which axis, and at which indices there."""


def newton_schulz(x: Tensor, dtype: torch.dtype) -> Tensor:
    """About the orthogonal matrix U V' of each matrix U S V': (..., out, in), computed and returned in `dtype`."""
    a, b, c = NEWTON_SCHULZ
    tall = x.shape[-2] > x.shape[-1]
    # of the rows' norms: on a CPU, PyTorch sums a whole matrix less accurately
    norm = torch.linalg.vector_norm(torch.linalg.vector_norm(x, dim=-1, keepdim=True), dim=-2, keepdim=True)
    x = (x / norm.clamp(min=EPS)).to(dtype)
    if tall:
        x = x.mT
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def scale(shape: Sequence[int]) -> float:
    """By which an orthogonal matrix has the root mean square of AdamW's updates (arXiv:2502.16982, section 2.2)."""
    return RMS * math.sqrt(max(shape[-2:]))


def is_adamw(group: dict[str, Any]) -> bool:
    """Whether AdamW updates the parameters of an optimizer's group."""
    return group.get("momentum") is None


def moment_names(group: dict[str, Any]) -> tuple[str, ...]:
    """The names, in the optimizer's state, of the first moment or momentum, and of AdamW's second moment."""
    return ("exp_avg", "exp_avg_sq") if is_adamw(group) else ("momentum_buffer",)


def nesterov(grad: Tensor, momentum: Tensor, beta: float) -> Tensor:
    """What is orthogonalized: the momentum that the next step would have with the same gradient."""
    return grad.lerp(momentum, beta)


class MuonWithAdamW(torch.optim.AdamW):
    """AdamW, but Muon for groups that have a `momentum`.

    Args:
        groups: of parameters. Those of Muon have matrices, with any leading axes, or matrices that join several: the
            group's `blocks` then has them for each parameter, None where it is one.
        dtype: in which updates are orthogonalized; None: the parameter's.
        options: AdamW's.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], dtype: torch.dtype | None = None, **options: Any):
        super().__init__(groups, **options)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        self.param_groups = [group for group in groups if is_adamw(group)]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if not is_adamw(group):
                blocks = group.get("blocks") or [None] * len(group["params"])
                for parameter, joined in zip(group["params"], blocks, strict=True):
                    if parameter.grad is not None:
                        self._update(parameter, group, joined)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any], blocks: Blocks | None) -> None:
        state, beta, grad = self.state[parameter], group["momentum"], parameter.grad
        assert grad is not None
        if "momentum_buffer" not in state:
            # AdamW's, which loads the state of both, wants a step count
            state |= {"step": torch.tensor(0.0), "momentum_buffer": torch.zeros_like(parameter)}
        state["step"] += 1
        momentum = state["momentum_buffer"]
        momentum.lerp_(grad, 1 - beta)
        update = nesterov(grad, momentum, beta)
        if blocks is None:
            direction = self._orthogonalized(update)
        else:
            direction = torch.empty_like(update)
            for axis, where in blocks:
                direction.index_copy_(axis, where, self._orthogonalized(update.index_select(axis, where)))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(direction, alpha=-group["lr"])

    def _orthogonalized(self, update: Tensor) -> Tensor:
        return scale(update.shape) * newton_schulz(update, self.dtype or update.dtype).to(update.dtype)
