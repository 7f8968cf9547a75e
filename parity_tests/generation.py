"""Decoding with the cache in both frameworks: the logits of given tokens, then greedy generation."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx

from jaxllm.config import ModelConfig
from jaxllm.model.attention import Latents
from jaxllm.model.decoder import abstract_model
from jaxllm.model.decoding import generate, prefill
from jaxllm.store.checkpoint import Weights
from parity_tests import hf_side
from parity_tests.compare import TOLERANCES, Row, compare_arrays
from parity_tests.forward import DTYPES, jax_precision, jax_weights, torch_precision
from torch_ref import CustomLLM as TorchCustomLLM
from torch_ref.generate import generate as torch_generate
from torch_ref.model import CACHE

PROMPT_TOKENS = (24, 9)
"""Prompt lengths of the batch. Flax pads on the right, PyTorch on the left."""

NEW_TOKENS = 64


class JaxGeneration:
    """The Flax model's results on prompts and continuations taken from `ids` (n,)."""

    def __init__(self, config: ModelConfig, weights: Weights, ids: np.ndarray, precision: str):
        self.precision = precision
        lengths = [min(length, len(ids) // 2) for length in PROMPT_TOKENS]
        count = min(NEW_TOKENS, config.max_position_embeddings - max(lengths), len(ids) - max(lengths))
        self.prompts = [ids[:length].tolist() for length in lengths]
        self.given = np.stack([ids[length : length + count] for length in lengths])  # (B,n)
        with jax_precision(precision):
            graph, _, _ = abstract_model(config, dtype=DTYPES[precision])
            arrays = jax_weights(weights, precision)
            padded = np.stack([ids[: max(lengths)]] * len(lengths))  # tokens after a prompt are not attended to
        self._model, self._padded = (graph, *arrays), padded

    @functools.cached_property
    def _decoded(self) -> tuple[np.ndarray, list[list[int]]]:
        """The logits (B,n,V) of the given tokens, and as many greedy tokens after each prompt."""
        lengths = np.asarray([len(prompt) for prompt in self.prompts])
        with jax_precision(self.precision):
            logits = np.asarray(_decode(*self._model, self._padded, lengths, self.given))
            return logits, generate(nnx.merge(*self._model), self.prompts, self.given.shape[1])

    def compare(self, model: TorchCustomLLM) -> list[Row]:
        """Compare a PyTorch model with the Flax model; a transformers model's cache too, which holds the same numbers.

        At the first different greedy token, the logits of the PyTorch model must be a near tie. Tokens after it are not
        compared. In bfloat16 a transformers model's cache alone is compared: the choices of experts can be replayed
        there, but not in decoding, where rounding flips some of them in every text and with them all that follows.
        """
        if hf_side.is_stock(model) and self.precision == "bfloat16":
            return self._cache_rows(model)
        tolerance = TOLERANCES[self.precision].decoding
        ours_logits, ours_greedy = self._decoded
        logits = _torch_decode(model, self.prompts, self.given, self.precision)
        with torch_precision(self.precision):
            greedy = torch_generate(model, self.prompts, self.given.shape[1])
        named = [f"prompt of {len(prompt)}" for prompt in self.prompts]
        return [
            *(self._cache_rows(model) if hf_side.is_stock(model) else ()),
            *(
                compare_arrays("generation", "cached logits", *row, tolerance)
                for row in zip(named, ours_logits, logits, strict=True)
            ),
            *(
                _greedy_row(model, name, prompt, np.asarray(ours), np.asarray(theirs), self.precision)
                for name, prompt, ours, theirs in zip(named, self.prompts, ours_greedy, greedy, strict=True)
            ),
        ]

    def _cache_rows(self, model: TorchCustomLLM) -> list[Row]:
        """Compare the caches of a prompt, computed with the experts that PyTorch chose."""
        with torch_precision(self.precision):
            theirs = hf_side.cached_latents(model, self._padded[:1])
        with jax_precision(self.precision):
            ours: Latents = jax.device_get(_latents(*self._model, self._padded[:1], theirs.experts))
        pairs = {
            "cached latents": (ours.kv, theirs.latents),
            "cached rotary keys": (ours.k_rope[..., 0, :], theirs.keys),
        }
        return [
            compare_arrays("generation", what, f"layer {i}", one[i], other[i], TOLERANCES[self.precision].forward)
            for what, (one, other) in pairs.items()
            for i in range(len(one))
        ]


@functools.partial(jax.jit, static_argnums=0)
def _latents(graph: nnx.GraphDef, params, routing_bias, ids: jax.Array, experts: jax.Array | None) -> Any:
    model = nnx.merge(graph, params, routing_bias)
    return model.hidden_states(ids, experts=experts, keep_latents=True)[1].latents


@functools.partial(jax.jit, static_argnums=0)
def _decode(graph: nnx.GraphDef, params, routing_bias, prompts: jax.Array, lengths: jax.Array, given: jax.Array):
    """Logits of the given tokens, decoded one by one with the cache: (B,P), (B,), (B,n) -> (B,n,V)."""
    model = nnx.merge(graph, params, routing_bias)
    _, cache = prefill(model, prompts, given.shape[1])

    def decode(carry, token):
        positions, cache = carry
        logits, cache = model.decode(token[:, None], positions[:, None], cache)
        return (positions + 1, cache), logits[:, 0]

    _, logits = jax.lax.scan(decode, (lengths, cache), given.T)
    return logits.swapaxes(0, 1)


@torch.no_grad()
def _torch_decode(
    model: TorchCustomLLM, prompts: list[list[int]], given: np.ndarray, precision: str
) -> np.ndarray:  # (B,n,V)
    width = max(map(len, prompts))  # pad on the left, so that all rows end with their last token
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    logits = []
    with torch_precision(precision):
        cache = model(ids, attention_mask=mask, use_cache=True)[CACHE]
        for token in torch.from_numpy(given).long().T:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            out = model(token[:, None], attention_mask=mask, use_cache=True, **{CACHE: cache})
            logits.append(out.logits[:, 0])
    return torch.stack(logits, dim=1).float().numpy() if precision == "bfloat16" else torch.stack(logits, dim=1).numpy()


def _greedy_row(
    model: TorchCustomLLM, leaf: str, prompt: list[int], ours: np.ndarray, theirs: np.ndarray, precision: str
) -> Row:
    tie = TOLERANCES[precision].token_tie
    name = f"near tie {tie:g} std"
    apart = np.flatnonzero(ours != theirs)
    if not len(apart):
        return Row("generation", "greedy tokens", leaf, True, name, note=f"{len(ours)} of {len(ours)} tokens equal")
    first = int(apart[0])
    with torch.no_grad(), torch_precision(precision):
        logits = model(torch.tensor([prompt + theirs[:first].tolist()])).logits[0, -1].double().numpy()
    margin = float(abs(logits[theirs[first]] - logits[ours[first]]) / logits.std())
    note = f"the first {first} of {len(ours)} tokens equal; at the next one, the two tokens are {margin:.1e} std apart"
    return Row("generation", "greedy tokens", leaf, margin <= tie, name, max_error=margin, note=note)
