"""Compare two sides, each live or read from a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxllm.errors import UserError, one_line
from parity_tests.engine.judge import ALONE, Judgement, judge
from parity_tests.engine.mapping import TensorMap, read_mapping
from parity_tests.engine.propose import propose
from parity_tests.engine.record import Lazy, Named, Record, Run, Trained
from parity_tests.engine.rows import Row
from parity_tests.engine.side import STEPS, RecordedSide, Side, moved_weights


@dataclass(frozen=True)
class Options:
    """How a pair is compared."""

    lift: bool = True
    """Lift both sides to float64; without, the bound is what a unit of roundoff changes, which is weaker."""
    noise: float = 1.0
    """The weights are moved by this much noise, so that no bias is zero and no norm weight is one."""
    steps: int = STEPS
    """Steps of the short training; 0: none."""
    faults: bool = True
    """Plant the generic faults."""
    directions: int = 3
    """Runs with moved parameters, where a side is not lifted."""

    def __post_init__(self) -> None:
        for name, minimum in (("noise", 0), ("steps", 0), ("directions", 1)):
            if getattr(self, name) < minimum:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least {minimum}")


@dataclass
class Verdict:
    """The result of a comparison.

    Attributes:
        controls: of each generic fault whether the comparison sees it; empty if they were not planted.
        sides: versions, dtypes and hashes of the inputs of both.
    """

    judgement: Judgement
    mapping: TensorMap
    sides: dict[str, dict[str, Any]]
    controls: list[Any] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=dict)
    between: list[str] = field(default_factory=list)
    """Modules without parameters that PyTorch ran between the last equal output and the first different one."""

    @property
    def rows(self) -> list[Row]:
        return self.judgement.rows

    @property
    def agrees(self) -> bool:
        return self.judgement.first is None

    @property
    def is_complete(self) -> bool:
        """Whether each trained tensor has a partner; otherwise nothing but the weights was compared."""
        return self.judgement.first is None or self.judgement.first.what != ALONE

    @property
    def first(self) -> str | None:
        """The name of what differs first, PyTorch's."""
        row = self.judgement.first
        return None if row is None else row.leaf or row.what

    def line(self) -> str:
        """The verdict in one line."""
        row = self.judgement.first
        how = "" if self.judgement.lifted else ", as far as their rounding tells"
        if row is None:
            return f"The two sides agree{how}."
        if not self.is_complete:
            return (
                f"The mapping is not complete: {row.leaf} has no partner ({row.note}); write a `mapping` that has it "
                "(docs/parity_pairs.md), or, if the other model lacks it, the two differ."
            )
        where = f"{row.what} {row.leaf}".strip()
        size = "" if row.relative_l2 is None else f", by {row.relative_l2:.1e}"
        said = f"The two sides differ{how}, first in: {where} (rung {row.rung}){size}"
        if row.rung == "weights" and row.tolerance == "bitwise":
            said += "; they start from different weights: record one side with --weights and the other's record"
        if row.rung == "modules" and self.judgement.last_equal:
            said += f"; {self.judgement.last_equal} before it agrees"
        if self.between:
            said += f"; between them PyTorch runs {', '.join(self.between)}"
        return said + "."

    def lines(self) -> list[str]:
        """The verdict, what was not compared, and what else a reader must know."""
        found = [self.line()]
        blind = [control.fault for control in self.controls if control.kind == "blind"]
        if blind:
            found.append(f"Blind: the comparison does not see {'; '.join(blind)}")
        found += [f"Not compared: {what}" for what in self.judgement.not_compared]
        found += [f"Finding: {what}" for what in self.judgement.findings]
        found += [f"Mapping, unsure: {what}" for what in self.mapping.unsure]
        return found


def pair(
    jax: Side | RecordedSide,
    torch: Side | RecordedSide,
    mapping: str | Mapping[str, Any] = "proposed",
    options: Options | None = None,
) -> Verdict:
    """Compare a side in JAX with one in PyTorch, from their weights to a short training.

    Args:
        mapping: a dict from JAX's names to PyTorch's, or "proposed".

    Raises:
        UserError: the sides cannot be compared.
    """
    options = options or Options()
    for side, framework in ((jax, "jax"), (torch, "torch")):
        if side.framework != framework:
            raise UserError(f"the side called {framework} is one of {side.framework}: exchange them")
    if isinstance(jax, RecordedSide) and isinstance(torch, RecordedSide):
        found = _mapping_of_records(jax.record, torch.record, mapping)
        return _verdict(jax.record, torch.record, found, options, None)
    names = _mapping(jax, torch, mapping)
    still = dataclasses.replace(options, noise=0.0)
    if isinstance(torch, RecordedSide):
        torch_record = torch.record
    else:
        if isinstance(jax, RecordedSide):
            torch.load(from_jax(names, jax.record.weights, torch.tensors()))
        else:
            torch.load(_started(torch, names.torch_names(), options.noise))
        can = isinstance(jax, RecordedSide) or jax.can_train()
        torch_record = record(torch, still, training=None if can else False)
    if isinstance(jax, RecordedSide):
        jax_record = jax.record
    else:
        _load_jax(jax, names, torch_record.weights)
        jax_record = record(jax, still, training=bool(torch_record.about.get("steps in training mode")))
    live = None if isinstance(torch, RecordedSide) else torch
    return _verdict(jax_record, torch_record, names, options, live)


