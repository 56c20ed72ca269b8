"""Whether the splits of a user's own task share no prompt."""

import json
from collections.abc import Sequence
from hashlib import blake2b

from samebit.recipes.data.records import Check
from samebit.recipes.data.tasks.base import DataConfig, Problem


class Apart:
    """Finds held-out problems whose prompt, with its tools, is also trained on.

    Of a task of the user's own; what the others draw is apart by itself, and files are as they are.
    """

    def __init__(self, config: DataConfig) -> None:
        self._is_own = ":" in config.task
        self._trained: dict[bytes, int] = {}

    def noting(self, check: Check) -> Check:
        """Return a check of problems to train on, which takes note of their prompts."""

        def noted(problems: Sequence[Problem]) -> list[str]:
            self._trained |= {_key(problem): problem.index for problem in problems}
            return check(problems)

        return noted if self._is_own else check

    def comparing(self, check: Check) -> Check:
        """Return a check of held-out problems, which finds those that were noted."""

        def compared(problems: Sequence[Problem]) -> list[str]:
            same = [self._trained.get(_key(problem)) for problem in problems]
            return [
                fault
                if i is None
                else f"this held-out prompt is that of problem {i} of the train "
                "split too; none may be in both"
                for fault, i in zip(check(problems), same, strict=True)
            ]

        return compared if self._is_own else check


def _key(problem: Problem) -> bytes:
    said = json.dumps([problem.prompt, problem.tools], sort_keys=True)
    return blake2b(said.encode(), digest_size=16).digest()
