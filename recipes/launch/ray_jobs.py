"""Jobs of a Ray cluster, by its dashboard. Imported only where a command is submitted."""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from samebit.recipes.launch.ray_package import in_our_words

logging.getLogger(JobSubmissionClient.__module__).setLevel(logging.WARNING)  # of closed sockets

_REACH_S = 10.0
_LOOK_S = 0.5
_OTHER_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Which Ray takes, where they are set, in place of the one that it is given."""


class RayJobs:
    """The jobs of one cluster. Every method raises RayError for what Ray refuses."""

    def __init__(self, address: str) -> None:
        """address: of its dashboard. Raises RayError if no Ray answers there."""
        self._address = address
        parts = urlsplit(address)
        place = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        with in_our_words(f"the dashboard of the Ray cluster at {address} cannot be reached"):
            socket.create_connection(place, timeout=_REACH_S).close()  # Ray itself would wait on
            with _hidden(_OTHER_ADDRESSES), _with_remedy():
                self._client = JobSubmissionClient(address)

    def submit(
        self, entrypoint: str, environment: Mapping[str, Any], num_cpus: float, num_gpus: float
    ) -> str:
        """Have the cluster run a shell's command line in a runtime environment; returns the job's
        id. What the environment names of this machine is sent first."""
        with in_our_words(f"the Ray cluster at {self._address} did not take the job"):
            return self._client.submit_job(
                entrypoint=entrypoint,
                runtime_env=dict(environment),
                entrypoint_num_cpus=num_cpus or None,
                entrypoint_num_gpus=num_gpus or None,
            )

    def follow(self, job_id: str, tell: Callable[[str], object]) -> tuple[int, str]:
        """Tell what the job prints until it has ended; returns its exit code, as a shell has it,
        and how it ended in words."""

        async def tail() -> None:
            async for text in self._client.tail_job_logs(job_id):
                tell(text)

        with in_our_words(f"the job {job_id} cannot be followed any more"):
            asyncio.run(tail())
            while not (info := self._client.get_job_info(job_id)).status.is_terminal():
                time.sleep(_LOOK_S)  # its status is written after the end of what it printed
        if info.status == JobStatus.SUCCEEDED:
            return 0, "succeeded"
        if code := info.driver_exit_code:
            return code if code > 0 else 128 - code, f"ended with exit code {code}"
        # Its command never ran, or somebody stopped it.
        said = (info.message or "").strip().splitlines()[:1]
        return 1, ": ".join([f"was {info.status.value.lower()}", *said])

    def how_to_go_on(self, job_id: str) -> str:
        """Say by which commands the job is followed and stopped."""
        words = f"--address {self._address} {job_id}"
        return f"ray job logs --follow {words} follows it, ray job stop {words} ends it"


@contextmanager
def _with_remedy() -> Iterator[None]:
    """Say what a cluster that wants a token needs of us: Ray looks for none unless it is told."""
    try:
        yield
    except AuthenticationError as error:
        said = error.message.partition("\n")[0]
        remedy = "RAY_AUTH_MODE=token, with its token in RAY_AUTH_TOKEN or in ~/.ray/auth_token"
        raise PermissionError(f"{said}; set {remedy}") from error


@contextmanager
def _hidden(names: tuple[str, ...]) -> Iterator[None]:
    had = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(had)
