"""What the records of a run say besides its losses: speed, utilisation, memory and goodput, and the levels."""

import math

from hope_jax.training.config import TrainConfig
from hope_jax.training.goodput import Clock
from hope_jax.training.memory import memory_bytes
from hope_jax.training.step import Metrics, bits
from hope_jax.training.timing import StepTimes

# Which of a level's numbers a record has: "level_0/update_norm", ...
UPDATE_NORM, WAITED, DISTANCE = "update_norm", "steps_since_update", "distance"
GRADIENT_RATIO = "gradient_ratio"  # |gradient| / |parameters|


class Telemetry:
    """Turns what a step left on the device into a record.

    Args:
      config: of the run.
      clock: of this process.
      seconds_at_peak: the least time of a step (see `utilisation.py`), None if not known.
      bytes_per_token: of the training text.
    """

    def __init__(self, config: TrainConfig, clock: Clock, seconds_at_peak: float | None, bytes_per_token: float = 1.0):
        self._bytes_per_token = bytes_per_token
        self.clock, self.times = clock, StepTimes()
        self._prefixes = bool(config.matryoshka)  # the loss is then a sum over several heads, no bits of the text
        self._tokens, self._seconds_at_peak = config.batch_size * config.seq_len, seconds_at_peak

    @property
    def tokens_per_second(self) -> float | None:
        """Of the latest steps alone, over all devices; None before the third step."""
        return self._tokens / self.times.mean if self.times.mean else None

    @property
    def mfu(self) -> float | None:
        """The median step's share of the peak, None if that is not known."""
        known = self._seconds_at_peak and self.times.median
        return self._seconds_at_peak / self.times.median if known else None  # type: ignore[operator]

    def of_step(self, metrics: Metrics) -> dict[str, float]:
        """The record of a step.

        Args:
          metrics: on the host.
        """
        loss = float(metrics.loss)
        record = {
            "loss": loss,
            "grad_norm": float(metrics.grad_norm),
            "update_norm": float(metrics.update_norm),
            "params_norm": float(metrics.params_norm),
            "learning_rate": float(metrics.learning_rate),
        }
        if not self._prefixes:
            record["bits_per_byte"] = bits(loss) / self._bytes_per_token
        for level, norm in metrics.level_update_norm.items():
            record[f"{level}/{UPDATE_NORM}"] = float(norm)
            record[f"{level}/{WAITED}"] = int(metrics.level_waited[level])
            record[f"{level}/{GRADIENT_RATIO}"] = float(metrics.level_gradient_ratio[level])
        return record | self.of_machine()

    def of_evaluation(self, bpb: float, distances: dict[str, float]) -> dict[str, float]:
        """The record of an evaluation; the distances of the levels are from the start of the run."""
        record = {"validation_bits_per_byte": bpb}
        record |= {f"{level}/{DISTANCE}": float(distance) for level, distance in distances.items()}
        return record | {"seconds": self.clock.machine_seconds}

    def of_machine(self) -> dict[str, float]:
        """What depends on the machine and the clock (`metrics.TIMED`)."""
        known = {
            "tokens_per_second": self.tokens_per_second,
            "step_seconds": self.times.median,
            "step_seconds_p95": self.times.quantile(0.95),
            "mfu": self.mfu,
            "goodput": self.clock.summary().goodput,
            "seconds": self.clock.machine_seconds,
            **memory_bytes(),
        }
        return {name: value for name, value in known.items() if value is not None}


def finite(metrics: Metrics) -> bool:
    """Whether loss, gradient and parameters are numbers. The loss is of the parameters before the step."""
    return all(math.isfinite(float(value)) for value in (metrics.loss, metrics.grad_norm, metrics.params_norm))