def mapped_sides(jax: Any, torch: Any, mapping: str | Mapping[str, Any]) -> dict[str, Any]:
    """Give a side the weights of the other's record; what its own record says about that.

    Raises:
        UserError: the names do not fit.
    """
    names = _mapping(jax, torch, mapping)
    if isinstance(torch, RecordedSide):
        _load_jax(jax, names, torch.record.weights)
        return {"mapping": names.spelled()}
    torch.load(from_jax(names, jax.record.weights, torch.tensors()))
    return {"mapping": names.spelled()}


def _load_jax(jax: Any, names: TensorMap, weights: Named) -> None:
    jax.load(names.to_jax(weights, {name: values.shape for name, values in jax.tensors().items()}))


def add_rows(verdict: Verdict, rows: list[Row]) -> None:
    verdict.judgement.rows += rows


def record(side: Any, options: Options | None = None, training: bool | None = None) -> Record:
    """Everything that is compared of one side.

    Args:
        training: whether training mode is compared, and the steps run in it; None: if it differs from evaluation mode
            and draws no random numbers.
    """
    options = options or Options()
    if options.noise:
        side.load(_started(side, side.trainable(), options.noise))
    own = side.run("own")
    runs, rounding, repeats, not_lifted = {"own": own}, {}, None, {}
    if options.lift:
        try:
            runs["lifted"] = side.run("lifted")
        except UserError:
            raise
        except Exception as error:  # any library's code runs here in a dtype that it may not know
            not_lifted["not lifted"] = f"{type(error).__name__}: {one_line(error)}"
    else:
        not_lifted["not lifted"] = "lifting is off"
    about = side.about() | not_lifted
    precision = "lifted" if "lifted" in runs else "own"
    if precision == "lifted":
        repeats = _same_bits(own, side.run("own"))
        rounding = distances(own, runs["lifted"])
    in_training = _training_mode(side, runs, precision, about, training)
    about["steps in training mode"] = in_training
    trained = side.train(precision, options.steps, in_training) if options.steps else None
    if precision == "own":
        rounding = _moved(side, own, trained, options, in_training)
    return Record(
        side.framework, side.tensors(), side.trainable(), side.modules(), runs, trained, about, rounding, repeats
    )


def _moved(side: Any, own: Run, trained: Trained | None, options: Options, in_training: bool) -> dict[str, float]:
    """How far a run and a training move with the parameters, the largest of some directions."""
    largest: dict[str, float] = {}
    for direction in range(options.directions):
        with side.nudged(direction):
            found = distances(own, side.run("own"))
            if trained is not None and not direction:
                again = side.train("own", options.steps, in_training)
                for when in ("first", "last"):
                    found |= _apart(when, getattr(trained, when), getattr(again, when))
        for name, value in found.items():
            largest[name] = max(value, largest.get(name, 0.0))
    return largest


def distances(one: Run, other: Run) -> dict[str, float]:
    """The norm of the difference of every array of two runs, and of their losses."""
    found = {"loss": abs(one.loss - other.loss)}
    for kind in ("results", "outputs", "output_grads", "grads"):
        found |= _apart(kind, getattr(one, kind), getattr(other, kind))
    return found


def _apart(kind: str, one: Named, other: Named) -> dict[str, float]:
    return {f"{kind}/{n}": float(np.linalg.norm(np.float64(one[n]) - np.float64(other[n]))) for n in one if n in other}


def _same_bits(one: Run, other: Run) -> bool:
    pairs = [(getattr(one, kind), getattr(other, kind)) for kind in ("results", "grads")]
    return one.loss == other.loss and all(np.array_equal(a[n], b[n], equal_nan=True) for a, b in pairs for n in a)


def _same_modes(training: Run, evaluated: Run) -> bool:
    """Whether training mode gives the same results, and changes no state."""
    pairs = ((training.results, evaluated.results), (training.state, evaluated.state))
    return all(np.array_equal(one[name], other[name]) for one, other in pairs for name in one)


def _training_mode(side: Any, runs: dict[str, Any], precision: Any, about: dict[str, Any], wanted: bool | None) -> bool:
    """Run in training mode where that says more than evaluation mode; whether the steps run in it."""
    if not side.can_train():
        about["no training mode"] = f"the {side.framework} side has no train_call"
        return False
    if wanted is False:
        about["no training mode"] = "the other side has no train_call, or is the same in both modes"
        if side.framework == "jax":
            return False
    if side.framework == "torch" and _same_modes(side.run(precision, training=True, grads=False), runs[precision]):
        about["same modes"] = True
        return False
    first = side.run(precision, training=True)
    if side.framework == "torch":
        side.seed += 1
        second = side.run(precision, training=True, grads=False)
        side.seed -= 1
        if any(not np.array_equal(first.results[name], second.results[name]) for name in first.results):
            about["no training mode"] = "PyTorch's draws random numbers (dropout); set its probability to 0"
            return False
    if _same_modes(first, runs[precision]):
        about["same modes"] = True
        return False
    if wanted is False:
        return False
    runs["training"] = first
    return True


