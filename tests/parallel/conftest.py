"""Programs of several ranks, each in a process of its own."""

from concurrent.futures import ThreadPoolExecutor

import pytest
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
