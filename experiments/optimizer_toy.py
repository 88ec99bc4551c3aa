"""Two small problems that show what a momentum remembers, with trajectories drawn.

    python -m experiments.optimizer_toy [--steps 3000] [--learning-rate 0.01] [--momentum 0.99] [--sweep] [--tiny]

"curvature" (the paper's equation 53) minimises

    psi(r, theta) = r^2 + k (r - theta + a sin(omega r))^2        from (-3.5, 2), its minimum is (0, 0)

whose curvature along r changes all the time. The constants are not published; k = 1, a = 1, omega = 5 here. Counted are
the steps until the point first comes within 1e-3 of the minimum: long momentum overshoots, delta momentum forgets along
the directions it writes. With --sweep each rule has its best pair of learning rate and momentum from one grid.

"orthogonal" (the example around equation 45) moves along one axis for `tasks` steps and then along the other, which is
orthogonal to it. Shown is how much of the first direction a momentum still holds n steps into the second: what an
optimizer carries from one task into the next. Momentum must decay to stay finite; delta momentum (S4.1) erases only
along the gradient it writes, so it may keep everything (alpha = 1) and hold what is orthogonal for ever.

The picture is plots/optimizer_toy.png. Five seconds on one core, ten with the sweep (AMD EPYC).
"""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from experiments.options import at_least, run_script
from experiments.plots import figure_of, save
from hope_jax import deep_momentum, delta_momentum, preconditioned_momentum

type Rule = Callable[[float, float], optax.GradientTransformation]

RULES: dict[str, Rule] = {
    "momentum": preconditioned_momentum,
    "delta momentum, damped": delta_momentum,
    "delta momentum, exact": lambda rate, alpha: delta_momentum(rate, alpha, step="exact"),
    "delta momentum, explicit": lambda rate, alpha: delta_momentum(rate, alpha, step="explicit"),
    "deep momentum": deep_momentum,
}
START = (-3.5, 2.0)
NEAR = 1e-3
RATES = tuple(float(rate) for rate in np.geomspace(1e-3, 0.3, 11))
ALPHAS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)


@dataclasses.dataclass(frozen=True)
class ToyOptions:
    """The toy problems.

    Attributes:
      steps: of the curvature problem, at most.
      learning_rate: of every rule.
      momentum: retained fraction alpha of every rule.
      k: weight of the second term.
      a: height of the sine.
      omega: frequency of the sine.
      tasks: steps of each of the two orthogonal tasks.
      sweep: the best learning rate and momentum of each rule too.
      tiny: few steps, below runs/.
      out: folder of the picture.
    """

    steps: int = 3000
    learning_rate: float = 0.01
    momentum: float = 0.99
    k: float = 1.0
    a: float = 1.0
    omega: float = 5.0
    tasks: int = 50
    sweep: bool = False
    tiny: bool = False
    out: Path = Path("experiments/plots")

    def __post_init__(self) -> None:
        at_least(self, {"steps": 1, "tasks": 1})


TINY = ToyOptions(steps=20, tasks=5, out=Path("runs/experiments/plots"))


class Tuned(NamedTuple):
    """The best of a grid."""

    steps: int | None  # until near; None: never
    learning_rate: float
    momentum: float


def psi(point: jax.Array, options: ToyOptions) -> jax.Array:
    """Equation 53 at (r, theta)."""
    r, theta = point
    return r**2 + options.k * (r - theta + options.a * jnp.sin(options.omega * r)) ** 2


def trajectory(tx: optax.GradientTransformation, options: ToyOptions) -> jax.Array:
    """[steps + 1, 2] points of a rule, which sees (r, theta) as a matrix [2, 1]: one output of two inputs."""

    def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
        point_KV, state = carry
        grads = jax.grad(lambda p: psi(p[:, 0], options))(point_KV)
        updates, state = tx.update(grads, state, point_KV)
        point_KV = point_KV + updates
        return (point_KV, state), point_KV[:, 0]

    start = jnp.array(START)[:, None]
    _, points = jax.jit(lambda: jax.lax.scan(step, (start, tx.init(start)), length=options.steps))()
    return jnp.concatenate([start.T, points])


def steps_until_near(points: jax.Array) -> int | None:
    """The first step within `NEAR` of the minimum, or None."""
    near = np.hypot(*np.asarray(points).T) < NEAR  # hypot: a rule may leave the plane
    return int(near.argmax()) if near.any() else None


def tuned(rule: Rule, options: ToyOptions) -> Tuned:
    """The pair of learning rate and momentum that is near soonest."""
    pairs = jnp.array(list(itertools.product(RATES, ALPHAS)))
    points = jax.jit(jax.vmap(lambda pair: trajectory(rule(pair[0], pair[1]), options)))(pairs)
    grid = [Tuned(steps_until_near(one), *map(float, pair)) for one, pair in zip(points, pairs, strict=True)]
    return min(grid, key=lambda one: (one.steps is None, one.steps))


