"""A side in JAX: a function of named parameters, traced once for each precision and interpreted."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import one_line
from parity_tests.engine.lift import Interpreter
from parity_tests.engine.order import ordered_modules
from parity_tests.engine.record import Lazy, Module, Named, Run, Trained, storable
from parity_tests.engine.side import (
    LEARNING_RATE,
    STEPS,
    WEIGHT_DECAY,
    Precision,
    check_results,
    hashed,
    projection,
    signs,
)

Values = dict[str, Any]


QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""For programs in float64, which run a few times: most of their time goes into the compiler."""


class JaxSide:
    """A side in JAX. Subclasses say how a model is called with given values.

    Attributes:
        values: floating-point parameters and state as made, by name.
        kinds: the class of each module, by path.
    """

    framework = "jax"

    def __init__(
        self,
        values: Values,
        trainable: list[str],
        *,
        loss: Callable[[Any], Any] | None = None,
        optimizer: Any = None,
        logits: Callable[..., Any] | None = None,
        variants: Mapping[str, Callable[..., Any]] | None = None,
    ):
        """
        Args:
            loss: of what the call returns, a scalar; none: a fixed random projection.
            optimizer: an optax transformation; none: AdamW.
            logits: a function (model, ids) or (model, ids, mask) for the rung `batch`.
            variants: further functions (model, ids) that must give the same logits: with a cache, packed, in chunks.
        """
        self.values, self._trainable = values, trainable
        self.loss, self.optimizer, self.logits, self.variants = loss, optimizer, logits, dict(variants or {})
        self._loaded: Mapping[str, np.ndarray] = {}
        self.kinds: dict[str, str] = {}
        self._compiled: dict[Any, Any] = {}
        self.traced: dict[str, str] = {}

    # what a subclass says

    def apply(self, values: Values, training: bool) -> tuple[Any, Values]:
        """What the user's call returns, and the state afterwards. It is traced, with taps."""
        raise NotImplementedError

    def can_train(self) -> bool:
        return False

    def owner(self, name: str) -> str:
        """The path of the module that a tensor belongs to."""
        return name.rpartition(".")[0]

    def tree(self, params: Values) -> Any:
        """The parameters as the user's optimizer sees them."""
        return _nested(params)

    # the protocol of a side

    def tensors(self) -> Named:
        loaded = self._loaded  # of now: what is loaded next may be made of these
        return Lazy(self.values, lambda name: storable(loaded.get(name, self.values[name])))

    def load(self, values: Mapping[str, np.ndarray]) -> None:
        self._loaded = values
        for name in values:  # as made it is not needed any more, only its shape and dtype
            self.values[name] = np.broadcast_to(np.zeros((), self.values[name].dtype), self.values[name].shape)

    @contextlib.contextmanager
    def nudged(self, direction: int) -> Iterator[None]:
        before, names = self._loaded, set(self._trainable)

        def moved(name: str) -> np.ndarray:
            value = np.asarray(before.get(name, self.values[name]), self.values[name].dtype)
            if name not in names:
                return value
            return np.nextafter(value, (signs(name, value.shape, direction) * np.inf).astype(value.dtype))

        self._loaded = Lazy([*before, *self._trainable], moved)
        try:
            yield
        finally:
            self._loaded = before

    def trainable(self) -> list[str]:
        return self._trainable

    def movable(self) -> list[str]:
        return self._trainable

    def aliases(self) -> dict[str, str]:
        return {}

    def about(self) -> dict[str, Any]:
        closed, _ = self._trace("own", False, False)
        consts = [storable(c) for c in closed.consts if not jnp.issubdtype(c.dtype, jax.dtypes.extended)]
        return {
            "versions": {name: _version(name) for name in ("jax", "jaxlib", "flax", "equinox", "optax", "numpy")},
            "dtypes": sorted({str(self.values[name].dtype) for name in self._trainable}),
            "inputs": sorted({hashed(c) for c in consts if c.ndim and c.dtype.kind in "iuf"}),
            "device": jax.devices()[0].device_kind,
            "lifted from": self.traced.get("lifted", ""),
        }

    def modules(self) -> list[Module]:
        interpreter = Interpreter(lifted=False)
        closed, _ = self._trace("own", False, False)
        with _precision(False):
            jax.eval_shape(lambda *args: interpreter.run(closed, args), *jax.tree.leaves(self._start("own")))
        return ordered_modules(list(interpreter.outputs), list(self.values), self.owner, self.kinds)

    def run(self, precision: Precision, *, training: bool = False, grads: bool = True) -> Run:
        lifted = precision == "lifted"
        key = precision, training, grads, frozenset(self._loaded) - {*self._trainable}
        if key not in self._compiled:
            self._compiled[key] = self._compile(*self._trace(precision, training, grads), lifted)
        program, notes = self._compiled[key]
        with _precision(lifted):
            start = jax.tree.leaves(self._start(precision))
            (loss, results, state, gradients), outputs, output_grads = jax.device_get(program(*start))
        named = {name: outputs[name] for name in notes["order"]}
        return Run(
            loss=float(loss),
            results=_stored(results),
            outputs=_stored(named),
            output_grads=_stored({name: output_grads[name] for name in named if name in output_grads}),
            grads=_stored(gradients),
            state=_stored(state),
            findings=notes["findings"],
            holes=notes["holes"],
        )

    def train(self, precision: Precision, steps: int = STEPS, training: bool = False) -> Trained:
        lifted = precision == "lifted"
        with _precision(lifted):
            params, others = self._start(precision)
            optimizer = self._optimizer()
            opt_state = optimizer.init(self.tree(params))
        state = params, others, opt_state
        program = self._step_program(optimizer, precision, training)
        losses, first = [], {}
        with _precision(lifted):
            leaves, tree = jax.tree.flatten(state)
            for i in range(steps):
                loss, leaves = program(*leaves)
                losses.append(float(loss))
                if not i:
                    first = _change(params, jax.tree.unflatten(tree, leaves)[0])
            last = _change(params, jax.tree.unflatten(tree, leaves)[0])
        return Trained(losses, first, last)

    def call_logits(
        self, precision: Precision, ids: np.ndarray, mask: np.ndarray | None = None, logits: Any = None
    ) -> np.ndarray:
        """The logits of tokens (B,T); the mask (B,T) is true where there is a token."""
        lifted = precision == "lifted"
        arguments = [jnp.asarray(ids), *([] if mask is None else [jnp.asarray(mask)])]

        def function(values: Values) -> Any:
            return (logits or self.logits)(self.bound(values), *arguments)

        with _precision(lifted):
            start = self._start(precision)
            closed = jax.make_jaxpr(lambda params, others: function({**others, **params}))(*start)
            interpreter = Interpreter(lifted, self._low())
            (out,) = jax.jit(lambda *args: interpreter.run(closed, args))(*jax.tree.leaves(start))
            return np.asarray(out)

    def bound(self, values: Values) -> Any:
        """The model with these values, as `call` gets it."""
        raise NotImplementedError

    # tracing

    def _low(self) -> bool:
        return any(jnp.finfo(self.values[name].dtype).bits < 32 for name in self._trainable)

    def _start(self, precision: Precision) -> tuple[Values, Values]:
        """Trainable parameters, and the other tensors that were loaded, in the dtype of a run."""

        def cast(name: str) -> Any:
            value = self._loaded.get(name, self.values[name])
            return jnp.asarray(value, jnp.float64 if precision == "lifted" else self.values[name].dtype)

        return (
            {name: cast(name) for name in self._trainable},
            {name: cast(name) for name in self._loaded if name not in self._trainable},
        )

    def _trace(self, precision: Precision, training: bool, grads: bool) -> tuple[Any, Any]:
        """The program of a run, and the structure of what it returns."""

        def whole(params: Values, others: Values) -> tuple[Any, Values, Values, Values]:
            def loss_of(params: Values) -> tuple[Any, Any]:
                result, state = self.apply({**others, **params}, training)
                results = float_leaves(result)
                check_results(results, self.framework)
                return self._loss(result, results), (results, state)

            if not grads:
                loss, (results, state) = loss_of(params)
                return loss, results, state, {}
            (loss, (results, state)), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
            return loss, results, state, gradients

        return self._traced(whole, precision, lambda wide: self._shapes(wide))

    def _shapes(self, wide: bool) -> tuple[Values, Values]:
        start = jax.eval_shape(lambda: self._start("own"))
        if not wide:
            return start
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float64), start)

    def _traced(self, function: Callable[..., Any], precision: Precision, shapes: Callable[[bool], Any]) -> Any:
        """Trace with 64-bit types where that works, else as the model runs; lifting needs one of the two."""
        if precision == "lifted":
            try:
                with _precision(True):
                    traced = jax.make_jaxpr(function, return_shape=True)(*shapes(True))
                self.traced["lifted"] = "a trace with 64-bit types"
                return traced
            except (TypeError, ValueError, AssertionError) as error:
                self.traced["lifted"] = f"the float32 trace ({type(error).__name__}: {one_line(error)[:100]})"
        with _precision(False):
            return jax.make_jaxpr(function, return_shape=True)(*shapes(False))

    def _compile(self, closed: Any, shape: Any, lifted: bool) -> tuple[Any, dict[str, Any]]:
        tree = jax.tree.structure(shape)
        notes: dict[str, Any] = {}

        def program(*args: Any) -> Any:
            interpreter = Interpreter(lifted, self._low())
            outs = interpreter.run(closed, args)
            notes["order"] = list(interpreter.outputs)
            notes["findings"], notes["holes"] = list(interpreter.findings), sorted(interpreter.holes)
            return jax.tree.unflatten(tree, outs), interpreter.outputs, interpreter.gradients

        return jax.jit(program, compiler_options=QUICKLY if lifted else None), notes

    def _step_program(self, optimizer: Any, precision: Precision, training: bool) -> Any:
        import optax

        def step(params: Values, others: Values, opt_state: Any) -> tuple[Any, Any]:
            def loss_of(params: Values) -> tuple[Any, Values]:
                result, after = self.apply({**others, **params}, training)
                return self._loss(result, float_leaves(result)), after

            (loss, after), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
            updates, opt_state = optimizer.update(self.tree(gradients), opt_state, self.tree(params))
            names = jax.tree.leaves(self.tree({name: name for name in params}))
            changed = jax.tree.leaves(optax.apply_updates(self.tree(params), updates))
            new = dict(zip(names, changed, strict=True))
            return loss, (
                {name: new[name] for name in params},
                {n: after.get(n, x) for n, x in others.items()},
                opt_state,
            )

        def shapes(wide: bool) -> Any:
            params, others = self._shapes(wide)
            return params, others, jax.eval_shape(optimizer.init, self.tree(params))

        closed, _ = self._traced(step, precision, shapes)

        def program(*args: Any) -> tuple[Any, list[Any]]:
            loss, *leaves = Interpreter(precision == "lifted", self._low()).run(closed, args)
            return loss, leaves

        return jax.jit(program, compiler_options=QUICKLY if precision == "lifted" else None)

    def _optimizer(self) -> Any:
        if self.optimizer is not None:
            return self.optimizer
        import optax

        return optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def _loss(self, result: Any, results: Values) -> Any:
        if self.loss is not None:
            return self.loss(result)
        total = 0.0
        for i, values in enumerate(results.values()):
            wide = values.astype(jnp.promote_types(values.dtype, jnp.float32))
            total += jnp.sum(wide * jnp.asarray(projection(values.shape, i), wide.dtype))
        return total


