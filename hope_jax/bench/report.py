"""The benchmark's tables."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table

from hope_kernels.chips import Chip
from hope_kernels.measuring import Measurement, StaticRow

# What a row's time is compared with: the first of these that was measured on the same shape and mode.
BASES = ("straightforward", "reference")


def bases(rows: Sequence[Measurement]) -> dict[tuple[str, str, str], Measurement]:
    """The row that the others of the same operation, shape and mode are compared with, where there is one."""
    found: dict[tuple[str, str, str], Measurement] = {}
    for name in BASES:
        for row in rows:
            if row.implementation == name:
                found.setdefault((row.op, row.shape, row.mode), row)
    return found


def measured_table(
    rows: Sequence[Measurement], former: Mapping[tuple[str, str, str, str], float] | None = None
) -> Table:
    """One line per measurement; with `former` also the ratio to another run, by key."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0))
    for name in ("shape", "mode", "implementation"):
        table.add_column(name, no_wrap=True)
    numbers = ["ms", "ns/token-head", "tokens/s", "GFLOP/s", "% flops", "% bytes", "MiB", "compile s", "times faster"]
    for name in [*numbers, "than then"] if former is not None else numbers:
        table.add_column(name, justify="right", no_wrap=True)
    compared = bases(rows)
    group = None
    for row in rows:
        if group is not None and group != (row.shape, row.mode):
            table.add_section()
        group = row.shape, row.mode
        cells = _cells(row, compared.get((row.op, row.shape, row.mode)))
        if former is not None:
            cells.append(f"{former[row.key]:.2f}" if row.key in former else "")
        table.add_row(*cells)
    return table


def _cells(row: Measurement, base: Measurement | None) -> list[str]:
    return [
        row.shape,
        row.mode,
        row.implementation + " *" * row.chosen,
        f"{row.seconds * 1e3:.3f} ±{row.spread * 100:.0f}%",
        f"{row.ns_per_token_head:,.2f}",
        f"{row.tokens_per_second:,.0f}",
        f"{row.flops_per_second / 1e9:,.1f}",
        _percent(row.of_compute),
        _percent(row.of_bandwidth),
        "" if row.memory is None else f"{row.memory / 2**20:,.1f}",
        "" if row.compile_seconds is None else f"{row.compile_seconds:.1f}",
        "" if base is None else "base" if base is row else f"{base.seconds / row.seconds:.2f}",
    ]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share * 100:.1f}"


def legend(rows: Sequence[Measurement]) -> str:
    """What the columns mean, in the words of this run."""
    clocks = {
        "host": "the host's clock around the call and the wait for its results",
        "profiler": "the device's busy time in a profiler trace of the call",
        "CUDA events": "CUDA events",
    }
    used = "; ".join(clocks[name] for name in dict.fromkeys(row.clock for row in rows))
    turns = max(row.repeats for row in rows)
    return (
        f"ms: median of up to {turns} turns ± half the distance of the quartiles; time: {used}. *: what "
        "implementation=None takes. times faster: than the base of the same shape and mode. GFLOP/s, % flops, % bytes: "
        "operations and bytes of the chunked form, whatever ran, against the bounds above (the caches allow more than "
        "100% of the bytes). MiB: arguments, results and temporaries."
    )


def chip_line(chip: Chip | None) -> str:
    """The bounds that the percentages refer to."""
    if chip is None:
        return "bounds: this device is in no table (hope_kernels/chips.py), so there are no percentages"
    rates = ", ".join(f"{rate / 1e12:.3g} TFLOP/s {dtype}" for dtype, rate in chip.flops.items())
    origin = "measured just now" if chip.measured else "published peaks"
    return f"bounds: {chip.name}, {rates}, {chip.bandwidth / 1e9:,.3g} GB/s ({origin})"


def static_table(rows: Sequence[StaticRow]) -> Table:
    """The compiler's figures, labelled as such."""
    table = Table(header_style="bold")
    table.add_column("kernel", no_wrap=True)
    for name in ("bundles", "spills", "static ns", "bound ns"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        numbers = (row.bundles, row.spills, row.nanoseconds, row.bound_nanoseconds)
        table.add_row(row.kernel, *(f"{x:.3f}" for x in numbers))
    return table
