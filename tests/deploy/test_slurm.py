"""deploy/slurm: the script's directives, and what it tells its processes, without Slurm."""

import os
import re
import subprocess
import sys
from pathlib import Path

from helpers import run_python

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


def test_its_processes_meet(tmp_path):
    """Two, on two nodes as far as they are told: with their ranks, one secret, and the words."""
    python = f"{sys.executable} -P"
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN), ("samebit", SAMEBIT)):
        (tmp_path / name).write_text(text.replace("{python}", python))
        (tmp_path / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_CPUS_PER_TASK": "1",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "GLOO_SOCKET_IFNAME": "lo",
        "SAMEBIT_SECRET": "",
    }
    code = "import subprocess, sys; sys.exit(subprocess.run(['bash', *sys.argv[1:]]).returncode)"
    said = run_python(code, SCRIPT, "grpo", "run_name=a b", **slurm)
    words = ["grpo", "run_name=a b", "resume=true"]
    assert said == f"{[['0', '0', *words], ['1', '0', *words]]}\n"
