"""samebit submit: a command as a job of a Ray cluster that is there, by its dashboard's address.

Before anything is sent the command's configuration is composed and checked here. Its paths are the
cluster's: dry_run=true among the command's own words has the job read and check them there.
"""

import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from samebit.recipes.cli.commands import COMMANDS, split, with_keys
from samebit.recipes.cli.compose import resolve
from samebit.recipes.config import ConfigError
from samebit.recipes.launch.launched import launcher_of, num_processes
from samebit.recipes.launch.ray_package import require_ray
from samebit.recipes.plan_config import PlanRun
from samebit.recipes.run.secrets import to_yaml, without_secrets
from samebit.recipes.submit_config import SubmitRun

_NO_JOBS = ("submit", "watch")
"""Commands that are for this machine."""
_TIME_TO_SAVE = {"RAY_JOB_STOP_WAIT_TIME_S": "300"}
"""Between the SIGTERM and the SIGKILL of `ray job stop`: 3 s by default, in which few runs save."""


def require_command(run: SubmitRun) -> Any:
    """Return the resolved configuration of the command that is to be a job.

    Raises ConfigError for a command that is none, a configuration that cannot be, and keys that
    mean something else in a job than the user will think.
    """
    group, words = split(run.command)
    command = group + words[0] if words else group.strip()
    if command not in COMMANDS or command in _NO_JOBS:
        known = ", ".join(name for name in COMMANDS if name not in _NO_JOBS)
        raise ConfigError(f"command is '{command}'; it must be one of: {known}")
    try:
        with _added_to_environment(run.runtime_env.variables):
            inner = resolve(command, list(with_keys(command, words[1:])))
        _require_fit_for_job(inner, run.entrypoint_num_gpus)
    except ConfigError as error:
        raise ConfigError(f"{command}: {error}") from error
    return inner


def _require_fit_for_job(inner: Any, num_gpus: float) -> None:
    if isinstance(inner, PlanRun):  # nothing is run
        return
    folder = getattr(inner, "output_dir", None)
    if folder is not None and not os.path.isabs(folder) and not getattr(inner, "dry_run", False):
        raise ConfigError(
            f"output_dir is {folder!r}; it must be absolute in a job, whose working folder is "
            "Ray's and goes with it"
        )
    if launcher_of(inner) == "ray":
        placement = getattr(inner, "grpo", inner).placement
        if placement.ray_address is None:
            raise ConfigError(
                "placement.ray_address is unset, which starts another cluster; it must be auto in "
                "a job with placement.launcher=ray, or the cluster's host:port"
            )
        if num_gpus:
            raise ConfigError(
                f"entrypoint_num_gpus is {num_gpus:g}; it must be 0 with placement.launcher=ray: "
                "the command has Ray start trainer and engines, and needs none itself"
            )
        return
    count = num_processes(inner)
    if 0 < num_gpus < count:
        raise ConfigError(
            f"entrypoint_num_gpus is {num_gpus:g}; it must be at least {count}, the run's "
            "processes, or 0: Ray hides the other GPUs"
        )


@contextmanager
def _added_to_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Interpolations find here what they will find there."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def entrypoint_of(run: SubmitRun) -> str:
    """Return the shell's command line of the job."""
    return shlex.join([run.python, "-P", "-m", "samebit.recipes.cli.main", *run.command])


def environment_of(run: SubmitRun) -> dict[str, Any]:
    """Return Ray's runtime environment of the job, without what is unset."""
    section = run.runtime_env
    given = {
        "working_dir": section.working_dir,
        "py_modules": section.py_modules,
        "env_vars": _TIME_TO_SAVE | section.variables,
    }
    return {name: value for name, value in given.items() if value}


def require_files(run: SubmitRun) -> None:
    """Raise ConfigError for what Ray is to bring from this machine and is not there."""
    section = run.runtime_env
    given = [("working_dir", section.working_dir)]
    given += [("py_modules", path) for path in section.py_modules]
    for name, path in given:
        if path is not None and "://" not in path and not os.path.exists(path):
            raise ConfigError(
                f"runtime_env.{name} names {path!r}, which does not exist on this machine; it must "
                "be a folder or a file here, or an address such as s3://..., for Ray to fetch"
            )


def main(run: SubmitRun) -> int:
    """Run the command `samebit submit`; returns 0 once the job is submitted, or with follow=true
    the job's exit code.

    Raises ConfigError, ImportError without Ray, and RayError for what Ray cannot do.
    """
    require_files(run)
    inner = require_command(run)
    require_ray("samebit submit")
    entrypoint = entrypoint_of(run)
    if run.dry_run:
        print(to_yaml(inner))
        shown = shlex.join(map(without_secrets, shlex.split(entrypoint)))
        print(f"{run.address} would run: {shown}")
        return 0
    from samebit.recipes.launch.ray_jobs import RayJobs

    jobs = RayJobs(run.address)
    needs = run.entrypoint_num_cpus, run.entrypoint_num_gpus
    job_id = jobs.submit(entrypoint, environment_of(run), *needs)
    print(job_id, flush=True)
    if not run.follow:
        _say(jobs.how_to_go_on(job_id))
        return 0
    try:
        code, ending = jobs.follow(job_id, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        _say(f"the job goes on: {jobs.how_to_go_on(job_id)}")
        return 130
    if code:
        _say(f"the job {job_id} {ending}")
    return code


def _say(text: str) -> None:
    print(f"samebit submit: {text}", file=sys.stderr)