class FunctionSide(JaxSide):
    """A function of a pytree of parameters; `parity_tests.tap` names what it computes on the way."""

    def __init__(self, fn: Callable[[Any], Any], params: Any, **options: Any):
        leaves, self._tree = jax.tree_util.tree_flatten_with_path(params)
        self._names = [key_name(path) for path, _ in leaves]
        values = {name: np.asarray(leaf) for name, (_, leaf) in zip(self._names, leaves, strict=True)}
        super().__init__(values, list(values), **options)
        self._fn = fn

    def apply(self, values: Values, training: bool) -> tuple[Any, Values]:
        return self._fn(self.bound(values)), {}

    def tree(self, params: Values) -> Any:
        return jax.tree.unflatten(self._tree, [params[name] for name in self._names])

    def bound(self, values: Values) -> Any:
        return self.tree(values)


def float_leaves(result: Any) -> Values:
    """The floating-point arrays of what a call returned: `result`, `result:1`, ..."""
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(result) if hasattr(x, "dtype") or isinstance(x, float)]
    floats = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
    return {f"result:{i}" if i else "result": x for i, x in enumerate(floats)}


def key_name(path: Any) -> str:
    """A pytree's key path with dots: `layers.0.weight`."""
    return re.sub(r"\[?['\"]?([^\[\]'\".]+)['\"]?\]?\.?", r"\1.", jax.tree_util.keystr(path)).strip(".")


@contextlib.contextmanager
def _precision(wide: bool) -> Iterator[None]:
    """64-bit types if requested; on a GPU no TF32."""
    with jax.enable_x64(wide), jax.default_matmul_precision("highest"):
        yield


def _nested(named: Values) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in named.items():
        *path, last = name.split(".")
        level = nested
        for part in path:
            level = level.setdefault(part, {})
        level[last] = value
    return nested


def _stored(named: Values) -> dict[str, np.ndarray]:
    return {name: storable(value) for name, value in named.items()}


def _change(before: Values, after: Values) -> dict[str, np.ndarray]:
    return {name: np.asarray(after[name], np.float64) - np.asarray(before[name], np.float64) for name in before}


def _version(package: str) -> str:
    try:
        return version(package)
    except ModuleNotFoundError:
        return "not installed"
