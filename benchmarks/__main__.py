"""`python -m benchmarks [NAME ...] [--json FOLDER]`: tables with ratios, side by side in one process.

kernels         hope bench kernels: the delta rule against a straightforward chunked form (with --json also a picture)
nest            three levels in a nest, against a token scan with lax.cond and against optax.MultiSteps
titans          the MLP memory of Titans as one operation and in the nest, forward+backward
self_modifying  one self-modifying Titans layer, tokens per second
optimizers      a step of M3, Muon, AdaMuon and AdamW with 10M parameters; bytes of state per parameter
optimizers_100m the same with 100M parameters: up to half an hour on two cores
language_model  a training step of Hope against a Transformer with as many parameters; memory by length
pool            16 users of a pool against 16 sessions one after the other: reading with learning, and answering
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from benchmarks import language_model, nest, optimizers, pool, self_modifying, titans
from hope_jax.bench.command import Request, run
from hope_jax.models import ModelConfig
from hope_jax.training.presets import preset
from hope_kernels.benchmarking import Timing, machine_line, table, time_side_by_side, write_json


def run_nest() -> list[Timing]:
    programs, params = nest.cases()
    base = "token scan, lax.cond"
    return time_side_by_side(programs, params, case="nest 4/16/64, 4096 tokens", base=base, repeats=5)


def run_titans() -> list[Timing]:
    functions, args = titans.cases()
    for name, f in functions.items():
        program: Any = jax.jit(f).lower(args).compile()
        print(f"titans {name}: {program.memory_analysis().temp_size_in_bytes / 2**20:.1f} MiB of temporaries")
    return time_side_by_side(functions, args, case="titans, 512 tokens", base="nest", repeats=9)


def run_self_modifying() -> list[Timing]:
    forward, both, args = self_modifying.layer()
    functions = {"forward": forward, "forward+backward": both}
    timings = time_side_by_side(functions, args, case="self-modifying, 512 tokens", base="forward", repeats=7)
    for t in timings:
        print(f"{t.case} {t.implementation}: {512 / t.median:,.0f} tokens/s")
    return timings


def run_optimizers(name: str = "10M", size: int = 10_000_000, width: int = 512, repeats: int = 5) -> list[Timing]:
    functions, args, per_parameter = optimizers.cases(size, width)
    timings = time_side_by_side(functions, args, case=f"optimizer step, {name}", base="muon", repeats=repeats)
    seconds, ratio = optimizers.amortised(timings)
    print(f"m3, {name}, slow scale every {optimizers.PERIOD} steps: {seconds * 1e3:.1f} ms a step, {ratio:.2f}x muon")
    for rule, state in per_parameter.items():
        print(f"{rule}, {name}: {state:.1f} bytes of state per parameter")
    return timings


def run_language_model() -> list[Timing]:
    config = preset("tiny").model
    functions, tokens = language_model.steps(config)
    timings = time_side_by_side(functions, tokens, case="training step, 8 x 512", base="transformer", repeats=7)
    for t in timings:
        print(f"{t.case} {t.implementation}: {8 * 512 / t.median:,.0f} tokens/s")
    for length, size in language_model.backward_bytes(config, (256, 512, 1024, 2048)).items():
        per_token = size / length / 1024
        print(f"training step, 1 x {length}: {size / 2**20:.1f} MiB of temporaries, {per_token:.0f} KiB a token")
    return timings


def run_pool(
    config: ModelConfig | None = None, users: int = 16, read: int = 256, answered: int = 16, repeats: int = 5
) -> list[Timing]:
    config = config or replace(preset("tiny").model, cms_chunks=(32, 128), remat="none")
    reading, answering, texts, size = pool.cases(config, users, read, answered)
    print(f"pool: {size / 2**20:.2f} MiB of state per user")
    timings = []
    for functions, tokens, what in ((reading, read, "read"), (answering, answered, "answered")):
        case, options = f"{users} users, {tokens} tokens {what}", {"compiled": False, "repeats": repeats}
        new = time_side_by_side(functions, texts, case=case, base=pool.SESSIONS, **options)
        for t in new:
            print(f"{t.case}, {t.implementation}: {users * tokens / t.median:,.0f} tokens/s")
        timings += new
    return timings


def run_kernels(folder: Path | None) -> None:
    """What `hope bench kernels` does; it prints by itself."""
    request = Request() if folder is None else Request(json=folder / "kernels.json", plot=folder / "kernels.png")
    run(request, command="python -m benchmarks kernels")


KERNELS = "kernels"
RUNS = {
    "nest": run_nest,
    "titans": run_titans,
    "self_modifying": run_self_modifying,
    "optimizers": run_optimizers,
    "optimizers_100m": lambda: run_optimizers("100M", 100_000_000, repeats=3),
    "language_model": run_language_model,
    "pool": run_pool,
}
NAMES = (KERNELS, *RUNS)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=_Plain)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; default all")
    parser.add_argument("--json", type=Path, help="also write one file per benchmark into this folder")
    options = parser.parse_args()
    unknown = set(options.names) - set(NAMES)
    if unknown:
        parser.error(f"no benchmark named {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    print(machine_line())
    for name in options.names or NAMES:
        if name == KERNELS:
            run_kernels(options.json)
            continue
        timings = RUNS[name]()
        print(table(timings), end="\n\n", flush=True)
        if options.json:
            options.json.mkdir(parents=True, exist_ok=True)
            write_json(options.json / f"{name}.json", timings)


class _Plain(argparse.RawDescriptionHelpFormatter):
    """The description above, as it is."""


if __name__ == "__main__":
    main()
