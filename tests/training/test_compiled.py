"""What a compiled step takes and says, on virtual devices."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from hope_jax.cli import main
from hope_jax.models import ModelConfig
from hope_jax.training.compiled import bytes_per_device, collectives, compile_step
from hope_jax.training.config import MeshConfig, TrainConfig
from hope_jax.training.step import build_program

HLO = """
  %a = f32[8,4]{1,0} all-gather(%x), metadata={op_name="jit(step)/jit(main)/while/body/dot_general"}
  %b = (bf16[2]{0}, bf16[16]{0}) all-gather-start(%y), metadata={op_name="jit(step)/add"}
  %c = (f32[2]{0}, f32[3]{0}) all-reduce(%y, %z)
  %e = (f32[100]{0}, f32[3]{0}) all-reduce-start(%y, %z)
  %f = (f32[1024]{0}, f32[1024]{0}, u32[], u32[]) collective-permute-start(%y)
  %g = ((f32[2]{0}, f32[3]{0}), (f32[16]{0}, f32[24]{0})) all-gather-start(%y, %z)
  %d = f32[9]{0} add(%y, %z), metadata={op_name="all-gather"}
"""


def test_collectives_are_read_from_the_program():
    gathers, reduces, permutes = collectives(HLO)
    assert (gathers.kind, gathers.calls, gathers.in_loops) == ("all-gather", 3, 1)
    assert gathers.bytes == 8 * 4 * 4 + 16 * 2 + 4 * (16 + 24)
    assert (reduces.kind, reduces.calls, reduces.bytes) == ("all-reduce", 2, 4 * 5 + 4 * 103)
    assert (permutes.kind, permutes.calls, permutes.bytes) == ("collective-permute", 1, 4 * 1024)


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


@pytest.mark.slow
def test_the_work_of_memories_is_divided():
    """Tokens and heads over four devices: the operations of a device are a fraction of those of one alone."""
    model = ModelConfig(name="hope", dim=32, layers=1, heads=4, memory_hidden=8, cms_hidden=(32, 32))
    alone = TrainConfig(model=model, batch_size=1, seq_len=32)

    def flops(config):
        program = build_program(config)
        tokens = jax.ShapeDtypeStruct((1, 33), jnp.uint8, sharding=program.batch_sharding)
        return program.train_step.lower(program.abstract_state, tokens).compile().cost_analysis()["flops"]

    divided = dataclasses.replace(alone, mesh=MeshConfig(sequence=4))
    assert flops(divided) < 0.5 * flops(alone)


@pytest.mark.slow
@pytest.mark.parametrize("documents", ["reset", "carry", "carry_reset"])
def test_steps_on_documents_compile(small, documents):
    config = dataclasses.replace(
        small, model=dataclasses.replace(small.model, name="delta_net"), documents=documents, mesh=MeshConfig(data=2)
    )
    assert compile_step(config).batch > compile_step(dataclasses.replace(config, documents="ignore")).batch


def test_the_command_prints_tables_or_json(capsys):
    words = ["shard-report", "smoke", "model=transformer", "--mesh", "fsdp=2"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "fsdp=2" in printed and "optimizer and level states" in printed and "all-reduce" in printed
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["devices"] == "2 x cpu" and "all-reduce" in {call["kind"] for call in found["collectives"]}
