"""A framework's trainer on one GPU updates the engine on another, over NCCL."""

import pytest
import torch
from serving import PARAMS, PROMPTS
from update_trainer import serve

from samebit.rollout.engine import Engine
from samebit.weight_sync.meeting import loopback_listener
from samebit.weight_sync.types import WeightSyncError, WeightVersion

pytestmark = [pytest.mark.gpu, pytest.mark.multigpu]

GROUP = "weight_update_group"


def drawn(groups):
    return [[(c.token_ids, c.logprobs) for c in group] for group in groups]


def test_nccl_updates_in_place_under_captured_graphs(forkserver, old, new):
    """Requests are kept in a pause; afterwards graphs replay with the new weights, and a trainer
    that sends nothing is given up in time."""
    connection, child = forkserver.Pipe()
    process = forkserver.Process(
        target=serve, args=(child, new.folder, "nccl", "cuda:1"), daemon=True
    )
    process.start()
    engine = Engine(old.folder, device="cuda:0", cuda_graphs=True, kv_cache_tokens=4096)
    fresh = Engine(new.folder, device="cuda:0", cuda_graphs=True, kv_cache_tokens=4096)
    truth = drawn(fresh.generate(PROMPTS, PARAMS))
    assert drawn(engine.generate(PROMPTS, PARAMS)) != truth
    addresses = [p.data_ptr() for p in engine.weights.values()]
    with loopback_listener() as listener:
        port = listener.getsockname()[1]
    connection.send(("join", port, GROUP, 2))
    engine.init_weights_update_group("127.0.0.1", port, 1, 2, timeout_s=20.0)
    assert connection.recv() == "done"
    request = engine.add_request(PROMPTS[0], PARAMS)
    engine.step()
    engine.pause_generation("keep")
    engine.begin_weight_update()
    shapes = {n: s for spec in new.specs for n, s in spec.hf_shapes.items()}
    connection.send(("send", GROUP, list(shapes), {}))
    engine.update_weights_from_distributed(
        list(shapes), ["bfloat16"] * len(shapes), list(shapes.values())
    )
    assert connection.recv() == "done"
    assert engine.end_weight_update() == WeightVersion(1, fresh.weight_version.digest)
    engine.continue_generation()
    found = []
    while engine.has_unfinished_requests:
        found += engine.step()
    assert [group[0].request_id for group in found] == [request]
    assert [p.data_ptr() for p in engine.weights.values()] == addresses
    assert drawn(engine.generate(PROMPTS, PARAMS)) == truth
    engine.begin_weight_update()
    with pytest.raises(WeightSyncError, match="the weight group lost a member"):
        engine.update_weights_from_distributed(["model.norm.weight"], ["bfloat16"], [[48]])
    with pytest.raises(WeightSyncError, match="lost a member: nothing came for 20.0 s"):
        engine.generate(PROMPTS, PARAMS)
    engine.copy_weights({n: p.clone() for n, p in fresh.weights.items()}, 2)
    assert drawn(engine.generate(PROMPTS, PARAMS)) == truth
    process.kill()
    process.join()
    torch.cuda.synchronize()
