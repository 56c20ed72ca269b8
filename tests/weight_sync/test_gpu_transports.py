"""Transports between processes on GPUs: bits of a direct update, graphs kept, faults bounded."""

import os
import signal
import subprocess
import sys
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from helpers import outcomes

from samebit.recipes.models.tiny_model import write_config, write_weights
from samebit.rollout.engine import Engine
from samebit.rollout.models.registry import load_model_config
from samebit.rollout.remote import RemoteEngine
from samebit.rollout.remote_ranks import RemoteEngineError
from samebit.rollout.runtime.weights import load_safetensors
from samebit.rollout.types import SamplingParams
from samebit.weight_sync.digest import weights_digest
from samebit.weight_sync.transports.remote import IpcTransport, NcclTransport
from samebit.weight_sync.types import WeightSyncError, WeightVersion

pytestmark = pytest.mark.gpu

PROMPTS = [[5, 9, 200, 31], [7] * 70]
PARAMS = SamplingParams(n=4, max_new_tokens=16, ignore_eos=True)
WAYS = [
    pytest.param((IpcTransport, "cuda:0"), id="ipc"),
    pytest.param((NcclTransport, "cuda:1"), id="nccl", marks=pytest.mark.multigpu),
]
SETTINGS = {"kv_cache_tokens": 4096, "max_num_seqs": 16, "max_model_len": 256}


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    """Two versions of a model whose tensors are large and small, on the GPU, and what is drawn."""
    shape = {"hidden_size": 1024, "intermediate_size": 3072, "head_dim": 64, "vocab_size": 5001}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "num_hidden_layers": 3}
    found = []
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp(f"version{seed}")
        write_config(folder, "qwen3", **shape, **heads, tie_word_embeddings=False)
        write_weights(folder, seed=seed)
        specs = load_model_config(folder).param_specs()
        params = {
            s.name: torch.empty(s.shape, dtype=torch.bfloat16, device="cuda:0") for s in specs
        }
        load_safetensors(folder, specs, params)
        drawn = outcomes(Engine(folder, **SETTINGS).generate(PROMPTS, PARAMS))
        digest = weights_digest(specs, params)
        found.append(
            SimpleNamespace(folder=folder, specs=specs, params=params, digest=digest, drawn=drawn)
        )
    return found


def source_of(version):
    return SimpleNamespace(step=0, params=version.params, specs=version.specs)


def update(way, version, step, digest=None):
    way.lease(step)
    return way.update(version.params, digest or version.digest)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bucket_bytes", [1 << 20, 512 << 20])
def test_updates_give_the_bits_of_loading(versions, way, bucket_bytes):
    """In place: graphs that were captured before read the new weights."""
    kind, device = way
    old, new = versions
    engine = RemoteEngine(old.folder, device=device, **SETTINGS)
    with closing(engine):
        assert outcomes(engine.generate(PROMPTS, PARAMS)) == old.drawn
        transport = kind(source_of(new), engine, timeout_s=60, bucket_bytes=bucket_bytes)
        with closing(transport):
            for step, version in enumerate((new, old, new), start=1):
                assert update(transport, version, step) == WeightVersion(step, version.digest)
                assert outcomes(engine.generate(PROMPTS, PARAMS)) == version.drawn


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bucket_bytes", [1 << 20, 512 << 20])
def test_deltas_give_the_bits_of_loading(versions, way, bucket_bytes):
    """Only changed elements travel, 4 bytes of position and 2 of value for each."""
    kind, device = way
    old, new = versions
    params, count = {name: p.clone() for name, p in new.params.items()}, 0
    for spec in new.specs:
        changed = params[spec.name][: spec.num_rows].view(-1)[1000::2000]  # padding does not travel
        changed.copy_((changed.view(torch.int16) ^ 1).view(torch.bfloat16))
        count += len(changed)
    few = SimpleNamespace(params=params, digest=weights_digest(new.specs, params))
    everything = sum(new.params[s.name][: s.num_rows].nbytes for s in new.specs)
    settings = {"timeout_s": 60, "bucket_bytes": bucket_bytes, "delta": True}
    engine = RemoteEngine(old.folder, device=device, **SETTINGS)
    with closing(engine), closing(kind(source_of(new), engine, **settings)) as transport:
        sent = []
        for step, version in enumerate((new, few, few, new, old, new), start=1):
            assert update(transport, version, step) == WeightVersion(step, version.digest)
            sent.append(transport.sent_bytes)
            if version is not few:
                assert outcomes(engine.generate(PROMPTS, PARAMS)) == version.drawn
        assert sent[:4] == [everything, 6 * count, 0, 6 * count]
        with pytest.raises(WeightSyncError, match=f"digest {few.digest} here, {old.digest} at"):
            update(transport, few, 7, old.digest)
        assert transport.sent_bytes == 6 * count
        update(transport, new, 8)
        assert transport.sent_bytes == everything
        assert outcomes(engine.generate(PROMPTS, PARAMS)) == new.drawn


