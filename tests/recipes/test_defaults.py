"""Every default of every command as text: a changed one changes what all runs do."""

from pathlib import Path

import pytest

from samebit.recipes.cli.compose import resolve
from samebit.recipes.run.secrets import to_yaml

STORED = Path(__file__).resolve().parents[1] / "golden" / "defaults"
NEEDED = {
    "grpo": ["model.path=m"],
    "sft": ["model.path=m", "trainer.batch_size=8"],
    "dpo": ["model.path=m", "trainer.batch_size=8"],
    "eagle3": ["model.path=m"],
    "demo": ["device=cpu"],
    "verify": [],
    "export": ["checkpoint=c", "model=m", "out=o"],
}


@pytest.mark.parametrize("command", NEEDED)
def test_defaults_are_those_stored(command):
    """Where one is meant to change, so does its file."""
    assert to_yaml(resolve(command, NEEDED[command])) == (STORED / f"{command}.yaml").read_text()
