"""One pass over tasks that come once, a test after each, and what an accuracy matrix says."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.classifiers import Learner, filled
from experiments.intents import Examples
from experiments.options import Options
from experiments.published import TASK
from experiments.training import Scores, Trained


class Stream(NamedTuple):
    """A data set as it is met."""

    tasks: list[Examples]
    tests: list[Examples]
    classes: int


def learn(learner: Learner, stream: Stream, cell: Options, report: Callable[[int, Scores], None]) -> Trained:
    """One pass over the tasks; after each, a test on every task so far (with one task, on every task).

    Args:
      learner: a method.
      stream: its tasks and their tests.
      cell: batch size and seed.
      report: is told the steps and the scores after each task.
    """
    rng = np.random.default_rng(cell.seeds[0])
    state, step, times = learner.init(), 0, []
    rows, curve = [], []
    for number, task in enumerate(stream.tasks, 1):
        task = task.rows(rng.permutation(task.size))
        for batch in filled(task, cell.batch_size):
            began = time.perf_counter(), time.process_time()
            state, value = learner.read(state, batch)
            times.append((time.perf_counter() - began[0], time.process_time() - began[1]))
            step += 1
            if not math.isfinite(value):
                return _trained_of(state, curve, times, f"not finite at step {step}: loss {value:g}")
        state = learner.finish(state, task)
        tested = stream.tests if len(stream.tasks) == 1 else stream.tests[:number]
        rows.append([accuracy(learner, state, test, cell.batch_size) for test in tested])
        scores = {f"{TASK}{i}": share for i, share in enumerate(rows[-1], 1)}
        if number == len(stream.tasks):
            scores = summary(rows) | scores
        curve.append((step, scores))
        report(*curve[-1])
    return _trained_of(state, curve, times, None)


def _trained_of(state: Any, curve: list[tuple[int, Scores]], times: list[Any], failed: str | None) -> Trained:
    seconds, cpu_seconds = (sum(column[1:]) for column in zip(*times, strict=True))
    return Trained(state, len(times), curve, seconds, cpu_seconds, times[0][0], None, failed)


def accuracy(learner: Learner, state: Any, test: Examples, batch_size: int) -> float:
    """The share of a task's test examples whose class is predicted."""
    right = 0.0
    for batch in filled(test, batch_size):
        right += float(((learner.predict(state, batch) == batch.labels_N) * batch.weights_N).sum())
    return right / test.size


def summary(rows: Sequence[Sequence[float]]) -> Scores:
    """Final accuracy and forgetting of an accuracy matrix, row i after task i, on tasks 0 to i.

    A matrix of one row, of all tasks at once, has forgotten nothing and has no such score.

    >>> summary([[1.0], [0.5, 1.0], [0.75, 0.5, 1.0]])
    {'accuracy': 0.75, 'forgetting': 0.375}
    """
    last = rows[-1]
    scores = {"accuracy": float(np.mean(last))}
    if len(rows) > 1:
        best = [max(row[task] for row in rows[task:]) for task in range(len(last) - 1)]
        scores["forgetting"] = float(np.mean(np.subtract(best, last[:-1])))
    return scores
