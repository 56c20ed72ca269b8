"""Semantic mutants: small lies in the code, each with the tests that notice it.

A table is a TOML file beside this one with entries of these keys:

    [[mutants]]
    name = "..."         unique over all tables
    file = "..."         from the repository's root
    old = '''...'''      text that stands exactly once in the file
    new = '''...'''      what stands there instead; the code still runs
    why = "..."          what its user would get
    killed_by = [...]    tests of the default suite as file::function
    equivalent = "..."   instead of killed_by: why no result can tell it from the original
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]


@dataclass(frozen=True, kw_only=True)
class SemanticMutant:
    """One entry of a table."""

    name: str
    file: str
    old: str
    new: str
    why: str
    killed_by: tuple[str, ...] = ()
    equivalent: str = ""

    def __post_init__(self) -> None:
        if bool(self.killed_by) == bool(self.equivalent):
            raise ValueError(f"mutant {self.name}: give either killed_by or equivalent")
        for key in ("name", "old", "why"):
            if not getattr(self, key).strip():
                raise ValueError(f"mutant {self.name}: {key} is empty")
        if self.old == self.new:
            raise ValueError(f"mutant {self.name} changes nothing")

    def text(self, root: Path = ROOT) -> str:
        """The file with the lie in it; ValueError if `old` does not stand there exactly once."""
        original = (root / self.file).read_text(encoding="utf-8")
        if (count := original.count(self.old)) != 1:
            raise ValueError(
                f"mutant {self.name}: its old text stands {count} times in {self.file}"
            )
        return original.replace(self.old, self.new)


def tables() -> dict[str, list[SemanticMutant]]:
    """All tables by name; ValueError for a name that is used twice."""
    found = {}
    seen: set[str] = set()
    for path in sorted(FOLDER.glob("*.toml")):
        entries = tomllib.loads(path.read_text(encoding="utf-8"))["mutants"]
        found[path.stem] = [
            SemanticMutant(**{**e, "killed_by": tuple(e.get("killed_by", ()))}) for e in entries
        ]
        for mutant in found[path.stem]:
            if mutant.name in seen:
                raise ValueError(f"mutant {mutant.name} stands in two places")
            seen.add(mutant.name)
    return found
