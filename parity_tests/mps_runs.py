"""Records the operators of training, evaluation and generation of a tiny model, as a Mac would run them.

`python -m parity_tests.mps_runs` prints the operators of each. Autograd needs the real device, so a training step is
recorded in two halves. The first is the forward and backward pass on CPU tensors. The second is the whole `train_step`
on tensors that report `mps`, with gradients off and a `backward` that copies the gradients of the first half. The
halves check each other: their forward operators must be the same, and the parameters after the step must be those of
the CPU.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from jaxllm.config import ModelConfig, TrainConfig
from parity_tests.forward import random_weights, torch_model
from parity_tests.mps_operators import MpsTensor, Recorder, mps_device, on_mps
from torch_ref import CustomLLM
from torch_ref.step import accumulate_gradients, make_optimizer, make_schedule, train_step

MODEL = ModelConfig(
    vocab_size=61,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    moe_intermediate_size=8,
    n_routed_experts=3,
    max_position_embeddings=32,
    dropout=0.1,
    final_norm=True,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)


def train_config(precision: str) -> TrainConfig:
    return TrainConfig.from_options(
        model=MODEL, seq_len=10, precision=precision, warmup_steps=0, balance_loss=0.01, router_z_loss=0.01
    )


def model() -> CustomLLM:
    return copy.deepcopy(_model())


@functools.cache
def _model() -> CustomLLM:
    return torch_model(MODEL, random_weights(MODEL))


def tokens(*shape: int) -> Tensor:
    """Token ids from 1 to V-1, so that 0 is free for padding."""
    return torch.randint(1, MODEL.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def labels() -> Tensor:  # (A,B,T)
    ids = tokens(2, 2, 10)
    ids[0, 0, 3:5] = -100
    return ids


def gradients(precision: str, checkpointing: bool = False) -> tuple[Recorder, CustomLLM]:
    """Record the forward and backward passes of one step on CPU tensors; return the model with its gradients."""
    reference = model().train()
    if checkpointing:
        reference.gradient_checkpointing_enable()
    ids = labels()
    torch.manual_seed(0)  # dropout
    with Recorder(everything=True) as recorder:
        accumulate_gradients(reference, train_config(precision).optim, precision, ids)
    return recorder, reference


def step(precision: str, differentiated: CustomLLM | None = None) -> tuple[Recorder, CustomLLM]:
    """Record one whole step on the device; return the model after it on the CPU. `differentiated` has the gradients."""
    source = differentiated or gradients(precision)[1]
    config, reference = train_config(precision), on_mps(source)
    optimizer = make_optimizer(reference, config.optim, config.precision)
    schedule = make_schedule(optimizer, config.schedule, config.optim.learning_rate)

    def backward(loss: Tensor) -> None:
        for parameter, known in zip(reference.parameters(), source.parameters(), strict=True):
            parameter.grad = MpsTensor(known.grad.clone())

    torch.manual_seed(0)
    with mps_device(), Recorder() as recorder, torch.no_grad(), mock.patch.object(Tensor, "backward", backward):
        train_step(reference, optimizer, schedule, config.optim, config.precision, MpsTensor(labels()))
    after = copy.deepcopy(source)
    after.load_state_dict({name: value.values_on_cpu for name, value in reference.state_dict().items()})
    return recorder, after


def evaluation() -> Recorder:
    """Record the loss of a batch with padding at both ends."""
    ids, mask = tokens(2, 10), torch.ones(2, 10, dtype=torch.int64)
    mask[0, :3] = mask[1, 8:] = 0
    reference = on_mps(model())
    with mps_device(), Recorder() as recorder, torch.no_grad():
        reference(MpsTensor(ids), attention_mask=MpsTensor(mask), labels=MpsTensor(ids.masked_fill(mask == 0, -100)))
    return recorder


def generation(device: Callable[[Tensor], Tensor] = MpsTensor, **options) -> tuple[Recorder, Tensor]:
    """Record three tokens after two prompts, the first padded on the left; `device` moves a tensor to the device."""
    prompts = tokens(2, 7)
    prompts[0, :3] = 0
    reference = on_mps(model()) if device is MpsTensor else model()
    torch.manual_seed(0)
    with mps_device(), Recorder() as recorder:
        mask = device((prompts != 0).long())
        out = reference.generate(device(prompts), attention_mask=mask, max_new_tokens=3, **options)
    return recorder, out.values_on_cpu if device is MpsTensor else out


RUNS: dict[str, Callable[[], Recorder]] = {
    "forward and backward, float32": lambda: gradients("float32")[0],
    "forward and backward, bfloat16, checkpointing": lambda: gradients("bfloat16", checkpointing=True)[0],
    "train_step without backward, float32": lambda: step("float32")[0],
    "train_step without backward, bfloat16": lambda: step("bfloat16")[0],
    "evaluation": evaluation,
    "greedy generation": lambda: generation(do_sample=False)[0],
    "sampling": lambda: generation(do_sample=True, temperature=0.7, top_p=0.9)[0],
}

if __name__ == "__main__":
    for title, run in RUNS.items():
        print(f"{title}: {run().summary()}\n")
