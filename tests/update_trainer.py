"""A framework's trainer: a process that makes the weight group as theirs do, and broadcasts."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed import PrefixStore, distributed_c10d
from torch.distributed.rendezvous import rendezvous


def init_process_group(init_method, world_size, rank, group_name, backend):
    """The copy of torch's that frameworks carry: a group beside the default one."""
    timeout = timedelta(seconds=30)
    store, rank, world_size = next(rendezvous(init_method, rank, world_size, timeout=timeout))
    store.set_timeout(timeout)
    store = PrefixStore(group_name, store)
    group, _ = distributed_c10d._new_process_group_helper(
        *(world_size, rank, [], backend, store), group_name=group_name, timeout=timeout
    )
    distributed_c10d._world.pg_group_ranks[group] = {i: i for i in range(world_size)}
    return group


def serve(connection, folder, backend="gloo", device="cpu"):
    """Do what the test says: join a port, or broadcast tensors; `None` ends it."""
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    weights, groups = load_file(folder / "model.safetensors"), {}
    if backend == "nccl":
        torch.cuda.set_device(device)
        weights = {name: weight.to(device, torch.bfloat16) for name, weight in weights.items()}
    while (asked := connection.recv()) is not None:
        verb, *arguments = asked
        try:
            if verb == "join":
                port, name, size = arguments
                groups[name] = init_process_group(f"tcp://127.0.0.1:{port}", size, 0, name, backend)
            elif verb == "die":
                os._exit(0)
            else:
                group_name, names, changes = arguments
                for name in names:
                    tensor = changes.get(name, weights[name])
                    dist.broadcast(tensor, src=0, group=groups[group_name])
                if backend == "nccl":
                    torch.cuda.synchronize()
            connection.send("done")
        except Exception as error:  # noqa: BLE001 - it is told
            connection.send(f"failed: {error}")
