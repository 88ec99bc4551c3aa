"""`hope bench kernels`: the table, the file, the comparison, the picture, and every mistake as one line."""

import json

import pytest

from hope_jax.bench import plots
from hope_jax.bench.command import Request, run
from hope_jax.bench.records import read_run, times_faster, write_run
from hope_jax.bench.report import chip_line, legend, measured_table
from hope_jax.cli import main
from hope_kernels.benchmarking import machine_line
from hope_kernels.chips import Chip
from hope_kernels.measuring import Measurement, StaticRow

ROW = Measurement(
    op="delta_rule",
    shape="some",
    mode="forward",
    implementation="xla",
    chosen=True,
    seconds=0.002,
    fastest=0.001,
    spread=0.05,
    repeats=9,
    clock="host",
    compile_seconds=1.5,
    memory=3 * 2**20,
    tokens=1000,
    token_heads=4000,
    flops=2e8,
    bytes=1e6,
    compute_seconds=0.0005,
    memory_seconds=0.0001,
)
BASE = ROW._replace(implementation="straightforward", chosen=False, seconds=0.005, clock="profiler")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """One run on a tiny shape, as the command line makes it: the files, and what was printed."""
    folder = tmp_path_factory.mktemp("bench")
    words = ["bench", "kernels", "--shape", "one_token", "--repeats", "2", "--mode", "forward"]
    assert main([*words, "--json", str(folder / "run.json")]) == 0
    return folder / "run.json"


def printed(table):
    from rich.console import Console

    console = Console(width=220)
    with console.capture() as capture:
        console.print(table)
    return [line.split() for line in capture.get().splitlines() if line.strip()]


def test_table():
    lines = printed(measured_table([ROW, BASE]))
    xla, base = (next(line for line in lines if name in line) for name in ("xla", "straightforward"))
    assert xla[:6] == ["some", "forward", "xla", "*", "2.000", "±5%"]
    # 2 ms / 4,000; 1,000 / 2 ms; 2e8 / 2 ms; 0.5 and 0.1 of 2 ms
    assert xla[6:] == ["500.00", "500,000", "100.0", "25.0", "5.0", "3.0", "1.5", "2.50"]
    assert base[-1] == "base"
    compared = printed(measured_table([ROW, BASE], {ROW.key: 1.25}))
    assert next(line for line in compared if "xla" in line)[-1] == "1.25"


def test_what_is_not_known_stays_empty():
    row = ROW._replace(compute_seconds=None, memory_seconds=None, memory=None, compile_seconds=None)
    line = next(line for line in printed(measured_table([row])) if "xla" in line)
    assert line[6:] == ["500.00", "500,000", "100.0"]
    assert "no percentages" in chip_line(None)


def test_the_legend_names_the_clocks():
    assert "host's clock" in legend([ROW]) and "profiler" not in legend([ROW])
    assert "profiler trace" in legend([ROW, BASE])
    assert "published" in chip_line(Chip("TPU", {"bfloat16": 1e12}, 1e12))


def test_measured_and_written(measured):
    record = json.loads(measured.read_text())
    assert record["machine"] == machine_line()
    assert "--shape one_token" in record["command"]
    assert {row["implementation"] for row in record["measurements"]} == {"xla", "straightforward"}
    again = read_run(measured)
    write_run(measured.with_name("copy.json"), again)
    assert read_run(measured.with_name("copy.json")) == again


def test_compare(measured, capsys):
    former = read_run(measured)
    slower = former._replace(measurements=[row._replace(seconds=row.seconds * 2) for row in former.measurements])
    assert set(times_faster(former, slower).values()) == {2.0}
    write_run(measured.with_name("elsewhere.json"), slower._replace(machine="another machine"))
    words = ["bench", "kernels", "--shape", "one_token", "--repeats", "1", "--mode", "forward", "--impl", "xla"]
    assert main([*words, "--compare", str(measured)]) == 0
    out = capsys.readouterr().out
    assert "than then" in out and "machines differ" not in out
    assert main([*words, "--compare", str(measured.with_name("elsewhere.json"))]) == 0
    assert "machines differ, so the ratios compare them too: then another machine" in capsys.readouterr().out
    words[words.index("xla")] = "reference"
    assert main([*words, "--compare", str(measured)]) == 0
    assert "has none of these rows" in capsys.readouterr().out


def test_picture(tmp_path):
    chip = Chip("chip", {"float32": 1e11, "bfloat16": 4e11}, 1e10)
    sweeps = {"T": [(8, ROW), (16, BASE)], "K = V": [(64, ROW)], "tokens per tile": [(16, ROW)]}
    figure = plots.figure(sweeps, [ROW, BASE], chip)
    assert [axes.get_xlabel() for axes in figure.axes] == ["T", "K = V", "tokens per tile", "FLOP / byte"]
    x, y = figure.axes[0].lines[0].get_data()
    assert (list(x), list(y)) == ([8], [2.0])
    path = tmp_path / "new" / "picture.png"
    plots.save(path, sweeps, [ROW, BASE], None)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.slow
