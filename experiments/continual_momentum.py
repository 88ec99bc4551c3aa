"""What momentum does to old tasks: forgetting against the kind of momentum and the length of M3's slow scale.

    python -m experiments.continual_momentum [--rules momentum_0.9 ...] [--tasks 4] [--steps 200] [--overlap 0.7]
        [--seeds 3] [--tiny]

A matrix [K, V] learns one linear task after another, y = x W_i, with inputs from a subspace U_i of its own:

    orthogonal     the subspaces share nothing, so one matrix solves all tasks and every gradient of one task is
                   orthogonal to those of the others: gradient descent forgets nothing
    overlapping    every basis vector of U_i has the part `overlap` in a subspace that all tasks share, where
                   their gradients interfere

The loss of task i, |U_i^T (W - W_i)|^2 over its value at W = 0, is computed exactly. "learned" is its mean over tasks
right after each was trained, "end" after the last one, and "forgotten" the mean rise in between over all but the last.
"carry" goes on with the momentum of the task before (`carry_momentum`), "reset" starts it again (`reset_momentum`). The
update falls linearly to zero within each task, after the rule: a momentum that is carried over acts in full again.
Every rule has the learning rate of the grid with the lowest "end".

The picture is plots/continual_momentum.png. Four minutes on one core (AMD EPYC).
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.options import at_least, run_script
from experiments.plots import figure_of, save
from hope_jax import carry_momentum, deep_momentum, delta_momentum, m3, preconditioned_momentum, reset_momentum
from hope_jax.training.errors import UserError
from hope_jax.training.overrides import unknown

type Rule = Callable[[Any], optax.GradientTransformation]

RULES: dict[str, Rule] = {
    "sgd": lambda rate: optax.sgd(rate),
    "momentum_0.9": lambda rate: preconditioned_momentum(rate, 0.9),
    "momentum_0.99": lambda rate: preconditioned_momentum(rate, 0.99),
    "delta_momentum_0.9": lambda rate: delta_momentum(rate, 0.9),
    "delta_momentum_0.99": lambda rate: delta_momentum(rate, 0.99),
    "deep_momentum_0.9": lambda rate: deep_momentum(rate, 0.9),
    "adam": lambda rate: optax.adam(rate),
    "m3_fast_alone": lambda rate: m3(rate, scales=(1,)),
    "m3_period_8": lambda rate: m3(rate, scales=(1, 8)),
    "m3_period_32": lambda rate: m3(rate, scales=(1, 32)),
    "m3_period_128": lambda rate: m3(rate, scales=(1, 128)),
}
SEQUENCES = ("orthogonal", "overlapping")
BOUNDARIES = {"carry": carry_momentum, "reset": reset_momentum}
RATES = tuple(float(rate) for rate in np.geomspace(1e-5, 1.0, 11))


@dataclasses.dataclass(frozen=True)
class ContinualOptions:
    """A sequence of linear tasks.

    Attributes:
      rules: names in `RULES`.
      tasks: how many.
      steps: of each task.
      batch_size: examples per step.
      rank: of each task's inputs.
      outputs: V; K is (tasks + 1) rank, a block of inputs for all tasks and one for each.
      overlap: length of the shared part of a basis vector, in [0, 1], in the overlapping sequence.
      seeds: how many sequences, of other tasks and examples each.
      tiny: a few steps, below runs/.
      out: folder of the picture.
    """

    rules: tuple[str, ...] = tuple(RULES)
    tasks: int = 4
    steps: int = 200
    batch_size: int = 16
    rank: int = 6
    outputs: int = 16
    overlap: float = 0.7
    seeds: int = 3
    tiny: bool = False
    out: Path = Path("experiments/plots")

    def __post_init__(self) -> None:
        for rule in self.rules:
            if rule not in RULES:
                raise UserError(unknown("rule", rule, list(RULES)))
        at_least(self, {"tasks": 2, "steps": 1, "batch_size": 1, "rank": 1, "outputs": 1, "seeds": 2})
        if not 0 <= self.overlap <= 1:
            raise UserError(f"overlap must lie between 0 and 1; got {self.overlap}")


TINY = ContinualOptions(
    rules=("momentum_0.9",),
    tasks=2,
    steps=4,
    rank=2,
    outputs=2,
    seeds=2,
    out=Path("runs/experiments/plots"),
)


class Tasks(NamedTuple):
    """A sequence of N tasks."""

    bases_NKR: jax.Array  # orthonormal columns
    targets_NKV: jax.Array


class Result(NamedTuple):
    """Of one rule at its best learning rate; [seeds] each, and one curve."""

    learned: np.ndarray
    forgotten: np.ndarray
    end: np.ndarray
    first_task: np.ndarray  # [all steps] mean over seeds of the first task's loss
    learning_rate: float


def make_tasks(key: jax.Array, options: ContinualOptions, overlap: Any) -> Tasks:
    """Subspaces with `overlap` in the first `rank` directions of a random basis, and random targets."""
    n, rank = options.tasks, options.rank
    basis_key, target_key = jax.random.split(key)
    inputs = (n + 1) * rank  # a block for all and one for each
    blocks_NKR = jnp.split(jax.random.orthogonal(basis_key, inputs), n + 1, axis=1)
    shared, own = blocks_NKR[0], jnp.stack(blocks_NKR[1:])
    bases_NKR = overlap * shared[None] + jnp.sqrt(1 - overlap**2) * own
    return Tasks(bases_NKR, jax.random.normal(target_key, (n, inputs, options.outputs)))


def losses(w_KV: jax.Array, tasks: Tasks) -> jax.Array:
    """[N]: the expected loss of every task, 1 at a matrix of zeros."""

    def size(matrices_NKV: jax.Array) -> jax.Array:
        return (jnp.einsum("nkr,nkv->nrv", tasks.bases_NKR, matrices_NKV) ** 2).sum(axis=(1, 2))

    return size(w_KV[None] - tasks.targets_NKV) / size(tasks.targets_NKV)


def learn(
    tx: optax.GradientTransformation,
    boundary: Callable[..., Any],
    key: jax.Array,
    options: ContinualOptions,
    overlap: Any,
) -> jax.Array:
    """[N, steps, N] losses of all tasks (last axis) after every step on every task.

    Args:
      tx: the rule.
      boundary: `carry_momentum` or `reset_momentum`, called before every task; before the first it changes nothing.
      key: of the tasks and the examples.
      options: sizes.
      overlap: length of the shared part, a number or a traced one.
    """
    task_key, data_key = jax.random.split(key)
    tasks = make_tasks(task_key, options, overlap)
    params = {"w": jnp.zeros(tasks.targets_NKV.shape[1:])}

    def step(carry: Any, at: tuple[jax.Array, jax.Array, Tasks]) -> tuple[Any, jax.Array]:
        (params, state), (key, progress, one) = carry, at
        x_BK = jax.random.normal(key, (options.batch_size, options.rank)) @ one.bases_NKR.T

        def loss(params: Any) -> jax.Array:
            return 0.5 * ((x_BK @ (params["w"] - one.targets_NKV)) ** 2).sum() / options.batch_size

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = jax.tree.map(lambda p, u: p + (1 - progress) * u, params, updates)
        return (params, state), losses(params["w"], tasks)

    def task(carry: Any, at: tuple[jax.Array, Tasks]) -> tuple[Any, jax.Array]:
        (params, state), (key, one) = carry, at
        state = boundary(tx, state, params)
        keys, progress = jax.random.split(key, options.steps), jnp.arange(options.steps) / options.steps
        return jax.lax.scan(lambda c, a: step(c, (*a, one)), (params, state), (keys, progress))

    keys = jax.random.split(data_key, options.tasks)
    return jax.lax.scan(task, (params, tx.init(params)), (keys, tasks))[1]


def best_of_grid(rule: Rule, boundary: Callable[..., Any], options: ContinualOptions) -> dict[str, Result]:
    """Runs both sequences with every learning rate and seed at once; of each sequence the rate that ends lowest."""

    def one(overlap: jax.Array, rate: jax.Array, key: jax.Array) -> jax.Array:
        return learn(rule(rate), boundary, key, options, overlap)

    seeds = jax.vmap(one, in_axes=(None, None, 0))
    rates = jax.vmap(seeds, in_axes=(None, 0, None))
    keys = jax.random.split(jax.random.key(0), options.seeds)
    overlaps = jnp.array([0.0, options.overlap])
    found = np.asarray(jax.jit(jax.vmap(rates, in_axes=(0, None, None)))(overlaps, jnp.array(RATES), keys))
    return {name: _best(losses) for name, losses in zip(SEQUENCES, found, strict=True)}


def _best(losses_LSNTN: np.ndarray) -> Result:
    """Of [rates, seeds, N, steps, N]."""
    end = np.nan_to_num(losses_LSNTN[:, :, -1, -1].mean(axis=(1, 2)), nan=np.inf)
    return summary(losses_LSNTN[end.argmin()], RATES[end.argmin()])


def summary(losses_SNTN: np.ndarray, learning_rate: float) -> Result:
    """What a table says about the runs of one rule."""
    after = losses_SNTN[:, :, -1]  # [seeds, after task, of task]
    just_learned = np.diagonal(after, axis1=1, axis2=2)
    rise = after[:, -1, :-1] - just_learned[:, :-1]
    first = losses_SNTN[..., 0].reshape(len(losses_SNTN), -1).mean(axis=0)
    return Result(just_learned.mean(axis=1), rise.mean(axis=1), after[:, -1].mean(axis=1), first, learning_rate)


def run(options: ContinualOptions, console: Console) -> tuple[Path, dict[tuple[str, str, str], Result]]:
    """Prints the table.

    Returns:
      The path of the picture and, by sequence, rule and boundary, the results.
    """
    results: dict[tuple[str, str, str], Result] = {}
    names = [(rule, way) for rule in options.rules for way in BOUNDARIES if rule != "sgd" or way == "carry"]
    for rule, way in track(names, description="rules", console=console, transient=True):
        for sequence, found in best_of_grid(RULES[rule], BOUNDARIES[way], options).items():
            results[sequence, rule, way] = found
    for sequence in SEQUENCES:
        table = Table("rule", "learned", "forgotten", "end", "rate", title=f"{sequence} tasks")
        for rule, way in names:
            found = results[sequence, rule, way]
            spread = [f"{x.mean():.3f}±{x.std(ddof=1):.3f}" for x in (found.learned, found.forgotten, found.end)]
            table.add_row(_label(rule, way), *spread, f"{found.learning_rate:.2g}")
        console.print(table)
    return draw(results, options), results


def _label(rule: str, way: str) -> str:
    return rule if rule == "sgd" else f"{rule}, {way}"


def draw(results: dict[tuple[str, str, str], Result], options: ContinualOptions) -> Path:
    """The first task's loss over all steps, a panel per sequence, one line per rule and boundary."""
    from matplotlib import colormaps

    figure, panels = figure_of(2, width=8)
    for axes, sequence in zip(panels, SEQUENCES, strict=True):
        for (name, rule, way), found in results.items():
            if name == sequence:
                color = colormaps["tab20"](list(RULES).index(rule))
                style = "-" if way == "carry" else ":"
                axes.plot(found.first_task, style, color=color, linewidth=1, label=_label(rule, way))
        for task in range(1, options.tasks):
            axes.axvline(task * options.steps, color="grey", linewidth=0.5)
        axes.set(
            title=f"{sequence} tasks", xlabel="step", ylabel="loss of the first task", yscale="log", ylim=(1e-4, 3)
        )
    panels[-1].legend(fontsize=5, ncols=2)
    return save(figure, options.out / "continual_momentum.png")


if __name__ == "__main__":
    run_script(ContinualOptions, TINY, lambda *given: run(*given)[0])