@pytest.mark.parametrize("way", WAYS)
def test_a_refused_update_is_healed_by_the_next(versions, way):
    """The engine does not serve what the sender's digest does not vouch for."""
    kind, device = way
    old, new = versions
    engine = RemoteEngine(old.folder, device=device, **SETTINGS)
    with closing(engine):
        transport = kind(source_of(new), engine, timeout_s=60)
        with closing(transport):
            with pytest.raises(WeightSyncError, match=f"digest {new.digest} here, {old.digest}"):
                update(transport, new, 1, old.digest)
            with pytest.raises(WeightSyncError, match="step 1 broke off"):
                engine.generate(PROMPTS, PARAMS)
            update(transport, new, 2)
            assert outcomes(engine.generate(PROMPTS, PARAMS)) == new.drawn


@pytest.mark.parametrize("way", WAYS)
def test_an_engine_that_dies_in_mid_transfer_is_noticed(versions, way):
    """The sender's kernel waits for a peer that is gone: it is ended, and the process lives on."""
    kind, device = way
    old, new = versions
    engine = RemoteEngine(old.folder, device=device, **SETTINGS)
    transport = kind(source_of(new), engine, timeout_s=60)
    update(transport, new, 1)
    data = transport._sender._member.data
    move = data.move

    def move_to_the_dead(*args):
        os.kill(engine._ranks.processes[0].pid, signal.SIGKILL)
        engine._ranks.processes[0].join()
        return move(*args)

    data.move = move_to_the_dead
    with pytest.raises(RemoteEngineError, match="ended with code -9"):
        update(transport, old, 2)
    assert weights_digest(new.specs, new.params) == new.digest, "this process computes on"
    another = RemoteEngine(old.folder, device=device, **SETTINGS)
    with closing(another), closing(kind(source_of(new), another, timeout_s=60)) as fresh:
        update(fresh, new, 3)
        assert outcomes(another.generate(PROMPTS, PARAMS)) == new.drawn


DYING_SENDER = """
import itertools, os, signal, sys
from pathlib import Path
import torch
from samebit.rollout.models.registry import load_model_config
from samebit.rollout.runtime.weights import load_safetensors
from samebit.weight_sync.meeting import loopback_listener
from samebit.weight_sync.transports.data_planes import make_data_plane
from samebit.weight_sync.transports.group import WeightGroup
from samebit.weight_sync.transports.shards import Held, ShardSender
name, gpu, folder, round_ = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
device = torch.device(gpu)
torch.cuda.set_device(device)
specs = load_model_config(folder).param_specs()
params = {s.name: torch.empty(s.shape, dtype=torch.bfloat16, device=device) for s in specs}
load_safetensors(folder, specs, params)
listener = loopback_listener()
address, port = listener.getsockname()
print(port, flush=True)
group = WeightGroup(address, port, 0, 2, 60.0, listener=listener)
sender = ShardSender(group, make_data_plane(name, device), Held(specs, params), 1 << 20)
move = sender._member.data.move
def die_between(rounds, watch):
    move(itertools.islice(rounds, round_), watch)
    os.kill(os.getpid(), signal.SIGKILL)
sender._member.data.move = die_between
sender.begin(4)
sender.send(params)
"""


@pytest.mark.parametrize("num_rounds", [0, 1, 5])
@pytest.mark.parametrize(
    ("name", "gpu"),
    [("ipc", "cuda:0"), pytest.param("nccl", "cuda:1", marks=pytest.mark.multigpu)],
)
def test_a_sender_that_dies_in_mid_transfer_leaves_an_engine_that_says_so(
    versions, name, gpu, num_rounds
):
    """The receiver's kernel waits for bytes that never come: it is ended, and a full update heals
    the engine in the same process."""
    old, new = versions
    engine = Engine(old.folder, **SETTINGS)
    command = [sys.executable, "-P", "-c", DYING_SENDER, name, gpu, str(new.folder)]
    with subprocess.Popen([*command, str(num_rounds)], stdout=subprocess.PIPE, text=True) as child:
        engine.join_weight_transport("127.0.0.1", int(child.stdout.readline()), 1, 2, name, 60.0)
        with pytest.raises(WeightSyncError, match="the weight group lost a member"):
            engine.receive_weight_update()
        assert child.wait() == -signal.SIGKILL
    with pytest.raises(WeightSyncError, match="step 4 broke off: the weight group lost a member"):
        engine.generate(PROMPTS, PARAMS)
    assert "unknown" in engine.weight_report().values()
    engine.copy_weights(new.params, step=5, digest=new.digest)
    assert outcomes(engine.generate(PROMPTS, PARAMS)) == new.drawn