def test_sweeps_around_the_first_shape(tmp_path, capsys):
    path = tmp_path / "kernels.png"
    words = ["--shape", "one_token", "--impl", "xla", "--mode", "forward", "--repeats", "1", "--plot", str(path)]
    assert main(["bench", "kernels", *words]) == 0
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert f"wrote {path}" in capsys.readouterr().out


def test_list(capsys):
    assert main(["bench", "kernels", "--list"]) == 0
    out = capsys.readouterr().out
    assert "delta_rule: implementations" in out and "* short" in out and "hope_1300m_chunk" in out
    assert "dplr_delta_rule: implementations" in out and "* rwkv7_short" in out
    assert "mlp_memory: implementations" in out and "* titans_layer" in out and "hope_1300m_memory" in out


def test_an_operation_takes_part_with_the_implementations_it_has():
    from hope_jax.bench.command import OPS, _plan

    def planned(**request):
        return {
            (work.op.name, work.shape, work.implementations) for work in _plan(list(OPS.values()), Request(**request))
        }

    assert planned(implementations=["straightforward"], shapes=["short", "titans_layer"]) == {
        ("delta_rule", "short", ("straightforward",)),
        ("mlp_memory", "titans_layer", ("straightforward",)),
    }
    names = [name for op in OPS.values() for name in op.specs]
    assert len(names) == len(set(names))  # so that a shape names its operation


def test_help_shows_how_to_start(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    out = capsys.readouterr().out
    assert "hope bench kernels --static v6e" in out and "--compare FILE" in out


def test_static_figures_are_labelled(monkeypatch, capsys):
    """The compiler is not asked here; its figures are tested with the kernels."""
    from hope_jax.bench import command

    asked = []

    def static(topology):
        asked.append(topology)
        return [StaticRow("forward", 3.5, 0.25, 2.0, 0.625)]

    monkeypatch.setitem(command.OPS, "delta_rule", command.OPS["delta_rule"]._replace(static=static))
    assert main(["bench", "kernels", "--op", "delta_rule", "--static", "v6e"]) == 0
    out = capsys.readouterr().out
    assert asked == ["v6e:2x2"]
    assert "STATIC, nothing was run" in out
    assert next(line.split() for line in out.splitlines() if "3.500" in line) == [
        *("│", "forward", "│", "3.500", "│", "0.250", "│", "2.000", "│", "0.625", "│")
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--op", "delta"], "unknown operation 'delta'; did you mean 'delta_rule'? there are: delta_rule"),
        (["--shape", "shrot"], "unknown shape 'shrot'; did you mean 'short'? there are: short, layer"),
        (["--impl", "xl"], "unknown implementation 'xl'; did you mean 'xla'? there are: "),
        (["--mode", "backward"], "unknown mode 'backward'; did you mean 'forward'?"),
        (["--op", "mlp_memory", "--impl", "pallas_tpu"], "unknown implementation 'pallas_tpu'"),
        (["--op", "mlp_memory", "--static", "v6e"], "mlp_memory has no kernel for TPUs yet"),
        (["--shape", "titans_layer", "--impl", "pallas_tpu"], "nothing implements pallas_tpu here"),
        (["--static", "v7"], "unknown chip 'v7'"),
        (["--static", "v6e", "--shape", "short"], "leave out --shape"),
        (["--shape", "layer_momentum", "--impl", "straightforward"], "it is written for erase and decay"),
        (["--shape", "short", "--impl", "pallas_tpu"], "needs a TPU"),
        (["--shape", "short", "--compare", "/nowhere/run.json"], "cannot read /nowhere/run.json"),
        (["--shape", "short", "--compare", __file__], "is not a run of this benchmark"),
        (["--repeats", "0"], "at least 1"),
        (["--shapes", "short"], "did you mean --shape?"),
        (["--shape", "short", "--block-t", "100", "--impl", "straightforward"], "chunk must divide the tokens"),
    ],
)
def test_mistakes(capsys, words, message):
    assert main(["bench", "kernels", *words]) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("hope: ") and err.count("\n") == 1


def test_a_file_that_cannot_be_written(tmp_path, capsys):
    request = Request(shapes=["one_token"], implementations=["xla"], modes=["forward"], repeats=1)
    assert run(request) is not None
    blocked = tmp_path / "file"
    blocked.write_text("")
    words = ["--shape", "one_token", "--impl", "xla", "--mode", "forward", "--repeats", "1"]
    assert main(["bench", "kernels", *words, "--json", str(blocked / "run.json")]) == 2
    assert "cannot write" in capsys.readouterr().err
