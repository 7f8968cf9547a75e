"""The rung of decoding: logits of given tokens up to the last position, greedy generation, and where it stops."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

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
from parity_tests.forward import DTYPES, jax_precision, jax_trace, jax_weights, torch_precision
from parity_tests.replay import narrowest, routing_bias_of
from parity_tests.settings import thresholds
from torch_ref import CustomLLM as TorchCustomLLM
from torch_ref.generate import generate as torch_generate
from torch_ref.model import CACHE

PROMPT_TOKENS = (24, 9)
"""Prompt lengths of the batch. Flax pads on the right, PyTorch on the left."""

NEW_TOKENS = 64
"""Greedy tokens, and the fewest given tokens."""

MAX_LOGITS = 2**25
"""Numbers of the logits of all given tokens."""

NO_TOKEN = -1
"""Ends no text."""


class Given(NamedTuple):
    """Prompts, and the tokens that follow each."""

    prompts: list[list[int]]
    tokens: np.ndarray  # (B,n)

    def named(self) -> list[str]:
        return [f"prompt of {len(prompt)}, row {row}" for row, prompt in enumerate(self.prompts)]


class JaxGeneration:
    """The Flax model's results on prompts and continuations taken from a text.

    Args:
        ids: (n,), repeated where more are needed.
        quick: decode few tokens, in few rows.
        greedy: whether to generate tokens, too.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        ids: np.ndarray,
        precision: str,
        quick: bool = False,
        greedy: bool = True,
    ):
        self.config, self.precision, self.quick, self.greedy = config, precision, quick, greedy
        self.ids = np.resize(ids, max(len(ids), config.max_position_embeddings))
        self.not_compared: list[str] = []
        if precision == "bfloat16":  # rounding would flip choices in every text, and with them all that follows
            weights = weights._replace(routing_bias=jax.tree.map(_steered, weights.routing_bias))
        self._weights = weights
        with jax_precision(precision):
            graph, _, _ = abstract_model(config, dtype=DTYPES[precision])
            self._model = (graph, *jax_weights(weights, precision))
        limit = config.max_position_embeddings
        self.prompts = [self.ids[: max(1, min(length, limit // 2))].tolist() for length in PROMPT_TOKENS]
        self.new_tokens = min(NEW_TOKENS, limit - max(map(len, self.prompts)))

    @functools.cached_property
    def given(self) -> list[Given]:
        """Batches whose tokens are decoded: rows from short prompts on, and one that ends at the last position.

        Rows are alike in groups of 1, 2, 4 ... rows, so that experts get groups of all those sizes.
        """
        limit, k = self.config.max_position_embeddings, self.config.num_experts_per_tok
        rows = 2 if self.quick else max(2, thresholds().decoded_rows // (k if self.config.moe_layers else 1))
        longest = len(self.prompts[0])
        most = NEW_TOKENS if self.quick else max(NEW_TOKENS, MAX_LOGITS // (rows * self.config.vocab_size))
        count = min(most, limit - longest)
        starts = [int(np.log2(row)) if row else 0 for row in range(rows)]  # 0, 0, 1, 1, 2, 2, 2, 2, 3 ...
        text = np.stack([np.roll(self.ids, -7 * start)[: longest + count] for start in starts])
        lengths = [longest if start % 2 == 0 else len(self.prompts[1]) for start in starts]
        given = [
            Given([row[:n].tolist() for row, n in zip(text, lengths, strict=True)],
                  np.stack([row[n : n + count] for row, n in zip(text, lengths, strict=True)]))
        ]  # fmt: skip
        if longest + count == limit:
            return given
        if self.quick:
            self.not_compared.append(f"decoding of positions {longest + count} to {limit - 1}")
            return given
        last = min(8, limit - 1)
        given.append(Given([self.ids[: limit - last].tolist()], self.ids[None, limit - last : limit]))
        if longest + count < limit - last:
            self.not_compared.append(f"decoding of positions {longest + count} to {limit - last - 1}")
        return given

    @functools.cached_property
    def _decoded(self) -> list[np.ndarray]:
        """The logits (B,n,V) of each batch of given tokens."""
        with jax_precision(self.precision):
            return [np.asarray(_decode(*self._model, *_padded(given.prompts), given.tokens)) for given in self.given]

    def _greedy(self, ends: int = NO_TOKEN) -> list[list[int]]:
        if ends not in self._generated:
            with jax_precision(self.precision):
                model = nnx.merge(*self._model)
                self._generated[ends] = generate(model, self.prompts, self.new_tokens, eos_token_ids=[ends])
        return self._generated[ends]

    @functools.cached_property
    def _generated(self) -> dict[int, list[list[int]]]:
        return {}

    def compare(self, model: TorchCustomLLM) -> list[Row]:
        """Compare a PyTorch model with the Flax model; a transformers model's cache too, which holds the same numbers.

        At the first different greedy token, the logits of the PyTorch model must be a near tie. Tokens after it are not
        compared. In bfloat16 routing biases decide every choice, because decoding cannot be replayed; without such
        biases a transformers model's cache alone is compared.
        """
        caches = self._cache_rows(model) if hf_side.is_stock(model) else []
        if self.precision == "bfloat16" and self.config.moe_layers and not self.config.router.has_bias:
            self.not_compared.append("logits of decoding in bfloat16: rounding decides which experts are chosen")
            return caches
        if self.precision != "bfloat16":
            return caches + self._decoding_rows(model)
        with hf_side.with_biases(model, lambda bias: _steered(bias.numpy())):
            return caches + self._decoding_rows(model)

    def _decoding_rows(self, model: TorchCustomLLM) -> list[Row]:
        tolerance, rows = TOLERANCES[self.precision].decoding, []
        for given, ours in zip(self.given, self._decoded, strict=True):
            theirs = _torch_decode(model, given.prompts, given.tokens, self.precision)
            for i, (leaf, one, other) in enumerate(zip(given.named(), ours, theirs, strict=True)):
                row = compare_arrays("generation", "cached logits", leaf, one, other, tolerance)
                rows.append(row if row.passed else self._until_near_tie(row, given, i, one, other))
        if not self.greedy:
            self.not_compared.append("greedy tokens, and the end of a text")
            return rows
        ours, theirs = self._greedy(), self._torch_greedy(model)
        for prompt, one, other in zip(self.prompts, ours, theirs, strict=True):
            rows.append(_greedy_row(model, prompt, np.asarray(one), np.asarray(other), self.precision))
        return rows + self._end_rows(model, ours, theirs)

    def _until_near_tie(self, row: Row, given: Given, i: int, ours: np.ndarray, theirs: np.ndarray) -> Row:
        """A row that failed; where it first differs at a near tie of a router, that of the tokens before."""
        tolerance = TOLERANCES[self.precision].decoding
        if not self.config.moe_layers or ours.shape != theirs.shape:
            return row
        of_token = np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(ours, axis=-1)  # (n,)
        first = int(np.argmax(~(of_token <= tolerance.relative_l2)))
        ids = np.asarray([given.prompts[i] + given.tokens[i].tolist()])
        scores = jax_trace(self.config, self._weights, ids, self.precision).parts["router scores"][:, 0]  # (L,T,E)
        bias = routing_bias_of(self.config, self._weights)[:, None]
        margins = narrowest(scores + bias, self.config.num_experts_per_tok, self.config.router).min(axis=0)  # (T,)
        at = len(given.prompts[i]) + first
        if first == 0 or margins[at] > TOLERANCES[self.precision].near_tie:
            return row
        before = compare_arrays("generation", row.what, row.leaf, ours[:first], theirs[:first], tolerance)
        return dataclasses.replace(before, note=f"the first {first} of {len(ours)} tokens, up to a near tie")

    def _torch_greedy(self, model: TorchCustomLLM, ends: int | None = None) -> list[list[int]]:
        with torch_precision(self.precision):
            return torch_generate(model, self.prompts, self.new_tokens, eos_token_id=ends)

    def _end_rows(self, model: TorchCustomLLM, ours: list[list[int]], theirs: list[list[int]]) -> list[Row]:
        """Generation that ends at a token which one row reaches in the middle."""
        if ours != theirs:
            self.not_compared.append("the end of a text, because greedy tokens differ at a near tie")
            return []
        ends = ours[0][len(ours[0]) // 2]
        pairs = zip(self._greedy(ends), self._torch_greedy(model, ends), strict=True)
        return [
            Row(
                "generation",
                "end of text",
                f"row {row}",
                one == other,
                "equal",
                note=f"{len(one)} and {len(other)} tokens",
            )
            for row, (one, other) in enumerate(pairs)
        ]

    def _cache_rows(self, model: TorchCustomLLM) -> list[Row]:
        """Compare the caches of a prompt, computed with the experts that PyTorch chose."""
        padded = np.asarray(self.prompts[:1])
        with torch_precision(self.precision):
            theirs = hf_side.cached_latents(model, padded)
        with jax_precision(self.precision):
            ours: Latents = jax.device_get(_latents(*self._model, padded, theirs.experts))
        pairs = {
            "cached latents": (ours.kv, theirs.latents),
            "cached rotary keys": (ours.k_rope[..., 0, :], theirs.keys),
        }
        return [
            compare_arrays("generation", what, f"layer {i}", one[i], other[i], TOLERANCES[self.precision].forward)
            for what, (one, other) in pairs.items()
            for i in range(len(one))
        ]


def _steered(bias: np.ndarray) -> np.ndarray:  # (...,E)
    """A bias by which the first experts are chosen, whatever the scores, which are within 0 and 1."""
    order = np.arange(bias.shape[-1], 0, -1, dtype=np.float32)
    return np.broadcast_to(2 * order, bias.shape).astype(np.asarray(bias).dtype)


def _padded(prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts padded on the right (B,P), with tokens that nothing attends to, and their lengths (B,)."""
    width = max(map(len, prompts))
    return np.asarray([prompt + [0] * (width - len(prompt)) for prompt in prompts]), np.asarray([*map(len, prompts)])


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


def _greedy_row(model: TorchCustomLLM, prompt: list[int], ours: np.ndarray, theirs: np.ndarray, precision: str) -> Row:
    tie, leaf = TOLERANCES[precision].token_tie, f"prompt of {len(prompt)}"
    name = f"near tie {tie:g} std"
    if len(ours) != len(theirs):
        return Row("generation", "greedy tokens", leaf, False, name, note=f"{len(ours)} and {len(theirs)} tokens")
    apart = np.flatnonzero(ours != theirs)
    if not len(apart):
        return Row("generation", "greedy tokens", leaf, True, name, note=f"{len(ours)} of {len(ours)} tokens equal")
    first = int(apart[0])
    with torch.no_grad(), torch_precision(precision):
        logits = model(torch.tensor([prompt + theirs[:first].tolist()])).logits[0, -1].double().numpy()
    margin = float(abs(logits[theirs[first]] - logits[ours[first]]) / logits.std())
    note = f"the first {first} of {len(ours)} tokens equal; at the next one, the two tokens are {margin:.1e} std apart"
    return Row("generation", "greedy tokens", leaf, margin <= tie, name, max_error=margin, note=note)
