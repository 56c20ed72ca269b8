"""Which transport a run gets: by name, or one of the user's own; and what cannot be one."""

from contextlib import closing

import pytest
from run_children import open_run, roll_out, update

from samebit.recipes.grpo import GrpoRecipe
from samebit.recipes.launch.placement import load_transport
from samebit.weight_sync.transports.base import WeightSync
from samebit.weight_sync.transports.registry import TRANSPORTS

OWN = """
from samebit.weight_sync.transports.base import SinkTransport
from samebit.weight_sync.buckets import cut_buckets, pack

class Slow(SinkTransport):
    @classmethod
    def between(cls, source, engine, folder):
        return cls(engine.sink)

    def send(self, params):
        for metas in cut_buckets(params, 1):
            self._sink.receive(pack(metas, params))

nothing = 3
"""


@pytest.fixture(autouse=True)
def own_module(tmp_path, monkeypatch):
    """A file of the user's beside samebit."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "own_transport.py").write_text(OWN)
    (folder / "own_broken.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(folder)


@pytest.mark.parametrize("name", TRANSPORTS)
def test_every_name_is_a_class(name):
    """A misspelled path would be found when somebody asks for it."""
    assert issubclass(load_transport(name), WeightSync)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere:Slow", "cannot be imported: No module named 'nowhere'; put its folder on"),
        (":Slow", "cannot be imported: ValueError.'Empty module name'"),
        ("own_broken:Slow", "cannot be imported: ZeroDivisionError"),
        ("own_transport:Fast", "cannot be imported: .*has no attribute 'Fast'"),
        ("own_transport:nothing", "give a subclass of Lease or Transport"),
        ("own_transport:pack", "give a subclass of Lease or Transport"),
    ],
)
def test_what_is_no_transport_is_refused_before_anything_is_removed(runs, name, reason):
    """Told by name, when inputs are checked."""
    with pytest.raises(ValueError, match=f"placement.transport is '{name}'.*{reason}"):
        runs.train("refused", f"placement.transport={name}")
    assert not (runs.folder / "refused").exists()


def test_a_transport_of_ones_own_serves_each_step(runs):
    """One class in a file outside the package, and no line inside it."""
    run = runs.resolve("own", "placement.transport=own_transport:Slow")
    with open_run(run) as session, closing(GrpoRecipe(run, session)) as recipe:
        for step in range(2):
            [stats] = update(recipe, roll_out(recipe, step))
            assert stats.logprob_mismatches == 0
            assert recipe.engine.weight_version.digest == recipe.trainer.digest()
            recipe.progress.step += 1
