"""Judge two records: the formula first, in float64 and without anybody's tolerance, then the rounding.

Where a side could not be lifted to float64, both are compared in their own precision, and the bound is what a change of
the parameters by a unit of roundoff does to either. That is weaker, and the verdict says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxllm.errors import UserError, listed
from parity_tests.engine.mapping import Entry, TensorMap
from parity_tests.engine.order import ROOT, path_of
from parity_tests.engine.pairing import fitted, paired_outputs
from parity_tests.engine.record import Named, Record, Run
from parity_tests.engine.rows import ANY, Row, Tolerance, compare_arrays, compare_bits, compare_numbers

FORMULA = Tolerance("formula", 1e-8, ANY, "both sides in float64: right pairs differ by 2e-16 to 5e-11")
TRAINING = Tolerance("training", 1e-6, ANY, "as the formula, amplified by a few steps")
ROUNDING = {"float32": 6e-4, "float64": 1e-9, "bfloat16": 3e-1, "float16": 1e-1}
"""Largest distance of a run from its lifted run, by the dtype of the parameters: 1e4 units of roundoff in float32."""
COMPARABLE = 100.0
"""Largest quotient of both sides' distances from their lifted runs."""
ZERO = {"lifted": 1e-11, "own": 1e-5}
"""A gradient is zero in theory if it is smaller, relative to the gradients that it is summed from."""
CONTROL_FACTOR, CONTROL_FLOOR = 10.0, 10.0
"""Without lifting, a difference may be this many times the controls, and in any case this many units of roundoff."""
EPSILON = {"float32": 2.0**-24, "float64": 2.0**-53, "bfloat16": 2.0**-9, "float16": 2.0**-12}


@dataclass
class Judgement:
    """What was compared, and what was not.

    Attributes:
        controls: for a row (rung, what, leaf) the rounding of both sides there.
        not_compared: one line each.
        findings: casts below the model's dtype, what could not be lifted.
        last_equal: the output compared last before the first difference.
    """

    rows: list[Row] = field(default_factory=list)
    controls: dict[tuple[str, str, str], float] = field(default_factory=dict)
    not_compared: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    lifted: bool = True

    @property
    def first(self) -> Row | None:
        return next((row for row in self.rows if not row.passed), None)

    @property
    def last_equal(self) -> str | None:
        """The module before the first one that differs."""
        before = None
        for row in self.rows:
            if row.rung == "modules":
                if not row.passed:
                    return before
                before = row.leaf
        return None


def judge(jax: Record, torch: Record, mapping: TensorMap) -> Judgement:
    """Compare everything that both records hold."""
    found = Judgement()
    compare = _Comparison(jax, torch, mapping, found)
    found.rows = compare.weights()
    if any(row.what == ALONE for row in found.rows):
        found.not_compared.append("everything else, because the mapping is not complete")
        return found
    for rung in (compare.modules, compare.results, compare.gradients, compare.state, compare.trained, compare.rounding):
        found.rows += rung()
    return found


ALONE = "without partner"
"""The name of a row about a trained tensor that the mapping leaves out, whole or in part."""


