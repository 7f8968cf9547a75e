"""The rungs of one forward pass: weights, layers, parts, logits, loss, padding, evaluation."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from jaxllm.config import ModelConfig
from jaxllm.model.batch import IGNORED
from jaxllm.store.checkpoint import Weights
from parity_tests.compare import Row, Tolerances, compare_arrays, compare_bits, compare_numbers
from parity_tests.forward import ROUTER_PARTS, Base, Trace, jax_trace, state_dict_arrays, torch_named, torch_trace
from parity_tests.replay import Flips, choice_row, expert_flips, routing_bias_of, same_choice, total_flips
from parity_tests.same_input import same_input_rows
from parity_tests.settings import beyond, thresholds
from parity_tests.training import JaxTraining, documents_apart, torch_evaluate


class Subject(NamedTuple):
    """The Flax model that PyTorch models are compared with."""

    config: ModelConfig
    weights: Weights
    precision: str
    tolerances: Tolerances
    interleaved: bool = True
    """As in `convert.mapping.entries`."""
    base: Base | None = None
    """As in `jax_trace`."""

    def trace(self, ids: np.ndarray, experts: np.ndarray | None = None, mask: np.ndarray | None = None) -> Trace:
        return jax_trace(self.config, self.weights, ids, self.precision, experts, mask, self.base)

    def flips(self, weights: Weights, ids: np.ndarray, experts: np.ndarray, mask: np.ndarray | None = None) -> Flips:
        """The choices that Flax would have made differently from the given experts (L,B,T,k)."""
        if not self.config.moe_layers:
            return Flips(0, 0, 0.0)
        trace = self._replace(weights=weights).trace(ids, experts, mask)
        bias = routing_bias_of(self.config, weights)[:, None, None]
        return expert_flips(trace.parts["router scores"], bias, experts, self.config.router)


class ForwardRungs:
    """Compares forward passes on `ids` (1,T).

    The Flax side is computed once; the pair of traces for one PyTorch model, until `start`.
    """

    def __init__(self, subject: Subject, ids: np.ndarray):
        self.subject, self.ids = subject, ids
        self.config, self.tolerance = subject.config, subject.tolerances.forward
        self.start()

    def start(self) -> None:
        self._pair: tuple[Trace, Trace] | None = None

    @functools.cached_property
    def _ours(self) -> Trace:
        return self.subject.trace(self.ids)

    def _traces(self, model: Any) -> tuple[Trace, Trace]:
        """Both forward passes with the same experts."""
        if self._pair is None:
            ours, theirs = self._ours, torch_trace(model, self.ids, self.subject.precision)
            if not same_choice(ours.experts, theirs.experts):
                ours = self.subject.trace(self.ids, theirs.experts)
            self._pair = ours, theirs
        return self._pair

    def weights(self, model: Any) -> list[Row]:
        ours = torch_named(self.config, *self.subject.weights, interleaved=self.subject.interleaved)
        theirs = {name: values.astype(ours[name].dtype) if name in ours else values
                  for name, values in state_dict_arrays(model).items()}  # fmt: skip
        return compare_bits("weights", "weights", ours, theirs)

    def layers(self, model: Any) -> list[Row]:
        ours, theirs = self._traces(model)
        rows = [compare_arrays("layers", "embeddings", "", ours.embeddings, theirs.embeddings, self.tolerance)]
        bias, near_tie = routing_bias_of(self.config, self.subject.weights), self.subject.tolerances.near_tie
        for i in range(self.config.num_hidden_layers):
            leaf, routed = f"layer {i}", i - self.config.dense_layers
            for part, values in theirs.parts.items():
                index = routed if part in ROUTER_PARTS else i
                if index < 0:
                    continue
                one, other = ours.parts[part][index], values[index]
                rows.append(compare_arrays("layers", part, leaf, one, other, self.tolerance))
                if part in ("router scores", "router logits"):
                    scores = ours.parts["router scores"][index]
                    flips = expert_flips(scores, bias[index], theirs.experts[index], self.config.router)
                    rows.append(choice_row("layers", leaf, flips, self.ids.size, near_tie))
        return rows

    def parts(self, model: Any) -> list[Row]:
        """Each part on the same input: in bfloat16 alone, elsewhere `layers` is as strict."""
        return same_input_rows(model, self._ours, self.ids) if self.subject.precision == "bfloat16" else []

    def logits(self, model: Any) -> list[Row]:
        ours, theirs = self._traces(model)
        return [compare_arrays("logits", "logits", "", ours.logits, theirs.logits, self.tolerance)]

    def loss(self, model: Any) -> list[Row]:
        if self.ids.shape[1] < 2:  # one token has no next one
            return []
        ours, theirs = self._traces(model)
        return [compare_numbers("loss", "loss", ours.loss, theirs.loss, self.tolerance)]

    def padding(self, model: Any) -> list[Row]:
        """Logits of real tokens in a batch that is padded on the left and on the right, over a block of queries."""
        length = min(self.ids.shape[1], beyond(thresholds().row_tokens[0]))
        ids = np.repeat(self.ids[:, :length], 2, axis=0)
        mask = np.ones_like(ids)
        mask[0, : length // 3] = mask[1, length - length // 3 :] = 0
        if mask.all():  # too short to pad
            return []
        theirs = torch_trace(model, ids, self.subject.precision, mask=mask)
        ours, rows = self.subject.trace(ids, mask=mask), []
        real = mask.astype(bool)
        if not same_choice(ours.experts[:, real], theirs.experts[:, real]):
            ours = self.subject.trace(ids, theirs.experts, mask)
        for i, side in enumerate(("left", "right")):
            one, other = ours.logits[i][real[i]], theirs.logits[i][real[i]]
            rows.append(compare_arrays("padding", "padded logits", f"on the {side}", one, other, self.tolerance))
        if self.config.moe_layers:
            bias = routing_bias_of(self.config, self.subject.weights)
            scores = zip(ours.parts["router scores"], bias, theirs.experts, strict=True)
            found = [expert_flips(s[real], b, e[real], self.config.router) for s, b, e in scores]
            near_tie = self.subject.tolerances.near_tie
            rows.append(choice_row("padding", "", total_flips(found), int(mask.sum()) * len(found), near_tie))
        return rows

    def evaluation(self, model: Any, training: JaxTraining, batches: np.ndarray) -> list[Row]:
        """The function that evaluates a training run, on a batch (B,T) in which half a row is ignored.

        It is the first of `batches` in which no near tie differs.
        """
        rows: list[Row] = []
        for labels in batches:
            ours, targets = training.evaluate(labels)
            theirs, counted = torch_evaluate(model, training.config, labels)
            note = "" if targets == counted else f"{targets} and {counted}"
            rows = [
                compare_numbers("evaluation", "evaluation loss", ours, theirs, self.tolerance),
                Row("evaluation", "targets", "", not note, "equal", note=note),
            ]
            ids = np.where(labels == IGNORED, 0, labels)
            if all(row.passed for row in rows):
                break
            with documents_apart(model, training.config, labels.shape[-1]) as documents:
                theirs_chosen = torch_trace(model, ids, self.subject.precision).experts
            mask = None if documents is None else np.broadcast_to(documents, ids.shape)
            if same_choice(self.subject.trace(ids, mask=mask).experts, theirs_chosen):
                break  # else a near tie: the next batch has none, or the layers' rung shows what is wrong
        return rows
