"""Programs of several ranks, each in a process of its own."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import run_python
from rank_programs import gradient_samples


@pytest.fixture
def run_ranks(tmp_path):
    """run_ranks(program, size, *arguments): the function of rank_programs on `size` ranks."""

    def run(program, size, *arguments):
        code = f"import sys, rank_programs; rank_programs.{program}(*sys.argv[1:])"
        store = tmp_path / f"store_{program}_{size}"
        with ThreadPoolExecutor(size) as pool:
            jobs = [
                pool.submit(run_python, code, rank, size, store, *arguments, OMP_NUM_THREADS="1")
                for rank in range(size)
            ]
            return [job.result() for job in jobs]

    return run


@pytest.fixture(scope="module")
def gradients(folder, tmp_path_factory):
    """(file, norm), for the module's `folder`, of the gradients of transformers' model, in fp64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager"
    )
    losses = []
    for s in gradient_samples():
        ids = torch.tensor([s.token_ids])
        logprobs = model(ids).logits[0].log_softmax(-1)
        targets = ids[0, s.prompt_len :, None]
        losses.append(-logprobs[s.prompt_len - 1 : -1].gather(1, targets).squeeze(1))
    torch.cat(losses).mean().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    file = tmp_path_factory.mktemp("gradients") / "expected.pt"
    torch.save(found, file)
    return file, float(torch.cat([g.flatten() for g in found.values()]).norm())
