"""What a compiled step takes and says, on virtual devices."""

import dataclasses
import json

import jax
import pytest

from hope_jax.cli import main
from hope_jax.training.compiled import bytes_per_device, collectives, compile_step
from hope_jax.training.config import MeshConfig
from hope_jax.training.step import build_program

HLO = """
  %a = f32[8,4]{1,0} all-gather(%x), metadata={op_name="jit(step)/jit(main)/while/body/dot_general"}
  %b = (bf16[2]{0}, bf16[16]{0}) all-gather-start(%y), metadata={op_name="jit(step)/add"}
  %c = (f32[2]{0}, f32[3]{0}) all-reduce(%y, %z)
  %d = f32[9]{0} add(%y, %z), metadata={op_name="all-gather"}
"""


def test_collectives_are_read_from_the_program():
    gathers, reduces = collectives(HLO)
    assert (gathers.kind, gathers.calls, gathers.in_loops, gathers.bytes) == ("all-gather", 2, 1, 8 * 4 * 4 + 16 * 2)
    assert gathers.largest.startswith("f32[8,4]")
    assert (reduces.kind, reduces.calls, reduces.bytes) == ("all-reduce", 1, 4 * 5)


@pytest.fixture(scope="module")
def on_four(small):
    return dataclasses.replace(small, mesh=MeshConfig(fsdp=2, tensor=2))


@pytest.fixture(scope="module")
def report(on_four):
    return compile_step(on_four)


def test_bytes_are_those_of_the_arrays_on_a_device(on_four, report):
    program = build_program(on_four)
    state = program.init()

    def held(tree):
        first = program.mesh.devices.flat[0]
        shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == first]
        return sum(s.data.nbytes for s in shards)

    assert (report.params, report.opt_state) == (held(state.params), held(state.opt_state))
    assert bytes_per_device(program.abstract_state.params) == report.params
    assert report.total >= report.params + report.opt_state + report.batch
    assert report.devices == "4 x cpu" and report.available is None
    assert report.collectives and report.temporary > 0


def test_recomputation_is_what_the_step_does_beyond_the_model(on_four, report):
    recomputed = dataclasses.replace(on_four, model=dataclasses.replace(on_four.model, remat="full"))
    found = compile_step(recomputed)
    assert found.model_flops == report.model_flops == report.step_flops < found.step_flops


def test_the_command_prints_tables_or_json(capsys):
    words = ["shard-report", "smoke", "model=transformer", "--mesh", "fsdp=2"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "fsdp=2" in printed and "optimizer and level states" in printed and "all-reduce" in printed
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["devices"] == "2 x cpu"