def held(tx: optax.GradientTransformation, options: ToyOptions) -> np.ndarray:
    """[tasks + 1]: how far the next update still goes along the first task's direction, n steps into the second.

    The next update is that of a zero gradient, relative to the one at the end of the first task.
    """
    first, second = jnp.eye(2)[:, :1], jnp.eye(2)[:, 1:]

    def step(state: Any, gradient: jax.Array) -> tuple[Any, jax.Array]:
        _, state = tx.update(gradient, state, first)
        carried, _ = tx.update(jnp.zeros_like(gradient), state, first)
        return state, jnp.asarray(carried)[0, 0]

    n = options.tasks
    gradients = jnp.concatenate([jnp.tile(first, (n, 1, 1)), jnp.tile(second, (n, 1, 1))])
    _, along_first = jax.jit(lambda: jax.lax.scan(step, tx.init(first), gradients))()
    along_first = np.asarray(along_first)[n - 1 :]
    return along_first / along_first[0]


CARRIED: dict[str, optax.GradientTransformation] = {
    "momentum, alpha 0.9": preconditioned_momentum(0.1, 0.9),
    "momentum, alpha 0.99": preconditioned_momentum(0.1, 0.99),
    "delta momentum, alpha 0.99": delta_momentum(0.1, 0.99),
    "delta momentum, alpha 1": delta_momentum(0.1, 1.0),
    "deep momentum, alpha 0.9": deep_momentum(0.1, 0.9),
}


def curvature_table(options: ToyOptions) -> tuple[Table, dict[str, jax.Array]]:
    """Steps until near of every rule, and the trajectories."""
    table = Table("rule", "steps until near", title="curvature (53)")
    if options.sweep:
        for head in ("steps, tuned", "learning rate", "alpha"):
            table.add_column(head)
    points = {name: trajectory(rule(options.learning_rate, options.momentum), options) for name, rule in RULES.items()}
    for name, found in points.items():
        row = [name, _count(steps_until_near(found))]
        if options.sweep:
            best = tuned(RULES[name], options)
            row += [_count(best.steps), f"{best.learning_rate:.3g}", f"{best.momentum:g}"]
        table.add_row(*row)
    return table, points


def orthogonal_table(options: ToyOptions) -> tuple[Table, dict[str, np.ndarray]]:
    """What is left of the first task's direction, at some steps into the second."""
    shown = [n for n in (0, 7, 20, 44) if n <= options.tasks]
    table = Table("rule", *(f"n = {n}" for n in shown), title="orthogonal tasks: share of the first direction held")
    shares = {name: held(tx, options) for name, tx in CARRIED.items()}
    for name, share in shares.items():
        table.add_row(name, *(f"{share[n]:.3f}" for n in shown))
    return table, shares


def _count(steps: int | None) -> str:
    return "not near" if steps is None else str(steps)


def draw(points: dict[str, jax.Array], shares: dict[str, np.ndarray], options: ToyOptions) -> Path:
    """Trajectories over the contours of psi, the distance over steps, and the shares."""
    figure, (plane, distance, carried) = figure_of(3, width=5)
    r, theta = np.meshgrid(np.linspace(-5, 5, 300), np.linspace(-6, 6, 300))
    plane.contour(r, theta, np.log1p(psi(jnp.array([r, theta]), options)), levels=12, cmap="Greys", linewidths=0.5)
    for name, found in points.items():
        plane.plot(*np.asarray(found).T, linewidth=0.8, label=name)
        distance.plot(np.hypot(*np.asarray(found).T), linewidth=0.8, label=name)
    plane.plot(*START, "ko", markersize=4)
    plane.set(xlabel="r", ylabel="theta", xlim=(-5, 5), ylim=(-6, 6), title="equation 53")
    distance.axhline(NEAR, color="grey", linewidth=0.5)
    distance.set(xlabel="step", ylabel="distance to the minimum", yscale="log", ylim=(NEAR / 10, 10))
    distance.legend(fontsize=7)
    for name, share in shares.items():
        carried.plot(share, label=name)
    carried.set(xlabel="steps into the second task", ylabel="share of the first direction", title="orthogonal tasks")
    carried.legend(fontsize=7)
    return save(figure, options.out / "optimizer_toy.png")


def run(options: ToyOptions, console: Console) -> Path:
    """Prints both tables and returns the path of the picture."""
    table, points = curvature_table(options)
    console.print(table)
    table, shares = orthogonal_table(options)
    console.print(table)
    return draw(points, shares, options)


if __name__ == "__main__":
    run_script(ToyOptions, TINY, run)
