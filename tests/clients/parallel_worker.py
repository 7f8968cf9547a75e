"""Run by torchrun for test_parallel.py: a model cut among the processes against a plain one; the figures as JSON.

torchrun ... parallel_worker.py FOLDER DISTRIBUTED_CONFIG RESULT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig


def main(folder: str, config: str, result: str) -> None:
    def load(**options):
        options = {"trust_remote_code": True, "attn_implementation": "eager"} | options
        return AutoModelForCausalLM.from_pretrained(folder, **options).eval()

    torch.set_num_threads(1)
    cut = load(distributed_config=DistributedConfig(**json.loads(config)))
    plain = load()
    ids = torch.randint(5, plain.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    static = {"cache_implementation": "static", "disable_compile": True}
    with torch.no_grad():
        logits = float((cut(ids).logits - plain(ids).logits).abs().max())
    wanted = plain.generate(ids, **options)
    same = [torch.equal(cut.generate(ids, **options, **more), wanted) for more in ({}, static)]

    cut.train()
    for model in (cut, plain):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    gradients, whole = {}, []
    for (name, parameter), reference in zip(cut.named_parameters(), plain.parameters(), strict=True):
        gradient = parameter.grad
        if isinstance(parameter, DTensor) and parameter.to_local().numel() < reference.numel():
            gradient = None if gradient is None else gradient.full_tensor()
        else:
            whole.append(name)
        scale = float(reference.grad.abs().max())
        gradients[name] = float((gradient - reference.grad).abs().max()) / scale if scale else 0.0
    figures = {"logits": logits, "same tokens": same, "gradients": max(gradients.values()), "whole": whole}
    if dist.get_rank() == 0:
        Path(result).write_text(json.dumps(figures))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
