"""The console command: `samebit <command> key=value ...`. Imports torch only once it must run.

`--key` is short for `key=true`, of a flag. A command may be two words: `samebit bench engine`.
"""

import gc
import importlib
import importlib.metadata
import itertools
import logging
import os
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from samebit.recipes.cli.commands import COMMANDS, HELP, split, usage, with_keys
from samebit.weight_sync.failures import is_expected, may_pass


def _command_help(command: str, overrides: Sequence[str]) -> str:
    from omegaconf import OmegaConf

    from samebit.recipes.cli.compose import CONFIG_DIR, compose, groups_of, schema_of
    from samebit.recipes.cli.help import documented_yaml

    lines = [f"samebit {command}: {COMMANDS[command]}", ""]
    main_file = CONFIG_DIR / f"{command}.yaml"
    if main_file.exists():
        text = itertools.takewhile(lambda x: x[0] == "#", main_file.read_text().splitlines())
        lines += [*(line[2:] for line in text), ""]
    if groups := groups_of(command):
        lines.append("groups (choose with group=name):")
    lines += [f"  {group}: {', '.join(names)}" for group, names in groups.items()]
    lines += ["", "keys and defaults (??? must be given):", ""]
    values: Any = OmegaConf.to_container(compose(command, overrides))
    return "\n".join(lines) + "\n" + documented_yaml(schema_of(command, overrides), values)


def _quieten_imports() -> None:
    """Megatron and torch warn at import about optional packages that we do not use."""
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the process's exit code.

    2 for a wrong command line or configuration, 1 for a run that ended with one of our own errors,
    an OSError, ValueError or ImportError. These are printed as one line, or with a traceback if
    SAMEBIT_TRACEBACK is set. 0 also for a run that a signal stopped, once it is saved; 130 after
    Ctrl-C where there is nothing to save. CRASHED, of a process that was launched, for all other
    errors, and where a process that it needs has died.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    group, words = split(arguments)
    if not words or words[0] in (*HELP, "help"):
        print(usage(group))
        return 0 if words else 2
    command, rest = group + words[0], words[1:]
    if command == "--version":
        print(f"samebit {importlib.metadata.version('samebit')}")
        return 0
    if command not in COMMANDS:
        print(f"samebit: no command '{command}'\n\n{usage()}", file=sys.stderr)
        return 2
    overrides = list(with_keys(command, [a for a in rest if a not in HELP]))
    from samebit.recipes.cli.compose import resolve
    from samebit.recipes.config import ConfigError
    from samebit.recipes.launch import launched
    from samebit.recipes.launch.processes import launch
    from samebit.recipes.run.needs import require_ready
    from samebit.recipes.run.signals import Stopped

    _quieten_imports()
    run, follows = None, False
    try:
        if set(HELP) & set(rest):
            print(_command_help(command, overrides))
            return 0
        run = _of_its_own(resolve, command, overrides)
        _of_its_own(require_ready, run)
        if launched.needs_launch(run):
            return launch(own_command(arguments), run)
        follows = launched.follow_launcher(run)
        program = _import_program(command)
        if argv is None:  # what imports made lives on; a full collection over it takes 0.1 s
            gc.freeze()
        return _of_its_own(program.main, run)
    except ConfigError as error:
        print(f"samebit {command}: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"samebit {command}: {stopped}", file=sys.stderr)
        return 0
    except KeyboardInterrupt:  # where no run has begun that could be saved
        print(f"samebit {command}: interrupted", file=sys.stderr)
        code = 130
    except Exception as error:
        if not _was_told(command, error, run, follows or launched.is_one_of_several()):
            raise
        code = launched.CRASHED if follows and may_pass(error) else 1
    if launched.is_one_of_several():
        launched.leave(code)
    return code


def own_command(arguments: Sequence[str]) -> list[str]:
    """Return the command line that runs `samebit` with these arguments in another process."""
    return [sys.executable, "-P", "-m", "samebit.recipes.cli.main", *arguments]


def _of_its_own[T](function: Callable[..., T], *args: Any) -> T:
    """What a function returns. Raises ExitError where code in it, which only a user's does, ends
    the process as if all were done."""
    try:
        return function(*args)
    except SystemExit as error:
        library = sysconfig.get_path("stdlib")  # exit(), argparse
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if not f.filename.startswith(("<frozen", library))]
        place = (own or frames)[-1]
        raise ExitError(
            f"{place.filename}, line {place.lineno} ({place.name}) has raised SystemExit"
            f"({error.code!r}); raise an error that says what is wrong"
        ) from error


class ExitError(ValueError):
    """A user's code has asked for the end of the process."""


def _import_program(command: str) -> Any:
    gc.disable()  # what imports make lives on: to look it through takes 0.5 s in all
    try:
        from samebit.trainer.megatron.imports import lean_imports

        module = command.replace("-", "_").replace(" ", ".")
        with lean_imports():
            return importlib.import_module(f"samebit.recipes.{module}")
    finally:
        gc.enable()


def _was_told(command: str, error: Exception, run: Any, is_watched: bool) -> bool:
    """Say one of our own errors in a line, and any other one, if a launcher watches, in full."""
    from samebit.recipes.run.secrets import scrubbed

    if is_expected(error) and not os.environ.get("SAMEBIT_TRACEBACK"):
        print(f"samebit {command}: {scrubbed(str(error), run)}", file=sys.stderr)
    elif is_watched:
        traceback.print_exception(error)
    else:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