class _Comparison:
    def __init__(self, jax: Record, torch: Record, mapping: TensorMap, found: Judgement):
        self.jax, self.torch, self.mapping, self.found = jax, torch, mapping, found
        found.lifted = "lifted" in jax.runs and "lifted" in torch.runs
        self.main = "lifted" if found.lifted else "own"
        self.dead: set[str] = set()
        self.epsilon = max(EPSILON.get(dtype, 2.0**-24) for record in (jax, torch) for dtype in record.about["dtypes"])
        self.even = FORMULA
        if not found.lifted:
            self.even = Tolerance("10,000 roundings", 1e4 * self.epsilon, ANY, "where no control was run")
            for record in (jax, torch):
                if "lifted" not in record.runs:
                    reason = record.about.get("not lifted", "it was recorded without")
                    found.findings.append(f"the {record.framework} side is not lifted to float64: {reason}")
        for record in (jax, torch):
            for run in record.runs.values():
                notes = [f"{record.framework}: {note}" for note in run.findings]
                notes += [f"{record.framework}: {hole} ran in its own dtype" for hole in run.holes]
                found.findings += [note for note in notes if note not in found.findings]
        if jax.about["inputs"] and torch.about["inputs"] and not {*jax.about["inputs"]} & {*torch.about["inputs"]}:
            found.findings.append("no input array is the same on both sides")

    # rungs

    def weights(self) -> list[Row]:
        rows = []
        for name, entry in self.mapping.entries.items():  # one tensor of each side in memory
            ours = np.asarray(self.jax.weights[name])
            theirs = entry.made([np.asarray(self.torch.weights[torch]) for torch in entry.torch], ours.shape)
            rows += compare_bits("weights", "weights", {name: ours}, {name: theirs})
        if not all(row.passed for row in rows):
            return rows
        missing = [(name, "PyTorch", self.torch) for name in self.mapping.without_jax]
        missing += [(name, "JAX", self.jax) for name in self.mapping.without_torch]
        for name, framework, record in missing:
            if name not in record.trainable:
                continue
            gradient = record.runs[self.main].grads.get(name)
            if gradient is not None and np.any(gradient):
                rows.append(Row("weights", ALONE, name, False, "mapped", note=f"{framework} trains it"))
        for name, alone in self.mapping.partly(self.jax.weights, self.torch.weights).items():
            gradient = self.torch.runs[self.main].grads.get(name)
            if name in self.torch.trainable and gradient is not None and np.any(gradient[alone]):
                note = f"{alone.sum()} of its {alone.size} elements; PyTorch trains them"
                rows.append(Row("weights", ALONE, name, False, "mapped", note=note))
        for framework, names in (("PyTorch", self.mapping.without_jax), ("JAX", self.mapping.without_torch)):
            if names:
                self.found.not_compared.append(f"{framework}'s tensors without a partner: {listed(names)}")
        return rows

    def modules(self) -> list[Row]:
        pairing = paired_outputs(self.jax, self.torch, self.mapping, self.main)
        ours, theirs = self.jax.runs[self.main].outputs, self.torch.runs[self.main].outputs
        self.pairs = pairing.pairs
        self.channels_last = any(op.startswith("conv") for e in self.mapping.entries.values() for op in e.operations
                                 if isinstance(op, str))  # fmt: skip
        rows = [self._output_row("modules", "output", "outputs", a, b, ours[a], theirs[b]) for a, b in self.pairs]
        if pairing.alone:
            self.found.not_compared.append(
                f"outputs of modules without a partner: {listed(path or ROOT for path in pairing.alone)}"
            )
        return [row for row in rows if row is not None]

    def results(self) -> list[Row]:
        ours, theirs = self.jax.runs[self.main], self.torch.runs[self.main]
        if list(ours.results) != list(theirs.results):
            raise UserError(
                f"call returns {len(ours.results)} floating-point arrays in JAX and {len(theirs.results)} in PyTorch: "
                "return the same ones, in the same order"
            )
        for name in ours.results:
            if ours.results[name].shape != theirs.results[name].shape:
                raise UserError(
                    f"call returns {name} of shape {list(ours.results[name].shape)} in JAX and of "
                    f"{list(theirs.results[name].shape)} in PyTorch: return the same layout"
                )
        rows = [
            self._row("results", "result", name, theirs.results[name], ours.results[name], ("results", name, name))
            for name in ours.results
        ]
        scale = max(abs(theirs.loss), 1e-300)
        tolerance = self._tolerance(FORMULA, self._control(["loss"], ["loss"]) / scale)
        return [*rows, compare_numbers("results", "loss", theirs.loss, ours.loss, tolerance)]

    def gradients(self) -> list[Row]:
        ours, theirs = self.jax.runs[self.main], self.torch.runs[self.main]
        if not ours.grads or not theirs.grads:
            self.found.not_compared.append("gradients: a side recorded none")
            return []
        rows: list[Row | None] = []
        scales = self._scales(theirs)
        for a, b in reversed(self.pairs):
            if a in ours.output_grads and b in theirs.output_grads:
                one, other = ours.output_grads[a], theirs.output_grads[b]
                parent = scales.get(path_of(b).rpartition(".")[0], 0.0)
                if max(np.linalg.norm(one), np.linalg.norm(other)) <= ZERO[self.main] * parent:
                    rows.append(self._zero("gradient at an output", b))
                else:
                    rows.append(
                        self._output_row("gradients", "gradient at an output", "output_grads", a, b, one, other)
                    )
        rows += self._parameter_rows("gradients", "gradient", ours, theirs)
        return [row for row in rows if row is not None]

    def state(self) -> list[Row]:
        ours, theirs = self.jax.runs.get("training"), self.torch.runs.get("training")
        if ours is None or theirs is None:
            if self.torch.about.get("same modes"):
                return []
            reasons = [record.about.get("no training mode", "") for record in (self.jax, self.torch)]
            self.found.not_compared.append(f"training mode: {'; '.join(filter(None, reasons)) or 'not recorded'}")
            return []
        rows = [
            compare_arrays(
                "state", "result in training mode", name, theirs.results[name], ours.results[name], self.even
            )
            for name in ours.results
            if name in theirs.results
        ]
        for name, entry in self.mapping.entries.items():
            if name in ours.state and all(torch in theirs.state for torch in entry.torch):
                made = entry.made([theirs.state[torch] for torch in entry.torch], ours.state[name].shape)
                before = entry.made([self.torch.weights[torch] for torch in entry.torch], ours.state[name].shape)
                # the change is compared: a statistic moves by a tenth of what a batch says
                rows.append(
                    compare_arrays(
                        "state", "change of a statistic", name, made - before, ours.state[name] - before, self.even
                    )
                )
        return rows + self._parameter_rows("state", "gradient in training mode", ours, theirs)

    def trained(self) -> list[Row]:
        ours, theirs = self.jax.trained, self.torch.trained
        if ours is None or theirs is None:
            self.found.not_compared.append("an optimizer's step and a training: not recorded")
            return []
        losses = min(len(ours.losses), len(theirs.losses))
        rows = self._update_rows("step", "update", "first", FORMULA)
        rows.append(compare_arrays("training", "losses", "", np.asarray(theirs.losses[:losses]),
                                   np.asarray(ours.losses[:losses]),
                                   TRAINING if self.found.lifted else self.even))  # fmt: skip
        return rows + self._update_rows("training", f"change in {losses} steps", "last", TRAINING)

    def rounding(self) -> list[Row]:
        rows, distances = [], {}
        for record in (self.jax, self.torch):
            if record.repeats is None:
                self.found.not_compared.append(f"whether two runs of {record.framework} have the same bits")
                continue
            note = "" if record.repeats else "two runs differ: something is random, or sums in no fixed order"
            what = "two runs have the same bits"
            rows.append(Row("rounding", what, record.framework, record.repeats, "bitwise", note=note))
            lifted = record.runs["lifted"]
            distance = max(
                record.rounding[f"results/{name}"] / max(float(np.linalg.norm(values)), 1e-300)
                for name, values in lifted.results.items()
            )
            cap = max(ROUNDING.get(dtype, ROUNDING["float32"]) for dtype in record.about["dtypes"])
            distances[record.framework] = distance
            what = "distance from float64"
            rows.append(Row("rounding", what, record.framework, distance <= cap, f"{cap:g}", relative_l2=distance))
        if len(distances) == 2:
            sizes = [max(distance, self.epsilon) for distance in distances.values()]
            quotient = max(sizes) / min(sizes)
            passed = quotient <= COMPARABLE
            rows.append(Row("rounding", "quotient of the distances", "", passed, f"{COMPARABLE:g}", quotient))
        return rows

    # parts

    def _output_row(self, rung: str, what: str, kind: str, a: str, b: str, one: Any, other: Any) -> Row | None:
        fit = fitted(one, other, self.channels_last)
        if fit is None:
            return None
        return self._row(rung, what, b, other, fit, (kind, a, b))

    def _row(self, rung: str, what: str, leaf: str, other: Any, one: Any, key: tuple[str, str, str]) -> Row:
        kind, a, b = key
        norm = max(float(np.linalg.norm(np.float64(other))), 1e-300)
        control = self._control([f"{kind}/{a}"], [f"{kind}/{b}"]) / norm
        row = compare_arrays(rung, what, leaf, other, one, self._tolerance(FORMULA, control))
        self.found.controls[rung, what, leaf] = control
        return row

    def _control(self, jax: Iterable[str], torch: Iterable[str]) -> float:
        """How far the rounding of both sides reaches in some of their arrays."""
        pairs = ((self.jax, jax), (self.torch, torch))
        return sum(math.hypot(*(record.rounding.get(name, 0.0) for name in names)) for record, names in pairs)

    def _gradient_control(self, label: str, other: np.ndarray) -> float:
        names = ([f"grads/{name}" for name in self._sources(label, framework)] for framework in ("jax", "torch"))
        return self._control(*names) / max(float(np.linalg.norm(other)), 1e-300)

    def _sources(self, label: str, framework: str) -> tuple[str, ...]:
        if label in self.mapping.entries:
            return (label,) if framework == "jax" else self.mapping.entries[label].torch
        jax = tuple(name for name, entry in self.mapping.entries.items() if label in entry.torch)
        return jax if framework == "jax" else (label,)

    def _tolerance(self, formula: Tolerance, control: float) -> Tolerance:
        if self.found.lifted:
            return formula
        limit = CONTROL_FACTOR * control + CONTROL_FLOOR * self.epsilon
        return Tolerance(f"{limit:.0e}, own rounding", limit, ANY, "10 times what a unit of roundoff changes")

    def _gradient_pairs(self, ours: Named, theirs: Named) -> Iterator[tuple[str, Any, Any, str]]:
        """Gradients in one layout: JAX's, or PyTorch's where several tensors of JAX share one of PyTorch."""
        uses: dict[str, list[Entry]] = {}
        for entry in self.mapping.entries.values():
            for torch in dict.fromkeys(entry.torch):
                uses.setdefault(torch, []).append(entry)
        shared = {torch for torch, entries in uses.items() if len(entries) > 1}
        trainable = {*self.jax.trainable}
        for name, entry in self.mapping.entries.items():
            if name not in trainable or shared & {*entry.torch}:
                continue
            shape = self.jax.weights[name].shape
            arrays = [theirs.get(t, np.zeros(self.torch.weights[t].shape)) for t in entry.torch]
            yield name, ours.get(name, np.zeros(shape)), entry.made(arrays, shape, linear=True), entry.torch[0]
        for torch in sorted(shared):
            if torch not in self.torch.trainable:
                continue
            total = np.zeros(int(np.prod(self.torch.weights[torch].shape)))
            for entry in uses[torch]:
                shapes = [self.torch.weights[t].shape for t in entry.torch]
                places = entry.sources(shapes, self.jax.weights[entry.jax].shape).ravel()
                start = sum(math.prod(s) for s in shapes[: entry.torch.index(torch)])
                inside = (places >= start) & (places < start + total.size)
                values = np.asarray(
                    ours.get(entry.jax, np.zeros(self.jax.weights[entry.jax].shape)), np.float64
                ).ravel()
                np.add.at(total, places[inside] - start, values[inside])
            gradient = theirs.get(torch, np.zeros(self.torch.weights[torch].shape))
            yield torch, total.reshape(gradient.shape), np.asarray(gradient), torch

    def _scales(self, run: Run) -> dict[str, float]:
        """The norm of the gradient at the outputs of each module of PyTorch."""
        norms: dict[str, float] = {}
        for key, gradient in run.output_grads.items():
            path = path_of(key)
            norms[path] = max(norms.get(path, 0.0), float(np.linalg.norm(gradient)))
        return norms

    def _scale_of(self, torch_name: str, scales: dict[str, float], grads: Named) -> float:
        """The size of the gradients that one is summed from: at the outputs of its module and of the one around it."""
        owner = torch_name.rpartition(".")[0]
        near = max(scales.get(owner, 0.0), scales.get(owner.rpartition(".")[0], 0.0))
        return near or max((float(np.linalg.norm(gradient)) for gradient in grads.values()), default=0.0)

    def _zero(self, what: str, leaf: str, rung: str = "gradients") -> Row:
        note = f"zero in theory: below {ZERO[self.main]:g} of what it is summed from, on both sides"
        return Row(rung, f"{what}, zero in theory", leaf, True, "zero", note=note)

    def _parameter_rows(self, rung: str, what: str, ours: Run, theirs: Run) -> list[Row]:
        """Gradients of parameters; those that are zero in theory stand apart."""
        rows, scales = [], self._scales(theirs)
        for label, one, other, torch in self._gradient_pairs(ours.grads, theirs.grads):
            scale = self._scale_of(torch, scales, theirs.grads)
            if max(np.linalg.norm(one), np.linalg.norm(other)) <= ZERO[self.main] * scale:
                self.dead.add(label)
                rows.append(self._zero(what, label, rung))
                continue
            control = self._gradient_control(label, other)
            rows.append(compare_arrays(rung, what, label, other, one, self._tolerance(FORMULA, control)))
            self.found.controls[rung, what, label] = control
        return rows

    def _update_rows(self, rung: str, what: str, when: str, tolerance: Tolerance) -> list[Row]:
        ours, theirs = getattr(self.jax.trained, when), getattr(self.torch.trained, when)
        rows, untold = [], []
        for name, entry in self.mapping.entries.items():
            if name not in ours or not all(torch in theirs for torch in entry.torch):
                continue
            one = ours[name]
            other = entry.made([theirs[torch] for torch in entry.torch], one.shape, linear=True)
            allowed = tolerance
            if not self.found.lifted:
                apart = self._control([f"{when}/{name}"], [f"{when}/{torch}" for torch in entry.torch])
                limit = CONTROL_FACTOR * apart / max(float(np.linalg.norm(other)), 1e-300) + self.even.relative_l2
                allowed = Tolerance(f"{limit:.0e}, own rounding", limit, ANY, "Adam divides by small second moments")
            row = compare_arrays(rung, what, name, other, one, allowed)
            if not row.passed and {name, *entry.torch} & self.dead:
                untold.append(name)
                continue
            rows.append(row)
        if untold:
            self.found.not_compared.append(f"{what} where the gradient is zero in theory: {listed(untold)}")
        return rows
