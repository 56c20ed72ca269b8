"""The tensor parallel verification program, on one and two processes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from programs import tensor_parallel
from programs.tensor_parallel import DEFAULTS, mixed_lengths, parse

from samebit.recipes.models.tiny_model import write_config, write_weights
from samebit.trainer.megatron.forward import ForwardModel
from samebit.weight_sync.meeting import host_store, loopback_listener

SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}


SIZES = ("num_seqs=6", "max_len=96")


@pytest.fixture
def folder(tmp_path):
    """A small random model."""
    folder = tmp_path / "model"
    write_config(folder, "qwen3", **SHAPE, vocab_size=700, max_position_embeddings=256)
    write_weights(folder, seed=5, std=0.1)
    return folder


@pytest.fixture
def run_by_torch(folder, tmp_path):
    """run_by_torch(size, *options): the report of that many processes, started as users do."""

    def run(size, *options):
        out = tmp_path / f"by_torch_{size}.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
        program = [tensor_parallel.__file__, folder, out, *SIZES, *options]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "OMP_NUM_THREADS": "1",
        }
        job = subprocess.run(
            [sys.executable, "-P", *launcher, *program],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert job.returncode == 0, job.stderr
        return json.loads(out.read_text())

    return run


@pytest.fixture
def run(folder, run_together, tmp_path):
    """run(size, *options): the report of that many processes, which need not import anything."""

    def run(size, *options):
        out, store = tmp_path / f"out_{size}.json", host_store(loopback_listener())
        program = (size, store.port, "tensor_parallel", folder, out, *SIZES, *options)
        run_together("launched", [(rank, *program) for rank in range(size)])
        return json.loads(out.read_text())

    return run


def test_one_and_two_processes(run_by_torch, run):
    """No log-prob differs; under tp_invariant both draw the same to the bit."""
    plain, alone, both = run_by_torch(2), run(1, "tp_invariant=true"), run(2, "tp_invariant=true")
    for found in (plain, alone, both):
        assert found["compared"] == sum(new for _, new in mixed_lengths(6, 96, 0)) > 20
        assert found["drawn_tokens_compared"] == found["compared"] < found["tokens_computed"]
        assert found["weights"] == "those of the folder"
        assert found["mismatches"] == 0
        assert found["cuda_graphs"] is False  # what the engine did, whatever was asked for
    assert (alone["tensor"], both["tensor"]) == (1, 2)
    assert alone["outcomes_digest"] == both["outcomes_digest"] != plain["outcomes_digest"]


def test_options():
    """Unknown ones are refused; lengths reach the longest and no further."""
    assert parse(["num_seqs=3", "dummy=true"])["dummy"] is True
    with pytest.raises(ValueError, match="'tp=2' is none of tp_invariant=..., dummy=..."):
        parse(["tp=2"])
    totals = [sum(lens) for lens in mixed_lengths(64, 4096, 0)]
    assert max(totals) == 4096
    assert min(totals) < 200


def test_one_bit_of_any_process_is_a_mismatch(qwen3_path, monkeypatch):
    """Of the trainer's first pass: it differs from what was drawn and from the second pass. The
    process with most of them counts."""
    logprobs, passes = ForwardModel.logprobs, []

    def nudged(self, batches):
        found = logprobs(self, batches)
        passes.append(found)
        if len(passes) == 1:
            found[-1].view(torch.int32)[-1] ^= 1
        return found

    monkeypatch.setattr(ForwardModel, "logprobs", nudged)
    options = DEFAULTS | {"num_seqs": 3, "max_len": 24}
    cpu = torch.device("cpu")
    found = tensor_parallel.measure(qwen3_path, options, cpu)
    drawn = sum(new for _, new in mixed_lengths(3, 24, 0))
    assert (found["mismatches"], found["compared"]) == (2, drawn)
    monkeypatch.setattr(tensor_parallel, "gather_objects", lambda value: [value, value + 5, 1])
    assert tensor_parallel.measure(qwen3_path, options, cpu)["mismatches"] == 5