def _verdict(jax: Record, torch: Record, names: TensorMap, options: Options, torch_side: Any) -> Verdict:
    modes = [record.about.get("steps in training mode") for record in (jax, torch)]
    if None not in modes and modes[0] != modes[1]:
        jax = dataclasses.replace(jax, trained=None)
    judgement = judge(jax, torch, names)
    verdict = Verdict(judgement, names, {"jax": jax.about, "torch": torch.about})
    for record_ in (jax, torch):
        if record_.trained is not None:
            verdict.losses[record_.framework] = record_.trained.losses
    first = judgement.first
    if first is not None and first.rung == "modules" and torch_side is not None:
        verdict.between = torch_side.modules_between(judgement.last_equal, first.leaf)
    if not options.faults:
        judgement.not_compared.append("planted faults: they are off")
    elif torch_side is None:
        judgement.not_compared.append("planted faults: the PyTorch side is a record")
    elif first is not None and first.rung in ("weights", "modules", "results", "gradients"):
        judgement.not_compared.append("planted faults: they need a pair that agrees up to its gradients")
    elif not judgement.lifted:
        judgement.not_compared.append("planted faults: they need both sides lifted to float64")
    else:
        from parity_tests.engine.controls import controls

        known = {(row.rung, row.what, row.leaf) for row in judgement.rows if not row.passed}
        verdict.controls = controls(torch_side, jax, torch, names, known, bool(modes[1]))
    return verdict


def from_jax(names: TensorMap, values: Named, made: Named) -> dict[str, np.ndarray]:
    """PyTorch's tensors from JAX's, each of which holds some of their elements.

    Raises:
        UserError: a mapping has a function that does not move elements alone.
    """
    found = {name: np.array(made[name]) for name in names.torch_names()}
    for entry in names.entries.values():
        shapes = [found[name].shape for name in entry.torch]
        value = np.asarray(values[entry.jax])
        offset = entry.made([np.zeros(shape, value.dtype) for shape in shapes], value.shape)
        places = entry.places(shapes, value.shape)
        flat = np.concatenate([found[name].ravel() for name in entry.torch])
        if places is None:
            raise UserError(f"mapping of {entry.jax}: its function computes new numbers, so it cannot be inverted")
        flat[places.ravel()] = (value - offset).ravel()
        ends = np.cumsum([found[name].size for name in entry.torch])[:-1]
        for name, part in zip(entry.torch, np.split(flat, ends), strict=True):
            found[name] = part.reshape(found[name].shape)
    return found


def _started(side: Any, mapped: list[str], noise: float) -> Named:
    """The weights to start from: parameters and statistics are moved, other mapped buffers are as made."""
    values, movable = side.tensors(), set(side.movable())
    moved = moved_weights(values, movable, noise)
    names = dict.fromkeys([*mapped, *side.trainable(), *movable])
    return Lazy(names, lambda name: moved[name] if name in movable else values[name])


def _mapping(jax: Any, torch: Any, mapping: Any) -> TensorMap:
    def parts(side: Any) -> tuple[Any, Any, Any]:
        if isinstance(side, RecordedSide):
            record = side.record
            return record.weights, record.modules, record.about.get("aliases", {})
        return side.tensors(), None, side.aliases()

    ours, theirs = parts(jax), parts(torch)
    shapes = [{name: np.shape(values[name]) for name in values} for values in (ours[0], theirs[0])]
    if mapping != "proposed":
        _check_mapping(mapping)
        return read_mapping(mapping, *shapes, theirs[2])
    modules = [found[1] or side.modules() for found, side in ((ours, jax), (theirs, torch))]
    return propose(*modules, *shapes, theirs[2])


def _mapping_of_records(jax: Record, torch: Record, mapping: Any) -> TensorMap:
    shapes = [{name: np.shape(record.weights[name]) for name in record.weights} for record in (jax, torch)]
    aliases = torch.about.get("aliases", {})
    if mapping == "proposed":
        mapping = jax.about.get("mapping") or torch.about.get("mapping") or mapping
    if mapping == "proposed":
        return propose(jax.modules, torch.modules, *shapes, aliases)
    _check_mapping(mapping)
    return read_mapping(mapping, *shapes, aliases)


def _check_mapping(mapping: Any) -> None:
    if not isinstance(mapping, Mapping):
        raise UserError(f'mapping is of type {type(mapping).__name__}: it must be "proposed" or a dict of names')
