"""A call as the benchmark times it: its arrays and a cotangent for each output, forward or with every gradient.

An operation is here a function from arrays by name to a list of arrays, its `outputs`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hope_kernels.dispatch import explain
from hope_kernels.measuring import Mode

type Outputs = Callable[[dict[str, Any]], list[jax.Array]]
type Case = tuple[dict[str, Any], list[Any]]  # the arrays by name, and a cotangent for each output


def make_case(reference: Outputs, inputs: Mapping[str, Any]) -> Case:
    """The arrays with random cotangents; of shapes, if the arrays are shapes."""
    given = dict(inputs)
    shapes = jax.eval_shape(reference, given)
    if all(isinstance(x, jax.ShapeDtypeStruct) for x in given.values()):
        return given, shapes
    rng = np.random.default_rng(1)
    return given, [jnp.asarray(rng.normal(size=s.shape), s.dtype) for s in shapes]


def timed(outputs: Outputs, mode: Mode) -> Callable[[Case], Any]:
    """What is timed, as a function of a case."""
    return partial(_forward if mode == "forward" else _with_gradients, outputs)


def _forward(outputs: Outputs, case: Case) -> list[jax.Array]:
    return outputs(case[0])


def _with_gradients(outputs: Outputs, case: Case) -> tuple[Any, Any]:
    """The outputs, and the gradients of all floating-point arrays under the case's cotangents."""
    inputs, cotangents = case
    fixed = {name: x for name, x in inputs.items() if not jnp.issubdtype(x.dtype, jnp.floating)}
    moving = {name: x for name, x in inputs.items() if name not in fixed}
    out, pullback = jax.vjp(lambda moving: outputs(moving | fixed), moving)
    return out, pullback(cotangents)[0]


def why_not(outputs: Outputs, shapes: dict[str, Any]) -> str | None:
    """Why a named implementation refuses the call on this machine, as one phrase, or None."""
    try:
        jax.eval_shape(outputs, shapes)
    except NotImplementedError as error:
        return str(error).partition("cannot run: ")[2].partition("; there are: ")[0]
    return None


def chosen(outputs: Outputs, shapes: dict[str, Any]) -> str:
    """The implementation that a call without a name gets."""
    return explain(outputs, shapes).split("'")[1]
