"""Run a JAX program equation by equation: record its taps, and lift it to float64.

A program that is traced with 64-bit types still computes in float32 where it asks for that by name, and so it differs
from another right program by float32's rounding. Lifted, float32 is float64 everywhere: casts, iotas, accumulators, and
literals as they were meant (0.044715, not the float32 next to it). Casts below float32 stay, and are
findings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from jaxllm.errors import UserError, one_line
from parity_tests.engine.order import numbered
from parity_tests.engine.tap import tap_p

WIDER = {np.dtype(np.float32): np.dtype(np.float64), np.dtype(np.complex64): np.dtype(np.complex128)}
LOW = {np.dtype(jnp.bfloat16), np.dtype(np.float16)}

CALLS = {
    "jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr",
    "checkpoint", "remat", "remat2", "shard_map",
}  # fmt: skip
"""Primitives that call the program in a parameter; it is run in their place."""

ON_ONE_DEVICE = {
    "psum_invariant", "pvary", "pcast", "pbroadcast", "sharding_constraint",
    "reshard", "mesh_cast", "ppermute", "all_gather_invariant",
}  # fmt: skip
"""Collectives and placements that do nothing on one device."""

REDUCED = {"psum": jnp.sum, "psum2": jnp.sum, "pmax": jnp.max, "pmin": jnp.min}

SCATTERS = {
    "scatter": jax.lax.scatter, "scatter-add": jax.lax.scatter_add, "scatter_add": jax.lax.scatter_add,
    "scatter-mul": jax.lax.scatter_mul, "scatter_mul": jax.lax.scatter_mul, "scatter_min": jax.lax.scatter_min,
    "scatter-min": jax.lax.scatter_min, "scatter_max": jax.lax.scatter_max, "scatter-max": jax.lax.scatter_max,
    "scatter-sub": jax.lax.scatter_sub, "scatter_sub": jax.lax.scatter_sub,
}  # fmt: skip

IN_THEIR_OWN_DTYPE = {
    "bitcast_convert_type", "pallas_call", "ffi_call", "custom_partitioning", "pure_callback", "io_callback",
    "triton_kernel_call", "custom_call",
}  # fmt: skip
"""Primitives whose meaning depends on the dtype, or whose code is compiled for it."""


DIGITS = 6
"""Of a literal that somebody wrote; with more it was computed, and its float32 value counts."""


CONSTANTS = (
    math.pi, 2 * math.pi, math.pi / 2, math.e, math.log(2), 1 / math.log(2), math.log(10), math.log(2 * math.pi),
    0.5 * math.log(2 * math.pi), math.sqrt(math.pi), 1 / math.sqrt(math.pi), 2 / math.sqrt(math.pi),
    math.sqrt(2 / math.pi), 1 / math.sqrt(2 * math.pi),
)  # fmt: skip

MOST_WHOLE = 2**14
"""The largest whole number whose reciprocal or root is recognized: by chance one float32 in thousands is such."""


class Interpreter:
    """One run of a program.

    Attributes:
        outputs: by name, in order of computation. The n-th call of a name has `#n`, an iteration of a scan `[i]`.
        gradients: the gradients at these outputs.
        findings: casts below float32, with the module that they are in.
        holes: primitives that ran in their own dtype within a lifted run.
    """

    def __init__(self, lifted: bool, low: bool = False):
        """
        Args:
            lifted: float32 becomes float64.
            low: the model is meant to be in a dtype below float32, which is lifted too.
        """
        self.wider = dict(WIDER) if lifted else {}
        if lifted and low:
            self.wider |= dict.fromkeys(LOW, np.dtype(np.float64))
        self.lifted, self.low = lifted, low
        self.outputs: dict[str, Any] = {}
        self._cotangents: dict[str, list[Any]] = {}
        self.findings: dict[str, str] = {}
        self.holes: set[str] = set()
        self._casts: set[str] = set()
        self._counts: dict[str, int] = {}
        self._silent = 0  # within the code of a loop or a branch, whose values cannot leave it
        self._again = 0  # within remat's backward pass: the outputs were recorded by the forward one

    @property
    def gradients(self) -> dict[str, Any]:
        """Calls of one name are met in reverse order by a backward pass."""
        found = {}
        for name, values in self._cotangents.items():
            if len(values) == self._counts.get(name):
                found |= {numbered(name, i): value for i, value in enumerate(reversed(values))}
        return {name: found[name] for name in self.outputs if name in found}

    def run(self, closed: Any, args: Sequence[Any]) -> list[Any]:
        return self._jaxpr(closed.jaxpr, closed.consts, [self._wide(arg) for arg in args], "")

    def _jaxpr(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], iteration: str) -> list[Any]:
        values: dict[Any, Any] = {}

        def read(atom: Any) -> Any:
            return self._literal(atom) if isinstance(atom, Literal) else values[atom]

        values.update(zip(jaxpr.constvars, map(self._wide, consts), strict=True))
        values.update(zip(jaxpr.invars, args, strict=True))
        for eqn in jaxpr.eqns:
            outs = self._equation(eqn, [read(atom) for atom in eqn.invars], iteration)
            values.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _sub(self, jaxpr: Any, args: Sequence[Any], iteration: str) -> list[Any]:
        if hasattr(jaxpr, "jaxpr"):
            return self._jaxpr(jaxpr.jaxpr, jaxpr.consts, args, iteration)
        return self._jaxpr(jaxpr, (), args, iteration)

    def _quiet(self, jaxpr: Any, iteration: str) -> Callable[..., list[Any]]:
        def run(*args: Any) -> list[Any]:
            self._silent += 1
            try:
                return [jnp.asarray(out) for out in self._sub(jaxpr, args, iteration)]
            finally:
                self._silent -= 1

        return run

    def _equation(self, eqn: Any, ins: list[Any], iteration: str) -> Sequence[Any]:
        name, params = eqn.primitive.name, eqn.params
        if eqn.primitive is tap_p:
            return [self._tap(ins[0], iteration, **params)]
        if name in CALLS:
            return self._call(eqn, ins, iteration)
        if name == "scan":
            return self._scan(eqn, ins, iteration)
        if name == "cond":
            branches = [self._quiet(branch, iteration) for branch in params["branches"]]
            return jax.lax.switch(ins[0], branches, *ins[1:])
        if name == "while":
            n, m = params["cond_nconsts"], params["body_nconsts"]
            test, body = (self._quiet(params[key], iteration) for key in ("cond_jaxpr", "body_jaxpr"))
            return jax.lax.while_loop(
                lambda carry: test(*ins[:n], *carry)[0],
                lambda carry: body(*ins[n : n + m], *carry),
                [jnp.asarray(x) for x in ins[n + m :]],
            )
        if name in ON_ONE_DEVICE:
            return ins
        if name in REDUCED:  # over named axes of one device, and over positional ones, which vmap makes of names
            axes = tuple(axis for axis in params["axes"] if isinstance(axis, int))
            return [REDUCED[name](x, axes) for x in ins]
        if name == "axis_index":
            return [np.int32(0)]
        if name in ("all_gather", "reduce_scatter", "all_to_all"):
            return [_collective(name, params, ins[0])]
        if name == "debug_callback":
            return []
        return self._plain(eqn, ins)

    def _call(self, eqn: Any, ins: list[Any], iteration: str) -> list[Any]:
        params = eqn.params
        if eqn.primitive.name == "shard_map" and params["mesh"].size != 1:
            raise UserError(
                f"the JAX side runs shard_map over {params['mesh'].size} devices: make its mesh of one device, "
                "so that the values are those of a single program"
            )
        jaxpr = next(params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params)
        again = params.get("differentiated", False)
        if again:
            ins = jax.lax.optimization_barrier(ins)  # else XLA finds the first computation, and keeps its values
        self._again += again
        try:
            return self._sub(jaxpr, ins, iteration)
        finally:
            self._again -= again

    def _scan(self, eqn: Any, ins: list[Any], iteration: str) -> list[Any]:
        params, inner = eqn.params, eqn.params["jaxpr"].jaxpr
        # what is scanned over has one axis more than what the body sees of it; JAX 0.12 does not say the numbers
        scanned = sum(x.aval.ndim > part.aval.ndim for x, part in zip(eqn.invars, inner.invars, strict=True))
        carried = sum(x.aval.ndim == part.aval.ndim for x, part in zip(eqn.outvars, inner.outvars, strict=True))
        n, m = len(ins) - scanned - carried, len(ins) - scanned
        consts, carry, xs = ins[:n], ins[n:m], ins[m:]
        if not has_taps(inner):
            quiet = self._quiet(params["jaxpr"], iteration)

            def body(carry: Any, x: Any) -> tuple[list[Any], list[Any]]:
                outs = quiet(*consts, *carry, *x)
                return outs[: m - n], outs[m - n :]

            carry = [jnp.asarray(x) for x in carry]
            carry, ys = jax.lax.scan(body, carry, xs, params["length"], reverse=params["reverse"])
            return [*carry, *ys]
        made: list[list[Any]] = []
        order = range(params["length"])
        for i in reversed(order) if params["reverse"] else order:
            outs = self._sub(params["jaxpr"], [*consts, *carry, *(x[i] for x in xs)], f"{iteration}[{i}]")
            carry = outs[: m - n]
            made.append(outs[m - n :])
        if params["reverse"]:
            made.reverse()
        return [*carry, *(jnp.stack(ys) for ys in zip(*made, strict=True))]

    def _tap(self, x: Any, iteration: str, *, name: str, kind: str) -> Any:
        key = name + iteration
        if self._silent:
            return x
        if kind == "gradient":
            self._cotangents.setdefault(key, []).append(x)
        elif kind == "output" and not self._again:
            count = self._counts[key] = self._counts.get(key, 0) + 1
            self.outputs[numbered(key, count - 1)] = x
            for cast in self._casts:
                self.findings.setdefault(f"{name}: {cast}", name)
            self._casts.clear()
        return x

    def _plain(self, eqn: Any, ins: list[Any]) -> Sequence[Any]:
        primitive, name, params = eqn.primitive, eqn.primitive.name, dict(eqn.params)
        if self.lifted and name in SCATTERS:  # the primitive carries a program for one element, of the traced dtype
            keep = ("dimension_numbers", "indices_are_sorted", "unique_indices", "mode")
            return [SCATTERS[name](*ins, **{key: params[key] for key in keep})]
        self._note_cast(name, eqn)
        for key in ("sharding", "out_sharding"):
            if key in params:
                params[key] = None
        if self.lifted and name not in IN_THEIR_OWN_DTYPE:
            lifted = dict(params)
            for key in ("new_dtype", "dtype", "preferred_element_type", "out_dtype"):
                if lifted.get(key) is not None:
                    lifted[key] = self._wider_dtype(lifted[key])
            if name in ("dot_general", "conv_general_dilated", "ragged_dot_general"):
                lifted["precision"] = None
            if name == "reduce_precision" and (params["mantissa_bits"] >= 23 or self.low):
                return ins
            try:
                return self._bind(primitive, ins, lifted)
            except (TypeError, ValueError, NotImplementedError) as error:
                self.holes.add(f"{name} ({one_line(error)[:80]})")
        elif self.lifted and any(getattr(v.aval, "dtype", None) in self.wider for v in eqn.invars):
            self.holes.add(name)
        own = [
            x.astype(atom.aval.dtype) if getattr(x, "dtype", None) in self.wider.values() else x
            for atom, x in zip(eqn.invars, ins, strict=True)
        ]
        return [self._wide(out) for out in self._bind(primitive, own, params)]

    def _bind(self, primitive: Any, ins: list[Any], params: dict[str, Any]) -> Sequence[Any]:
        outs = primitive.bind(*ins, **primitive.get_bind_params(params))
        return [self._wide(out) for out in (outs if primitive.multiple_results else [outs])]

    def _note_cast(self, name: str, eqn: Any) -> None:
        before = max((_bits(v.aval) for v in eqn.invars), default=0)
        after = min((_bits(v.aval) for v in eqn.outvars), default=64)
        if name == "reduce_precision" and eqn.params["mantissa_bits"] < 23:
            after = 16
        if not self.low and before >= 32 > after > 0:
            self._casts.add(f"{name} to {eqn.outvars[0].aval.dtype}")

    def _wider_dtype(self, dtype: Any) -> Any:
        return self.wider.get(np.dtype(dtype), dtype) if not jnp.issubdtype(dtype, jax.dtypes.extended) else dtype

    def _wide(self, x: Any) -> Any:
        """A value in the wider dtype."""
        dtype = getattr(x, "dtype", None)
        if not self.wider or jnp.issubdtype(dtype, jax.dtypes.extended) or np.dtype(dtype) not in self.wider:
            return x
        wider = self.wider[np.dtype(dtype)]
        if isinstance(x, jax.core.Tracer):
            return x.astype(wider)
        return meant(np.asarray(x)).astype(wider)

    def _literal(self, atom: Literal) -> Any:
        dtype = atom.aval.dtype
        if jnp.issubdtype(dtype, jax.dtypes.extended):
            return atom.val
        value = np.asarray(atom.val, dtype)
        return meant(value) if self.lifted and value.dtype == np.float64 else self._wide(value)


def meant(value: np.ndarray) -> np.ndarray:
    """The value of a scalar as the source has it, before it was rounded to float32.

    JAX folds such literals into wider ones. The source has a short decimal, a known constant (the root of 1/2 in a
    GELU), or a whole number's reciprocal or root.
    """
    if value.ndim or value.dtype not in (np.float32, np.float64) or not np.isfinite(value):
        return value
    with np.errstate(over="ignore", under="ignore"):
        narrow = np.float32(value)
    if np.float64(narrow) != value or not value:
        return value
    digits = np.format_float_scientific(narrow).partition("e")[0].lstrip("-").replace(".", "").rstrip("0")
    if len(digits) <= DIGITS:
        return np.asarray(np.float64(str(narrow)))
    exact = next((x for x in _forms(abs(float(narrow))) if np.float32(x) == abs(narrow)), None)
    return value if exact is None else np.asarray(math.copysign(exact, value))


def _forms(value: float) -> Iterator[float]:
    """Numbers near a value that a formula may hold."""
    yield from CONSTANTS
    for number in (1 / value, value**2, value**-2):
        whole = round(number) if number < MOST_WHOLE else 0
        if whole:
            yield from (1 / whole, whole**0.5, whole**-0.5)


def _bits(aval: Any) -> int:
    dtype = getattr(aval, "dtype", None)
    return jnp.finfo(dtype).bits if dtype is not None and jnp.issubdtype(dtype, jnp.floating) else 0


def has_taps(jaxpr: Any) -> bool:
    for eqn in jaxpr.eqns:
        if eqn.primitive is tap_p:
            return True
        for value in eqn.params.values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns") and has_taps(inner):
                    return True
    return False


def _collective(name: str, params: dict[str, Any], x: Any) -> Any:
    """A collective over one device that moves an axis of size 1 unless it is tiled."""
    if params["tiled"]:
        return x
    if name == "all_gather":
        return jnp.expand_dims(x, params["all_gather_dimension"])
    if name == "reduce_scatter":
        return jnp.squeeze(x, params["scatter_dimension"])
    return jnp.moveaxis(x, params["split_axis"], params["concat_axis"])
