"""Operations of a JAX function, counted on its jaxpr: loops as often as they turn, Pallas kernels on their whole grid.

XLA's own count (`compiled.cost_analysis()["flops"]`) takes a loop's body once and knows nothing of what happens inside
a kernel. Here a `scan` counts as often as it turns, a `cond` as its larger branch, a kernel as its `cost_estimate` or
else its body on every cell of the grid, and the body of a `shard_map` on every device. Two kinds are kept apart:

- `products`: matrix products and convolutions, a multiply-add as two operations: what matrix units do, and what
  the utilisation of a device is measured by;
- `elementwise`: arithmetic, comparisons, selections and conversions, one per element of the result, and reductions, one
  per element of the operand. As in XLA's count, exp, log, tanh, sqrt, powers and their like count nothing.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

_ELEMENTWISE = re.compile(
    "abs|add|add_any|and|ceil|clamp|convert_element_type|div|eq|floor|ge|gt|integer_pow|is_finite|le|lt|max|min|mul|ne|"
    "neg|not|or|rem|round|select_n|shift_left|shift_right_arithmetic|shift_right_logical|sign|square|sub|xor"
)
_REDUCTION = re.compile("(arg|cum|reduce_)(and|max|min|or|prod|sum|xor)")


class Flops(NamedTuple):
    """Operations of one call, over all devices."""

    products: float = 0.0  # in matrix products and convolutions
    elementwise: float = 0.0  # everything else that is counted

    @property
    def total(self) -> float:
        """Both kinds: what is comparable with XLA's count of a program without loops."""
        return self.products + self.elementwise

    def plus(self, other: "Flops", times: float = 1.0) -> "Flops":
        """The sum with `times` calls of something else."""
        return Flops(self.products + times * other.products, self.elementwise + times * other.elementwise)


def flops_of(function: Callable[..., Any], *args: Any) -> Flops:
    """Operations of `function(*args)`. It is traced, neither compiled nor run.

    Recomputation (`jax.checkpoint`) counts as often as it happens, so the count of a training step says what the
    hardware does; that of the gradient of the same model without it says what the model needs.

    Args:
      function: any JAX function, jitted or not; a kernel that is chosen by the platform is that of the platform
        of the trace (see `jax.default_device`).
      args: arrays or `jax.ShapeDtypeStruct`s, in any trees.
    Returns:
      A `Flops`; its `total` is one number.
    Raises:
      ValueError: a `while` loop turns as often as its data say: such a function has no count.

    Example:
      >>> a, b = jax.ShapeDtypeStruct((4, 8), "float32"), jax.ShapeDtypeStruct((8, 16), "float32")
      >>> flops_of(lambda a, b: a @ b + 1, a, b)
      Flops(products=1024.0, elementwise=64.0)
    """
    return _of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def _of_jaxpr(jaxpr: Any) -> Flops:
    total = Flops()
    for equation in jaxpr.eqns:
        total = total.plus(_of_equation(equation))
    return total


def _of_equation(equation: Any) -> Flops:
    name, params = equation.primitive.name, equation.params
    if _ELEMENTWISE.fullmatch(name):
        return Flops(elementwise=_size(equation.outvars[0]))
    if _REDUCTION.fullmatch(name):
        return Flops(elementwise=_size(equation.invars[0]))
    if name in _PRODUCTS:
        return Flops(products=_PRODUCTS[name](equation))
    if name == "scatter-add":
        return Flops(elementwise=_size(equation.invars[2]))
    if name == "while":
        raise ValueError("a while loop turns as often as its data say and has no count; use lax.scan or lax.fori_loop")
    if name == "cond":
        return max((_of_jaxpr(branch.jaxpr) for branch in params["branches"]), key=lambda flops: flops.total)
    if params.get("cost_estimate") is not None:
        return Flops(products=float(params["cost_estimate"].flops))
    body = Flops()
    for inner in _inner(params):
        body = body.plus(_of_jaxpr(inner))
    return Flops().plus(body, _turns(name, params))


def _turns(name: str, params: dict[str, Any]) -> int:
    """How often the body of an equation runs, over all devices."""
    if name == "scan":
        return params["length"]
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    if name == "mpmd_map":  # Mosaic GPU. The threads of a block take turns at the code, which is counted once.
        return math.prod(math.prod(mesh.grid) * math.prod(mesh.cluster) for mesh in params["meshes"])
    if name == "shard_map":
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return 1


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs among the parameters of an equation."""
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield part


def _size(var: Any) -> float:
    return float(math.prod(getattr(var.aval, "shape", ())))


def _dot_general(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * _size(equation.outvars[0]) * math.prod(left[axis] for axis in contracted)


def _ragged_dot(equation: Any) -> float:
    return 2 * _size(equation.outvars[0]) * equation.invars[0].aval.shape[-1]


def _convolution(equation: Any) -> float:
    """Every output is a product with the whole kernel; XLA leaves out the taps that fall on padding."""
    _, kernel = (var.aval.shape for var in equation.invars)
    features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2 * _size(equation.outvars[0]) * math.prod(kernel) / features


def _triangular_solve(equation: Any) -> float:
    """Half of a product with the whole matrix."""
    triangle, right = (var.aval.shape for var in equation.invars)
    return float(math.prod(right) * triangle[-1])


def _wgmma(equation: Any) -> float:
    """Hopper's product in a Mosaic GPU kernel; what it reads are views of buffers that may be larger."""
    from jax._src.state.types import TransformedRef

    accumulator, left = (var.aval for var in equation.invars[:2])
    start = 3 + getattr(equation.params["acc_transforms_tree"], "num_leaves", 0)
    tree = equation.params["a_transforms_tree"]
    transforms = tree.unflatten([var for var in equation.invars[start : start + tree.num_leaves]]) if tree else ()
    return 2.0 * math.prod(accumulator.shape) * int(TransformedRef(left, transforms).shape[-1])


_PRODUCTS: dict[str, Callable[[Any], float]] = {
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolution,
    "triangular_solve": _triangular_solve,
    "wgmma_ref": _wgmma,
}
