"""Continue prompts with the PyTorch model, on its cache: what `jaxllm.generate` does for the Flax model."""

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
        model: it is left in evaluation mode.
        prompts: token ids, at least one in each prompt; with the new tokens they fit the position table.
        max_new_tokens: most tokens to add.
        temperature: divides the logits; 0 is greedy.
        top_p: only the likeliest tokens that together reach this probability.
        seed: of the random choices.
        eos_token_id: stops a row when chosen (it is not returned); None: nothing stops it.

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
    sampling = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}  # the default is 50
    torch.manual_seed(seed)
    rows = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
        ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        eos_token_id=eos_token_id,
        pad_token_id=0 if eos_token_id is None else eos_token_id,
        **sampling,
    )[:, width:].tolist()
    return [row[: row.index(eos_token_id)] if eos_token_id in row else row for row in rows]
