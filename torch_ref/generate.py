"""Text generation with the PyTorch model and its cache, as `jaxllm.generate` does with the Flax model."""

from collections.abc import Sequence

import torch

from torch_ref.model import CustomLLM


@torch.no_grad()
def generate(
    model: CustomLLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_token_id: int | None = None,
) -> list[list[int]]:
    """Continue prompts of any lengths, all at once.

    Args:
        model: left in evaluation mode.
        prompts: token ids, at least one in each prompt; with the new tokens they must fit the position table.
        max_new_tokens: the maximum number of tokens to add.
        temperature: divides the logits; 0 is greedy.
        top_p: sample only from the most likely tokens that together reach this probability.
        seed: of the sampling.
        eos_token_id: ends a row and is not returned; None: rows end at `max_new_tokens`.

    Returns:
        The new tokens of each prompt.
    """
    model.eval()
    width = max(len(prompt) for prompt in prompts)
    ids = torch.zeros((len(prompts), width), dtype=torch.long, device=model.device)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):  # pad on the left, so that all rows end with their last token
        ids[i, width - len(prompt) :] = torch.tensor(prompt, device=model.device)
        mask[i, width - len(prompt) :] = 1
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}  # top_k: default 50
    torch.manual_seed(seed)
    rows = model.generate(
        ids,  # pyright: ignore[reportArgumentType]
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        do_sample=temperature > 0,
        eos_token_id=eos_token_id,
        pad_token_id=0 if eos_token_id is None else eos_token_id,
        **sampling,
    )[:, width:].tolist()
    return [row[: row.index(eos_token_id)] if eos_token_id in row else row for row in rows]
