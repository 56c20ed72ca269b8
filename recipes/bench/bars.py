"""What samebit is held to on two cards with one model; elsewhere a figure stands alone."""

from dataclasses import dataclass

_MODEL = "qwen3-8b"
_FREE_GIB = {"H100": 77.0, "H200": 137.0}
RELEASE_MS, RESUME_MS, BACK_GIB_S = 100.0, 100.0, 40.0
WINDOW_MS, TRANSFER_MS = {"nccl": 150.0}, {"nccl": 70.0}
UPDATE_MS = {"alias": 10.0, "ipc": 60.0}


@dataclass(frozen=True)
class Bars:
    """Sets bars beside figures where card and model are those that they are of."""

    card: str
    """The device's whole name."""
    model: str
    """The name of its folder."""

    @property
    def kind(self) -> str | None:
        """The card that bars are of; None: there are none here."""
        kinds = [kind for kind in _FREE_GIB if kind in self.card.split()]
        return kinds[0] if kinds and self.model.lower() == _MODEL else None

    @property
    def free_gib(self) -> float | None:
        """With everything released."""
        return None if self.kind is None else _FREE_GIB[self.kind]

    def beside(self, value: float, bar: float | None, least: bool = False) -> str:
        """A figure with its bar: the most that it may be, or the least."""
        if bar is None or self.kind is None:
            return f"{value:,.1f}"
        sign, holds = (">=", value >= bar) if least else ("<=", value <= bar)
        return f"{value:,.1f} ({sign} {bar:g}{'' if holds else ' MISSED'})"
