"""What is wrong with records, told together."""

SHOWN = 5


class Faults:
    """Counts what is wrong, and keeps the first few."""

    def __init__(self) -> None:
        self._count = 0
        self._first: list[str] = []

    def __bool__(self) -> bool:
        return self._count > 0

    def add(self, fault: str) -> None:
        """Count one more record that cannot be used, which `fault` names."""
        self._count += 1
        if self._count <= SHOWN:
            self._first.append(fault)

    def raise_all(self) -> None:
        """Raise ValueError, in one line, if there is any."""
        if self._count == 1:
            raise ValueError(self._first[0])
        if self._count:
            rest = self._count - len(self._first)
            more = [f"and {rest} more"] if rest else []
            shown = "; ".join([*self._first, *more])
            raise ValueError(f"{self._count} records cannot be used: {shown}")
