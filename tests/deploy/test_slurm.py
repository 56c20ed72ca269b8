"""deploy/slurm: the script's directives, and what it tells its processes, without Slurm."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from samebit.recipes.cli.compose import resolve

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "slurm" / "samebit.sbatch"
OPTIONS = {
    "job-name": r"[\w-]+",
    "nodes": r"\d+",
    "ntasks-per-node": r"\d+",
    "gpus-per-node": r"(\w+:)?\d+",
    "cpus-per-task": r"\d+",
    "time": r"(\d+-)?\d+:\d\d:\d\d",
    "signal": r"(B:)?[A-Z]+@\d+",
    "requeue": None,
    "open-mode": r"append|truncate",
    "output": r"[\w%.-]+",
}
"""Of sbatch's options those that are used, with the form of their values."""

SCONTROL = """#!/bin/bash
[[ "$*" == "show hostnames $SLURM_JOB_NODELIST" ]] || exit 9
printf '127.0.0.1\\nelsewhere\\n'
"""
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % SLURM_NTASKS_PER_NODE)) "$@" &
    tasks[task]=$!
done
for task in 0 1; do wait "${tasks[task]}" || exit; done
"""
TOLD = """#!/bin/bash
echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR ${#SAMEBIT_SECRET} $# $*"
"""
SAMEBIT = """#!{python}
import os, sys
import torch
from samebit.trainer.config import ParallelConfig
from samebit.trainer.megatron.setup import start_processes
from samebit.weight_sync.objects import gather_objects
start_processes(torch.device("cpu"), ParallelConfig(data=2))
ranks = gather_objects([os.environ["RANK"], os.environ["LOCAL_RANK"], *sys.argv[1:]])
if os.environ["RANK"] == "0":
    print(ranks, flush=True)
"""


def directives():
    lines = SCRIPT.read_text().splitlines()
    found = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    return {name: value for name, _, value in (line.partition("=") for line in found)}


def test_directives_are_slurm_s():
    """All of them before the first command, behind which sbatch reads none."""
    assert directives().keys() == OPTIONS.keys()
    for name, value in directives().items():
        assert re.fullmatch(OPTIONS[name] or "", value), name
    lines = SCRIPT.read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not [line for line in lines[first:] if line.startswith("#SBATCH")]
    subprocess.run(["bash", "-n", SCRIPT], check=True)


def test_the_example_is_as_large_as_the_job():
    text = SCRIPT.read_text().replace("\\\n#", "")
    [words] = re.findall(r"sbatch deploy/slurm/samebit.sbatch grpo (.*)", text)
    run = resolve("grpo", [*words.split(), "resume=true"])
    found = directives()
    assert run.num_processes == int(found["nodes"]) * int(found["ntasks-per-node"])
    assert found["gpus-per-node"] == found["ntasks-per-node"]


def said_by(folder, samebit):
    """What the script's two processes say, with a program in place of samebit; in order."""
    python = f"{sys.executable} -P"
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN), ("samebit", samebit)):
        (folder / name).write_text(text.replace("{python}", python))
        (folder / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_CPUS_PER_TASK": "1",
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "GLOO_SOCKET_IFNAME": "lo",
        "SAMEBIT_SECRET": "",
    }
    command = ["bash", SCRIPT, "grpo", "run_name=a b"]
    run = subprocess.run(command, env=os.environ | slurm, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return sorted(run.stdout.splitlines())


def test_what_its_processes_are_told(tmp_path):
    """Two, on two nodes: their places, a secret of 64 characters, and the words."""
    words = "3 grpo run_name=a b resume=true"
    expected = [f"{rank} 0 2 1 127.0.0.1 64 {words}" for rank in (0, 1)]
    assert said_by(tmp_path, TOLD) == expected


@pytest.mark.long
def test_its_processes_meet(tmp_path):
    """By the one secret that both are told."""
    words = ["grpo", "run_name=a b", "resume=true"]
    assert said_by(tmp_path, SAMEBIT) == [f"{[['0', '0', *words], ['1', '0', *words]]}"]
