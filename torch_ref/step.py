"""The training step in plain PyTorch: that of `jaxllm.train.step`, with the parts of torch.optim and transformers.

The Trainer path (`torch_ref.train`) and the comparison with JAX (`parity_tests`) both use these functions. The axis
letters are those of `torch_ref.model`, and A is the number of micro-batches in a step.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_schedule_with_warmup, get_wsd_schedule

from jaxllm.config import Precision
from jaxllm.config.groups import OptimConfig, ScheduleConfig
from torch_ref.model import IGNORED, CustomLLM
from torch_ref.muon import Blocks, MuonWithAdamW

ROUTING_BIASES = (".routing_bias", ".e_score_correction_bias")
"""How the names of routing biases end: CustomLLM's, and transformers' for DeepSeek-V3."""


class StepMetrics(NamedTuple):
    loss: Tensor  # () mean cross-entropy over the targets of all micro-batches, nats
    grad_norm: Tensor  # () global norm before clipping
    learning_rate: float | Tensor  # that of the next update, as in the source's log
    experts: Tensor  # (A,L,B,T,k), chosen by the routers


def decays(name: str) -> bool:
    """Whether weight decay applies to the parameter: matrices and embeddings decay, norms and biases do not."""
    *path, last = name.split(".")
    return last != "bias" and not path[-1].endswith("norm")


def is_hidden_matrix(name: str) -> bool:
    """Whether Muon updates the parameter: the linear maps of the layers, and neither router, embeddings nor head."""
    path = name.split(".")[:-1]
    in_layer = any(part in ("decoder_layers", "layers") for part in path)
    return in_layer and decays(name) and path[-1] not in ("router", "gate")


def make_optimizer(
    model: CustomLLM,
    optim: OptimConfig,
    precision: Precision,
    blocks: Mapping[str, Blocks] = MappingProxyType({}),
    fused: bool | None = None,
) -> torch.optim.AdamW:
    """AdamW over two groups of parameters, those that decay and those that do not; with Muon, the matrices are a third.

    Args:
        precision: in which Muon orthogonalizes.
        blocks: by their names, parameters that join several matrices, which Muon orthogonalizes one by one.
        fused: whether AdamW is one kernel for all parameters; None: PyTorch's choice. Muon has none.
    """
    named = list(model.named_parameters())
    muon = {name: p for name, p in named if optim.optimizer == "muon" and is_hidden_matrix(name)}
    rest = [(name, p) for name, p in named if name not in muon]
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in rest if decays(name)], "weight_decay": optim.weight_decay},
        {"params": [p for name, p in rest if not decays(name)], "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {
        "lr": optim.learning_rate, "betas": (optim.beta1, optim.beta2), "eps": optim.adam_eps
    }  # fmt: skip
    if optim.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=fused, **options)
    matrices = {"params": [*muon.values()], "weight_decay": optim.weight_decay, "momentum": optim.muon_momentum}
    joined = {"blocks": [blocks.get(name) for name in muon]} if blocks else {}
    dtype = torch.bfloat16 if precision == "bfloat16" else None
    return MuonWithAdamW([*groups, matrices | joined], dtype, **options)


def make_schedule(
    optimizer: torch.optim.Optimizer, schedule: ScheduleConfig, peak: float, steps_done: int = 0
) -> LambdaLR:
    """transformers' schedules: to `peak` over `warmup_steps`, then half a cosine (as the source's) or WSD."""
    if steps_done:
        for group in optimizer.param_groups:  # LambdaLR requires it to resume
            group.setdefault("initial_lr", peak)
    warmup, steps, last = schedule.warmup_steps, schedule.steps, steps_done - 1
    if schedule.schedule == "cosine":
        return get_cosine_schedule_with_warmup(optimizer, warmup, steps, last_epoch=last)
    return get_wsd_schedule(
        optimizer, warmup, schedule.falling_steps, num_training_steps=steps, decay_type="linear", last_epoch=last
    )


def tokens_per_expert(router_experts: Sequence[Tensor], n_experts: int) -> Tensor:  # L times (B,T,k) -> (L,E) int64
    experts = torch.stack([chosen.flatten() for chosen in router_experts])  # (L,M)
    return (experts[..., None] == torch.arange(n_experts, device=experts.device)).sum(dim=1)


def expert_load(counts: Tensor) -> float:  # (L,E)
    """Tokens of the fullest expert over the mean, in the worst layer; 1 is balanced."""
    counts = counts.cpu().double()  # MPS has no float64
    return float((counts.amax(dim=-1) / counts.mean(dim=-1)).max())


@torch.no_grad()
def update_routing_bias(model: CustomLLM, counts: Tensor, rate: float) -> None:
    """Auxiliary-loss-free load balancing (arXiv:2408.15664): steer the choice away from overloaded experts.

    Args:
        counts: (L,E) tokens of each expert in the global batch.
        rate: the size of the update, gamma.
    """
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith(ROUTING_BIASES)]
    if not biases:  # DeepSeek-V2 has none
        return
    for bias, tokens in zip(biases, counts, strict=True):
        # in integers: the mean of equal counts, as a product with 1 / E, would be next to them
        bias += rate * torch.sign(tokens.sum() - len(tokens) * tokens).to(bias.dtype)


def auxiliary_loss(output: Any, optim: OptimConfig) -> Tensor | float:
    """The weighted sequence-wise balance loss and router z-loss of a `CustomLLMOutput`, summed over the layers."""
    if not (optim.balance_loss or optim.router_z_loss):
        return 0.0
    balance = sum(map(balance_loss, output.router_experts, output.router_scores))
    z = sum(logits.logsumexp(dim=-1).square().mean() for logits in output.router_logits)
    return optim.balance_loss * balance + optim.router_z_loss * z


def balance_loss(experts: Tensor, scores: Tensor) -> Tensor:  # (B,T,k), (B,T,E) -> ()
    """DeepSeek-V3's sequence-wise balance loss (arXiv:2412.19437, eq. 17-20), without its weight."""
    E, k = scores.shape[-1], experts.shape[-1]
    chosen = (experts[..., None] == torch.arange(E, device=experts.device)).sum(dim=2)  # (B,T,E)
    fraction = chosen.to(scores.dtype).mean(dim=1) * (E / k)  # (B,E)
    normalized = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
    return (fraction * normalized.mean(dim=1)).sum(dim=-1).mean()


