"""What several test files share: comparison to the bit, child processes, folders of weights."""

import faulthandler
import importlib
import ipaddress
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from samebit.kernels.attention import CanonicalAttention
from samebit.kernels.attention_kind import Heads
from samebit.recipes.verification.bits import distance


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor, case: object = "") -> None:
    """Fail with the first differing index and its distance in ulps unless all bits are equal.

    Stricter than torch.equal: -0.0 is not 0.0, and a NaN equals the same NaN.
    """
    assert found.dtype == expected.dtype, f"{case}: {found.dtype} and {expected.dtype}"
    assert found.shape == expected.shape, f"{case}: {found.shape} and {expected.shape}"
    apart = distance(found, expected)
    if apart is not None:
        raise AssertionError(
            f"{case}: {apart.num_differing} of {found.numel()} elements differ, the first at "
            f"{apart.index}: {found[apart.index].item()!r} is {apart.ulps} ulps from "
            f"{expected[apart.index].item()!r}"
        )


def attention_of(
    q: torch.Tensor, k: torch.Tensor, scale: float | None = None
) -> CanonicalAttention:
    """The canonical kind for the heads of q [T, Hq, Dh] and k [..., Hkv, Dh]; scale: Dh**-0.5."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return CanonicalAttention(Heads(q.shape[-2], k.shape[-2], q.shape[-1], scale), q.device)


def run_python(code: str, *arguments: object, timeout: float = 120.0, **env: str) -> str:
    """Run code in a child process with `arguments` in sys.argv[1:]; its stdout.

    The child finds packages as this process did, and fails loudly.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **env}
    run = subprocess.run(
        [sys.executable, "-P", "-c", code, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert run.returncode == 0, f"exit code {run.returncode}\n{run.stdout}\n{run.stderr}"
    return run.stdout


DUE_S = 170
"""Seconds until a child of run_logged is taken to hang."""


def run_logged(log: Path, module: str, function: str, *arguments: object) -> None:
    """In a child: call module.function with the arguments as text; what it says goes to `log`."""
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.dump_traceback_later(DUE_S - 20)  # slow work and a deadlock look alike outside
    getattr(importlib.import_module(module), function)(*map(str, arguments))


def listening(pids: Iterable[int]) -> set[str]:
    """Addresses at which TCP sockets of these processes listen, both families, as Linux tells."""
    sockets = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):  # closed meanwhile
                sockets.add(os.readlink(descriptor))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in sockets:
                words = bytes.fromhex(local.partition(":")[0])
                swapped = [words[i : i + 4][::-1] for i in range(0, len(words), 4)]
                found.add(str(ipaddress.ip_address(b"".join(swapped))))
    return found


def assert_on_loopback(pids: Iterable[int]) -> None:
    """Fail unless these processes listen somewhere, and nowhere but on the loopback."""
    found = listening(pids)
    assert found, "nothing listens, so nothing was tested"
    assert found <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, found


def tree(folder: Path) -> dict[Path, bytes]:
    """Every file of a folder with its bytes."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """No file of this process can grow beyond that, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of a folder's config.json; None removes a key."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Let `edit` change the named tensors of a folder's model.safetensors in place."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def recorded_reads(monkeypatch: Any) -> list[tuple[Path, int]]:
    """Grows by (folder, bytes) with every tensor, or part of one, that is read of a folder."""
    from samebit.rollout.runtime import weights

    reads: list[tuple[Path, int]] = []

    class Recording:
        """A handle, or a slice of its: what it gives as a tensor counts."""

        def __init__(self, file: Path, inner: Any) -> None:
            self._file, self._inner = file, inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

        def get_slice(self, name: str) -> "Recording":
            return Recording(self._file, self._inner.get_slice(name))

        def get_tensor(self, name: str) -> torch.Tensor:
            return self._count(self._inner.get_tensor(name))

        def __getitem__(self, index: Any) -> torch.Tensor:
            return self._count(self._inner[index])

        def _count(self, tensor: torch.Tensor) -> torch.Tensor:
            reads.append((self._file.parent, tensor.nbytes))
            return tensor

    original = weights.open_file
    monkeypatch.setattr(weights, "open_file", lambda file: Recording(file, original(file)))
    return reads


def philox_on_integers(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon et al. 2011) on Python's integers: four words of 32 bits."""
    (c0, c1, c2, c3), (k0, k1), mask = counter, key, (1 << 32) - 1
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & mask, (a >> 32) ^ c3 ^ k1, a & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


def outcomes(groups: list) -> list:
    """Token ids and log-probs of generate's result: what must be equal to the bit."""
    return [[(c.token_ids, c.logprobs) for c in group] for group in groups]


def make_prompts(*lens: int, seed: int = 0, vocab_size: int = 331) -> list[list[int]]:
    """Random prompts of these lengths for the models of make_random_model."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lens]
