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
        if self.killed_by and self.equivalent:
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

    @property
    def line(self) -> int:
        """The first line that differs."""
        before = (ROOT / self.file).read_text(encoding="utf-8").splitlines()
        pairs = zip(before, self.text().splitlines(), strict=False)
        return next((i for i, (old, new) in enumerate(pairs, 1) if old != new), len(before))


def read_table(path: Path) -> list[SemanticMutant]:
    """The entries of one file."""
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["mutants"]
    return [SemanticMutant(**{**e, "killed_by": tuple(e.get("killed_by", ()))}) for e in entries]


def tables() -> dict[str, list[SemanticMutant]]:
    """All tables by name; ValueError for a name that is used twice, or an entry without an end."""
    found = {path.stem: read_table(path) for path in sorted(FOLDER.glob("*.toml"))}
    seen: set[str] = set()
    for mutant in (mutant for entries in found.values() for mutant in entries):
        if mutant.name in seen:
            raise ValueError(f"mutant {mutant.name} stands in two places")
        if not mutant.killed_by and not mutant.equivalent:
            raise ValueError(f"mutant {mutant.name}: give killed_by or equivalent")
        seen.add(mutant.name)
    return found
