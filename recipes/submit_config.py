"""The configuration of `samebit submit`. No torch here, so that --help answers at once."""

from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from samebit.trainer.config import require


@dataclass(kw_only=True)
class RuntimeEnvSection:
    """Names what Ray brings to the job's node: its runtime environment."""

    working_dir: str | None = None
    """A folder, but for what .gitignore names, a .zip, or an address of one, such as s3://...: the
    job's working folder is a copy."""
    py_modules: list[str] = field(default_factory=list)
    """Folders and wheels of packages that the job imports."""
    env_vars: dict[str, Any] = field(default_factory=dict)
    """Environment variables by name. Ray shows them to whoever may see the job."""

    def __post_init__(self) -> None:
        for name in ("working_dir", "py_modules"):
            value = getattr(self, name)
            fits = "" not in (value if isinstance(value, list) else [value])
            require(fits, f"runtime_env.{name}", value, "the path of a folder or a file")
        for name, value in self.env_vars.items():
            is_text = isinstance(value, str | int) and not isinstance(value, bool)
            meaning = f"a text: quote it, as in runtime_env.env_vars.{name}=\"'...'\""
            require(is_text, f"runtime_env.env_vars.{name}", value, meaning)

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables as texts."""
        return {name: str(value) for name, value in self.env_vars.items()}


@dataclass(kw_only=True)
class SubmitRun:
    """`samebit submit address=... COMMAND key=value ...`: a command as a job of a Ray cluster."""

    address: str = "???"
    """The cluster's dashboard, as http://HOST:8265."""
    command: list[str] = field(default_factory=list)
    """The command and its words: all from the first word on that is no key=value."""
    follow: bool = False
    """Print what the job says until it ends, and end with its exit code."""
    dry_run: bool = False
    """Check the command, print its configuration and what would be sent, and stop."""
    python: str = "python"
    """The cluster's Python, in which samebit is installed."""
    entrypoint_num_cpus: float = 0.0
    """CPUs that Ray keeps for the command's own processes, beside what it asks Ray for."""
    entrypoint_num_gpus: float = 0.0
    """GPUs, likewise: one for each process of the trainer. 0: Ray hides none from them."""
    runtime_env: RuntimeEnvSection = field(default_factory=RuntimeEnvSection)

    def __post_init__(self) -> None:
        meaning = "the address of the cluster's dashboard, as in http://HOST:8265"
        require(_is_dashboard(self.address), "address", self.address, meaning)
        meaning = "a command with its words, such as grpo model.path=... data.path=..."
        require(bool(self.command), "command", self.command, meaning)
        require(self.python != "", "python", "", "a program, such as python")
        for name in ("entrypoint_num_cpus", "entrypoint_num_gpus"):
            value = getattr(self, name)
            require(0 <= value < float("inf"), name, value, "0 or more, and finite")


def _is_dashboard(address: str) -> bool:
    try:
        parts = urlsplit(address)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none
        return False
    return known and parts.path in ("", "/") and not (parts.query or parts.fragment)
