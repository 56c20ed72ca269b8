"""Programs of several ranks, each in a process of its own."""

import itertools
import time

import pytest
import torch
from helpers import DUE_S, run_logged

from samebit.recipes.models.tiny_model import make_random_model


@pytest.fixture(scope="session")
def run_together(forkserver, tmp_path_factory):
    """run_together(program, calls): a function of rank_programs, or MODULE.FUNCTION, with each
    call's arguments, in as many processes; all of them have to end well."""

    def run(program, calls):
        module, function = f".{program}".rsplit(".", 1)
        folder = tmp_path_factory.mktemp(program)
        logs = [folder / f"{i}.log" for i in range(len(calls))]
        processes = [
            forkserver.Process(
                target=run_logged,
                args=(log, module.lstrip(".") or "rank_programs", function, *arguments),
            )
            for log, arguments in zip(logs, calls, strict=True)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + DUE_S
        try:
            for process in processes:
                process.join(deadline - time.monotonic())
        finally:
            for process in processes:
                process.kill()
                process.join()
        codes = [process.exitcode for process in processes]
        said = "\n".join(log.read_text() for log in logs if log.exists())
        assert not any(codes), f"exit codes {codes} (-9: not in {DUE_S} s)\n{said}"

    return run


@pytest.fixture
def run_ranks(run_together, tmp_path):
    """run_ranks(program, size, *arguments): the function of rank_programs on `size` ranks."""
    stores = (tmp_path / f"store_{i}" for i in itertools.count())

    def run(program, size, *arguments):
        store = next(stores)
        run_together(program, [(rank, size, store, *arguments) for rank in range(size)])

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of the usual initial scale: split layers sum in another order."""
    folder = tmp_path_factory.mktemp("models") / "qwen3"
    make_random_model(folder, "qwen3", seed=1, std=0.02, tied=False, num_layers=4)
    return folder


@pytest.fixture(scope="session")
def run_gradients(run_together):
    """run_gradients(folder, file): one process's gradients and their norm, written to file."""
    return lambda folder, file: run_together("gradients", [(folder, file)])


@pytest.fixture(scope="module")
def gradients(folder, run_gradients, tmp_path_factory):
    """(file, norm) of one process's gradients for the module's `folder`."""
    file = tmp_path_factory.mktemp("gradients") / "whole.pt"
    run_gradients(folder, file)
    return file, torch.load(file)["norm"]
