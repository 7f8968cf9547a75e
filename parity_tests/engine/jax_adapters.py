"""Modules of Flax NNX, Flax linen and equinox as sides, each module's outputs recorded under its path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import UserError
from parity_tests.engine.jax_side import JaxSide, Values, key_name
from parity_tests.engine.order import output_name
from parity_tests.engine.tap import tap, tapped_class


class nnx_side(JaxSide):
    """A Flax NNX module.

    Args:
        module: the module, or a function that makes it. Made by a function, tables that its constructor computes are
            lifted to float64 too.
        call: a function of the module.
        train_call: the same in training mode; none: `call` after `module.train()`.
    """

    def __init__(self, module: Any, call: Callable[[Any], Any], train_call: Any = None, **options: Any):
        from flax import nnx

        self._nnx, self._call, self._train_call = nnx, call, train_call
        made = module if isinstance(module, nnx.Module) else _made(module, nnx.Module, "nnx.Module")
        self._make = None if isinstance(module, nnx.Module) else module
        graph, state = nnx.split(made)
        flat = dict(nnx.to_flat_state(state))
        self._given = None if self._make is not None else (graph, flat)
        values, trainable = {}, []
        self._statistics = [".".join(map(str, path)) for path, v in flat.items() if isinstance(v, nnx.BatchStat)]
        for path, variable in flat.items():
            value = _value(variable)
            if hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.floating):
                name = ".".join(map(str, path))
                values[name] = np.asarray(value)
                if isinstance(variable, nnx.Param) or getattr(variable, "type", None) is nnx.Param:
                    trainable.append(name)
        super().__init__(values, trainable, **options)
        for path, part in nnx.iter_modules(made):
            self.kinds[".".join(map(str, path))] = type(part).__name__

    def can_train(self) -> bool:
        return True

    def movable(self) -> list[str]:
        return [*self._trainable, *(name for name in self._statistics if name in self.values)]

    def _module(self, values: Values) -> Any:
        nnx = self._nnx
        if self._given is None:
            graph, state = nnx.split(self._make())
            flat = dict(nnx.to_flat_state(state))
        else:
            graph, flat = self._given
        filled = {  # new variables: NNX refuses to change those of another level of tracing
            path: variable.replace(values.get(".".join(map(str, path)), _value(variable)))
            for path, variable in flat.items()
        }
        module = nnx.merge(graph, nnx.from_flat_state(filled))
        for path, part in list(nnx.iter_modules(module)):
            part.__class__ = tapped_class(type(part), ".".join(map(str, path)), nnx.Module)
        return module

    def apply(self, values: Values, training: bool) -> tuple[Any, Values]:
        module = self._module(values)
        module.train() if training else module.eval()
        result = (self._train_call if training and self._train_call else self._call)(module)
        after = dict(self._nnx.to_flat_state(self._nnx.state(module)))
        named = {".".join(map(str, path)): _value(variable) for path, variable in after.items()}
        return result, {n: named[n] for n in self.values if n in named and n not in self._trainable}

    def bound(self, values: Values) -> Any:
        module = self._module(values)
        module.eval()
        return module


class linen_side(JaxSide):
    """A Flax linen module.

    Args:
        module: the module.
        variables: what `module.init` returned, or a function that returns it.
        call: a function of `apply`, which is `module.apply` with the variables: `lambda apply: apply(ids)`.
        train_call: the same in training mode, for example `lambda apply: apply(ids, train=True)`. All collections but
            `params` are mutable there, and `apply` still returns the module's result alone.
    """

    def __init__(self, module: Any, variables: Any, call: Callable[[Any], Any], train_call: Any = None, **options: Any):
        from flax import linen
        from flax.traverse_util import flatten_dict

        self._linen, self._module, self._call, self._train_call = linen, module, call, train_call
        variables = variables() if callable(variables) else variables
        flat = {".".join(path): np.asarray(value) for path, value in flatten_dict(_unboxed(linen, variables)).items()}
        self._fixed = {name: value for name, value in flat.items() if not jnp.issubdtype(value.dtype, jnp.floating)}
        values = {name: value for name, value in flat.items() if name not in self._fixed}
        super().__init__(values, [name for name in values if name.startswith("params.")], **options)

    def can_train(self) -> bool:
        return self._train_call is not None

    def movable(self) -> list[str]:
        return [name for name in self.values if name.startswith(("params.", "batch_stats."))]

    def owner(self, name: str) -> str:
        return ".".join(name.split(".")[1:-1])

    def tree(self, params: Values) -> Any:
        return super().tree({name.removeprefix("params."): value for name, value in params.items()})

    def apply(self, values: Values, training: bool) -> tuple[Any, Values]:
        state: Values = {}
        apply = self._bound(values, state if training else None)
        return (self._train_call if training else self._call)(apply), state

    def _bound(self, values: Values, state: Values | None) -> Callable[..., Any]:
        from flax.traverse_util import flatten_dict, unflatten_dict

        named = {**self.values, **self._fixed, **values}
        variables = unflatten_dict({tuple(name.split(".")): value for name, value in named.items()})
        collections = [name for name in variables if name != "params"]

        def apply(*args: Any, **kwargs: Any) -> Any:
            if state is not None and "mutable" not in kwargs:
                kwargs["mutable"] = collections
            with self._linen.intercept_methods(self._intercept):
                out = self._module.apply(variables, *args, **kwargs)
            if state is None or not kwargs["mutable"]:
                return out
            out, changed = out
            flat = {".".join(path): value for path, value in flatten_dict(changed).items()}
            state.update({name: value for name, value in flat.items() if name in self.values})
            return out

        return apply

    def _intercept(self, method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = method(*args, **kwargs)
        name = context.method_name
        if name == "setup" or not name.isidentifier() or (name.startswith("_") and name != "__call__"):
            return out
        path = ".".join(context.module.path)
        self.kinds[path] = type(context.module).__name__
        return tap(out, output_name(path, name))

    def bound(self, values: Values) -> Any:
        return self._bound(values, None)


class eqx_side(JaxSide):
    """An equinox module.

    Args:
        module: the module, or a function that makes it; with a state, a pair of both.
        call: a function of the module, or of the module and its state, which then returns a result and a state.
        train_call: the same in training mode; `call` gets the module as `eqx.nn.inference_mode` makes it.
    """

    def __init__(self, module: Any, call: Callable[..., Any], train_call: Any = None, **options: Any):
        import equinox as eqx

        self._eqx, self._call, self._train_call = eqx, call, train_call
        is_made = isinstance(module, (eqx.Module, tuple))
        self._make = None if is_made else module
        self._made = _pair(module if is_made else module())
        model, *state = self._made
        floats = eqx.filter(model, eqx.is_inexact_array)
        values = {key_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(floats)[0]}
        trainable = list(values)
        if state:
            values |= {name: np.asarray(leaf) for name, leaf in self._state_values(model, state[0]).items()}
        super().__init__(values, trainable, **options)

    def can_train(self) -> bool:
        return self._train_call is not None

    def movable(self) -> list[str]:
        return list(self.values)

    def _state_indices(self, part: Any, path: str = "") -> dict[str, Any]:
        """The keys of the state, by the path of the module that has them."""
        if isinstance(part, self._eqx.nn.StateIndex):
            return {path: part}
        inner: dict[str, Any] = {}
        if isinstance(part, self._eqx.Module):
            inner = vars(part)
        elif isinstance(part, (list, tuple)):
            inner = {str(i): item for i, item in enumerate(part)}
        elif isinstance(part, dict):
            inner = part
        found = {}
        for name, item in inner.items():
            found |= self._state_indices(item, f"{path}.{name}".strip("."))
        return found

    def _state_values(self, model: Any, state: Any) -> Values:
        """Floating-point arrays of the state; those of a batch norm are called `mean` and `var`."""
        found = {}
        for path, index in self._state_indices(model).items():
            leaves = jax.tree.leaves(state.get(index))
            owner = path.rpartition(".")[0]
            statistics = len(leaves) == 2 and all(leaf.ndim == 1 for leaf in leaves)
            for i, leaf in enumerate(leaves):
                if jnp.issubdtype(leaf.dtype, jnp.inexact):
                    found[f"{owner}.{('mean', 'var')[i]}".strip(".") if statistics else f"{path}.{i}"] = leaf
        return found

    def _filled(self, values: Values) -> tuple[Any, ...]:
        model, *state = self._made if self._make is None else _pair(self._make())
        if state:
            after = jax.tree.map(lambda x: x, state[0])  # a state that was changed must not be used again
            for index in self._state_indices(model).values():
                old = after.get(index)
                named = {id(leaf): name for name, leaf in self._state_values(model, after).items()}
                after = after.set(index, jax.tree.map(lambda x, named=named: values.get(named.get(id(x), ""), x), old))
            state = [after]
        model = jax.tree_util.tree_map_with_path(lambda path, leaf: values.get(key_name(path), leaf), model)
        return self._tapped(model, ""), *state

    def _tapped(self, part: Any, path: str) -> Any:
        """The same module tree, each module of a class that taps."""
        if isinstance(part, (list, tuple)) and not hasattr(part, "_fields"):
            return type(part)(self._tapped(item, f"{path}.{i}".strip(".")) for i, item in enumerate(part))
        if isinstance(part, dict):
            return {key: self._tapped(item, f"{path}.{key}".strip(".")) for key, item in part.items()}
        if not isinstance(part, self._eqx.Module):
            return part
        self.kinds[path] = type(part).__name__
        copy = object.__new__(tapped_class(type(part), path, self._eqx.Module))
        for name, value in vars(part).items():
            object.__setattr__(copy, name, self._tapped(value, f"{path}.{name}".strip(".")))
        return copy

    def apply(self, values: Values, training: bool) -> tuple[Any, Values]:
        model, *state = self._filled(values)
        if not training:
            model = self._eqx.nn.inference_mode(model)
        out = (self._train_call if training else self._call)(model, *state)
        if not state:
            return out, {}
        out, after = out
        return out, self._state_values(model, after)

    def tree(self, params: Values) -> Any:
        """The module itself with these leaves, as `eqx.filter` gives it to an optimizer."""
        floats = self._eqx.filter(self._made[0], self._eqx.is_inexact_array)
        return jax.tree_util.tree_map_with_path(lambda path, _: params[key_name(path)], floats)

    def bound(self, values: Values) -> Any:
        return self._eqx.nn.inference_mode(self._filled(values)[0])


def _pair(made: Any) -> tuple[Any, ...]:
    return made if isinstance(made, tuple) else (made,)


def _value(variable: Any) -> Any:
    return variable.get_value() if hasattr(variable, "get_value") else variable.value


def _made(make: Any, kind: type, name: str) -> Any:
    made = make() if callable(make) else make
    if not isinstance(made, kind):
        raise UserError(f"module is of type {type(made).__name__}: give a {name}, or a function that makes one")
    return made


def _unboxed(linen: Any, variables: Any) -> Any:
    """Without the boxes that carry names of axes (`nn.with_partitioning`)."""
    return linen.meta.unbox(variables)
