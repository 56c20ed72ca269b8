"""What became of the mutants of one kind: the figure, and what the output file holds of it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from mutants.judge import IMPORT, Mutant, NoMutant, Round, Verdict


@dataclass(frozen=True, kw_only=True)
class Result:
    """The verdicts on those that were judged, and the reasons of those that were left out."""

    chosen: str  # "drawn" or "written"
    verdicts: list[Verdict]
    equivalents: dict[str, str]  # {name: reason}
    changes: dict[str, str] = field(default_factory=dict)  # {name: lines before and after}
    num_controls: int  # tests that killed one, and pass without any

    def _num_killed(self) -> int:
        return sum(v.killed for v in self.verdicts)

    def _share(self) -> float:
        return self._num_killed() / max(len(self.verdicts), 1)

    def is_enough(self, share: float) -> bool:
        """Whether so large a part was killed."""
        return self._share() >= share

    def figure(self) -> str:
        """The result in a line."""
        killed, judged, left_out = self._num_killed(), len(self.verdicts), len(self.equivalents)
        hung, total = sum(v.hung for v in self.verdicts), judged + left_out
        return (
            f"{killed} of {judged} killed ({self._share():.1%}; {left_out} of {total} "
            f"{self.chosen} are equivalent; {hung} by a hang); {killed / max(total, 1):.1%} with "
            "the equivalent ones as survivors"
        )

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "figure": self.figure(),
            "num_judged": len(self.verdicts),
            "num_killed": self._num_killed(),
            "num_killed_by_a_hang": sum(v.hung for v in self.verdicts),
            "num_control_tests": self.num_controls,
            "equivalents": [
                {"mutant": name, **self._change(name), "reason": reason}
                for name, reason in self.equivalents.items()
            ],
            "verdicts": [
                {"mutant": v.name, **self._change(v.name), "killed_by": v.killed_by, "hung": v.hung}
                for v in self.verdicts
            ],
        }

    def _change(self, name: str) -> dict[str, str]:
        return {"change": self.changes[name]} if name in self.changes else {}


def controls(verdicts: Iterable[Verdict]) -> list[tuple[Mutant, list[Round]]]:
    """Every test that killed one, once, without a mutant: those of a file in one process."""
    tests: dict[str, set[str]] = {}
    for verdict in verdicts:
        if verdict.killed and verdict.killed_by != IMPORT:
            tests.setdefault(verdict.killed_by.partition("::")[0], set()).add(verdict.killed_by)
    return [
        (NoMutant(file, file), [Round(tuple((test, 60.0) for test in sorted(tests[file])))])
        for file in sorted(tests)
    ]
