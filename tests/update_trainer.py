"""A framework's trainer: a process that makes the weight group as theirs do, and broadcasts.

Here is what it does, and what a test has it do.
"""

import os
import signal
from datetime import timedelta

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed import PrefixStore, distributed_c10d
from torch.distributed.rendezvous import rendezvous

from samebit.weight_sync.meeting import loopback_listener

GROUP = "weight_update_group"


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
                os.kill(os.getpid(), signal.SIGKILL)
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


class Trainer:
    """The other process: `send` has it broadcast, and `said` is how that went."""

    def __init__(self, forkserver, folder):
        self.weights = load_file(folder / "model.safetensors")
        self._connection, child = forkserver.Pipe()
        self.process = forkserver.Process(target=serve, args=(child, folder), daemon=True)
        self.process.start()
        child.close()

    def join(self, engine, name=GROUP, timeout_s=30.0):
        with loopback_listener() as listener:
            port = listener.getsockname()[1]
        size = 1 + getattr(engine, "num_ranks", 1)
        self._connection.send(("join", port, name, size))
        engine.init_weights_update_group(
            "127.0.0.1", port, 1, size, group_name=name, backend="gloo", timeout_s=timeout_s
        )
        assert self.said() == "done"

    def send(self, names, changes=None, group=GROUP):
        self._connection.send(("send", group, list(names), changes or {}))

    def said(self):
        assert self._connection.poll(60)
        return self._connection.recv()

    def doom(self):
        """Have it be killed once it has sent what it was told to."""
        self._connection.send(("die",))

    def die(self):
        self.doom()
        self.process.join()

    def described(self, names):
        tensors = [self.weights[name] for name in names]
        dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in tensors]
        return dtypes, [list(tensor.shape) for tensor in tensors]

    def update(self, engine, names):
        """One call of a framework."""
        self.send(names)
        engine.update_weights_from_distributed(names, *self.described(names))
        assert self.said() == "done"

    def close(self):
        if self.process.is_alive():
            self._connection.send(None)
        self.process.join()


def parts(names, size=7):
    names = list(names)
    return [names[i : i + size] for i in range(0, len(names), size)]


def full_update(engine, trainer):
    """What a framework does for every step."""
    engine.pause_generation(mode="retract")
    engine.begin_weight_update(selector="all")
    for names in parts(trainer.weights):
        trainer.update(engine, names)
    version = engine.end_weight_update()
    engine.continue_generation()
    return version