def accumulate_gradients(
    model: CustomLLM, optim: OptimConfig, precision: Precision, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Add the gradient of the mean loss over all micro-batches to the parameters' `.grad`.

    Args:
        model: in train mode, with float32 (or float64) parameters.
        optim: the weights of the auxiliary losses.
        precision: bfloat16 runs the forward pass under autocast.
        labels: (A, B, T) int64 token rows, used as inputs and labels (-100: ignored).

    Returns:
        The mean cross-entropy, and the experts that the routers chose, (A, L, B, T, k).
    """
    targets = (labels[..., 1:] != IGNORED).sum().clamp(min=1)
    total: Any = 0.0
    chosen = []
    for micro in labels:
        with torch.autocast(micro.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            output = model(micro.clamp(min=0), labels=micro, num_items_in_batch=targets, output_router=True)
        (output.loss + auxiliary_loss(output, optim) / len(labels)).backward()
        total = total + output.loss.detach()
        experts = output.router_experts
        # a model may have no layers with experts
        chosen.append(torch.stack(experts) if experts else micro.new_zeros((0, *micro.shape, 1)))
    return total, torch.stack(chosen)


def clip_gradients(model: CustomLLM, max_norm: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` with a norm accurate to float32's last digits; returns the norm.

    On a CPU, PyTorch sums the squares of a tensor sequentially: the error is 2e-4 for 800,000 elements and grows with
    their number. The norm of the rows' norms avoids it. The Trainer uses PyTorch's function, through accelerate.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([torch.linalg.vector_norm(grad, dim=-1) for grad in grads])
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm


def train_step(
    model: CustomLLM,
    optimizer: torch.optim.Optimizer,
    schedule: LambdaLR,
    optim: OptimConfig,
    precision: Precision,
    labels: Tensor,
) -> StepMetrics:
    """One optimizer step, in place. Arguments as in `accumulate_gradients`."""
    loss, chosen = accumulate_gradients(model, optim, precision, labels)
    grad_norm = clip_gradients(model, optim.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    if chosen.shape[1]:
        counts = tokens_per_expert(list(chosen.swapaxes(0, 1)), model.config.n_routed_experts)
        update_routing_bias(model, counts, optim.bias_update_rate)
    return StepMetrics(loss, grad_norm, schedule.get_last_lr()[0], chosen)
