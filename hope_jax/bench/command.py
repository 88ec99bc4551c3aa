"""`hope bench kernels`: what to measure, measuring it, and showing it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console

from hope_jax.bench import plots
from hope_jax.bench.records import Run, caution, read_run, run_of, times_faster, write_run
from hope_jax.bench.report import chip_line, legend, measured_table, static_table
from hope_jax.training.errors import UserError
from hope_jax.training.overrides import one_line, unknown
from hope_kernels.benchmarking import machine_line
from hope_kernels.chips import Chip, detect
from hope_kernels.delta_rule import bench as delta_rule_bench
from hope_kernels.dplr_delta_rule import bench as dplr_bench
from hope_kernels.measuring import MODES, Measurement, Mode, Op, measure
from hope_kernels.mlp_memory import bench as mlp_memory_bench

OPS: dict[str, Op] = {op.name: op for op in (delta_rule_bench.OP, dplr_bench.OP, mlp_memory_bench.OP)}
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
WIDTHS = (32, 64, 128, 256)
TILES = (16, 32, 64, 128)


class Request(NamedTuple):
    """The options of the command; empty or None where the user said nothing."""

    ops: Sequence[str] = ()
    shapes: Sequence[str] = ()
    implementations: Sequence[str] = ()
    modes: Sequence[str] = ()
    block_t: int | None = None
    repeats: int = 21
    json: Path | None = None
    compare: Path | None = None
    plot: Path | None = None
    static: str | None = None
    listing: bool = False


class Work(NamedTuple):
    """One shape and the implementations to time on it."""

    op: Op
    shape: str
    implementations: tuple[str, ...]


def run(request: Request, command: str = "hope bench kernels", console: Console | None = None) -> Run | None:
    """Measures, prints, and writes what was asked for.

    Returns:
      The run; None if nothing was measured (a listing, or static figures).
    Raises:
      UserError: an unknown name, an implementation that cannot do what was asked, a file that cannot be used.
    """
    console = console or _console()
    ops = [_find("operation", name, OPS) for name in request.ops] or list(OPS.values())
    if request.listing:
        _list(ops, console)
        return None
    if request.static is not None:
        _static(ops, request, console)
        return None
    if request.repeats < 1 or (request.block_t is not None and request.block_t < 1):
        raise UserError(f"--repeats and --block-t are at least 1; got {request.repeats} and {request.block_t}")
    former = None if request.compare is None else read_run(request.compare)
    known_modes: dict[str, Mode] = {mode: mode for mode in MODES}
    modes: list[Mode] = [_find("mode", name, known_modes) for name in request.modes] or list(MODES)
    work = _plan(ops, request)
    chip = detect(sorted({w.op.specs[w.shape].dtype for w in work}))
    console.print(machine_line(), chip_line(chip), sep="\n", markup=False)
    rows = [row for item in work for mode in modes for row in _measure(item, mode, chip, request, console)]
    result = run_of(rows, chip, command)
    _show(result, former, request, console)
    if request.plot is not None:
        _plot(work[0], modes[-1], result, request, console)
    return result


def _console() -> Console:
    console = Console(highlight=False, emoji=False)
    return console if console.is_terminal else Console(highlight=False, emoji=False, width=220)


def _find[T](what: str, name: str, known: dict[str, T]) -> T:
    if name not in known:
        raise UserError(unknown(what, name, list(known)))
    return known[name]


def _plan(ops: Sequence[Op], request: Request) -> list[Work]:
    """The named shapes of the operations that have them, or the defaults of this machine."""
    platform = jax.devices()[0].platform
    shapes = {shape: shape for op in ops for shape in op.specs}
    names = {name: name for op in ops for name in op.implementations}
    for shape in request.shapes:
        _find("shape", shape, shapes)
    for name in request.implementations:
        _find("implementation", name, names)
    work = []
    for op in ops:
        for shape in request.shapes or op.defaults(platform):
            asked = [name for name in request.implementations if name in op.implementations]
            if shape in op.specs and (asked or not request.implementations):
                work.append(Work(op, shape, _able(op, shape, asked)))
    if not work:
        there = "; ".join(f"{op.name} has {', '.join(op.implementations)}" for op in ops)
        raise UserError(f"no such measurement: nothing implements {', '.join(request.implementations)} here ({there})")
    return work


def _able(op: Op, shape: str, asked: Sequence[str]) -> tuple[str, ...]:
    """The implementations asked for, or those that can do it without the token loop."""
    spec = op.specs[shape]
    if not asked:
        return tuple(name for name in op.implementations if name != "reference" and op.reason(name, spec) is None)
    for name in asked:
        reason = op.reason(name, spec)
        if reason is not None:
            raise UserError(f"{name} cannot run {op.name} on {shape}: {reason}{_remedy(op, name)}")
    return tuple(asked)


def _remedy(op: Op, name: str) -> str:
    if name == "pallas_tpu" and op.static is not None:
        return "; --static v6e shows what the TPU compiler makes of it"
    return ""


def _measure(
    work: Work, mode: Mode, chip: Chip | None, request: Request, console: Console, **changes: Any
) -> list[Measurement]:
    options = {"block_t": request.block_t, "repeats": request.repeats, **changes}
    with console.status(f"{work.op.name} {work.shape} {mode}"):
        try:
            return measure(work.op, work.shape, mode, work.implementations, chip, **options)
        except (ValueError, NotImplementedError) as error:  # a tile that does not fit, say
            raise UserError(f"{work.op.name} {work.shape}: {one_line(error)}") from error


def _show(result: Run, former: Run | None, request: Request, console: Console) -> None:
    faster = None if former is None else times_faster(result, former)
    console.print(measured_table(result.measurements, faster))
    console.print(legend(result.measurements), markup=False, soft_wrap=True)
    if result.load is not None:
        console.print(f"load average at the end: {result.load:.1f}", markup=False)
    if former is not None:
        warning = caution(result, former)
        console.print(f"than then: {request.compare}, {former.command}", markup=False, soft_wrap=True)
        if warning:
            console.print(warning, markup=False, soft_wrap=True)
        if not faster:
            console.print(f"{request.compare} has none of these rows", markup=False)
    if request.json is not None:
        write_run(request.json, result)
        console.print(f"wrote {request.json}", markup=False)


def _plot(work: Work, mode: Mode, result: Run, request: Request, console: Console) -> None:
    """Sweeps around the first shape, and the picture."""
    assert request.plot is not None
    op, spec = work.op, work.op.specs[work.shape]
    lengths = [max(spec.tokens * factor // 4, 1) for factor in (1, 2, 4, 8)]
    trials = {
        "T": [(tokens, op.resize(spec, tokens, None), request.block_t) for tokens in dict.fromkeys(lengths)],
        "K = V": [(width, op.resize(spec, None, width), request.block_t) for width in WIDTHS],
        "tokens per tile": [(tile, spec, tile) for tile in TILES if spec.tokens % tile == 0],
    }
    trials["tokens per tile"] = trials["tokens per tile"] or [(spec.tokens, spec, None)]
    sweeps: dict[str, list[tuple[int, Measurement]]] = {}
    for label, points in trials.items():
        sweeps[label] = []
        for value, changed, block_t in points:
            able = tuple(n for n in work.implementations if op.reason(n, changed) is None)
            if not able:
                continue
            trial = Work(op, f"{work.shape}, {label} = {value}", able)
            repeats = min(request.repeats, 9)
            rows = _measure(trial, mode, result.chip, request, console, spec=changed, block_t=block_t, repeats=repeats)
            sweeps[label] += [(value, row) for row in rows]
    try:
        plots.save(request.plot, sweeps, result.measurements, result.chip)
    except OSError as error:
        raise UserError(f"cannot write {request.plot}: {error.strerror}") from error
    console.print(f"wrote {request.plot}: {work.shape} by T, K and tile, and the roofline", markup=False)


def _static(ops: Sequence[Op], request: Request, console: Console) -> None:
    assert request.static is not None
    topology = _find("chip", request.static, TOPOLOGIES)
    given = {
        "--shape": request.shapes,
        "--impl": request.implementations,
        "--mode": request.modes,
        "--block-t": request.block_t,
        "--json": request.json,
        "--compare": request.compare,
        "--plot": request.plot,
    }
    extra = [flag for flag, value in given.items() if value]
    if extra:
        raise UserError(f"--static reads the schedule of one fixed shape; leave out {', '.join(extra)}")
    able = [op for op in ops if op.static is not None]
    if not able:
        raise UserError(f"{', '.join(op.name for op in ops)} has no kernel for TPUs yet")
    for op in able:
        assert op.static is not None
        with console.status(f"compiling {op.name} for {request.static}, a minute or more"):
            try:
                rows = op.static(topology)
            except RuntimeError as error:
                raise UserError(f"{op.name} for {request.static}: {one_line(error)[:400]}") from error
        console.print(f"{op.name} on {request.static}: STATIC, nothing was run", markup=False)
        console.print(static_table(rows))
    console.print(
        "Per token and head, of B1 T512 H16 K=V=128 in bfloat16, one core. static ns: the compiler's instructions at "
        "the chip's clock, without waiting: a lower bound of the time. bound ns: arithmetic or memory, the larger.",
        markup=False,
        soft_wrap=True,
    )


def _list(ops: Sequence[Op], console: Console) -> None:
    platform = jax.devices()[0].platform
    for op in ops:
        console.print(f"{op.name}: implementations {', '.join(op.implementations)}", markup=False)
        for name, spec in op.specs.items():
            mark = "*" if name in op.defaults(platform) else " "
            said = ", ".join(f"{field} {value}" for field, value in spec._asdict().items() if value is not None)
            console.print(f"  {mark} {name:<24}{said}", markup=False, soft_wrap=True)
    console.print(f"*: measured on a {platform} where no --shape is given", markup=False)
