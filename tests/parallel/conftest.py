"""Programs of several ranks, each in a process of its own."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import run_python


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


@pytest.fixture(scope="session")
def run_gradients():
    """run_gradients(folder, file): one process's gradients and their norm, written to file."""

    def run(folder, file):
        code = "import sys, rank_programs; rank_programs.gradients(*sys.argv[1:])"
        run_python(code, folder, file, OMP_NUM_THREADS="1")

    return run


@pytest.fixture(scope="module")
def gradients(folder, run_gradients, tmp_path_factory):
    """(file, norm) of one process's gradients for the module's `folder`."""
    file = tmp_path_factory.mktemp("gradients") / "whole.pt"
    run_gradients(folder, file)
    return file, torch.load(file)["norm"]
