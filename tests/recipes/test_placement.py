"""Which transport a run gets: by name, or one of the user's own; and what cannot be one."""

import math
from collections import Counter
from contextlib import closing

import pytest
from helpers import recorded_reads
from run_children import open_run, roll_out, update

from samebit.kernels.memory import Arena
from samebit.recipes.grpo import GrpoRecipe
from samebit.recipes.launch.placement import load_transport
from samebit.rollout.models.registry import load_model_config
from samebit.weight_sync.mapping import hf_shapes
from samebit.weight_sync.transports.base import WeightSync
from samebit.weight_sync.transports.registry import TRANSPORTS

OWN = """
from samebit.weight_sync.transports.base import Lease, SinkTransport
from samebit.weight_sync.buckets import cut_buckets, pack

class Slow(SinkTransport):
    @classmethod
    def between(cls, source, engine, folder):
        return cls(engine.sink)

    def send(self, params):
        for metas in cut_buckets(params, 1):
            self._sink.receive(pack(metas, params))

class Shared(Lease):
    @classmethod
    def between(cls, source, engine, folder):
        return cls(engine.sink)

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


@pytest.mark.parametrize(("name", "gpus"), [("nccl", 2), ("ipc", 1)])
def test_a_transport_between_gpus_is_refused_where_there_are_too_few(runs, name, gpus):
    """Before anything is removed, and not by NCCL in the midst of the first step."""
    words = ["placement=process", f"placement.transport={name}", "device=cpu"]
    reason = f"placement.transport: {name} needs CUDA devices: {gpus}, there are 0"
    with pytest.raises(ValueError, match=reason):
        runs.train("refused", *words)
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


@pytest.mark.parametrize("name", ["alias", "file", "own_transport:Slow", "own_transport:Shared"])
def test_a_run_reads_the_folder_once(runs, demo_model, monkeypatch, name):
    """The trainer does; the engine gets its weights from it, before anything is asked of it."""
    reads = recorded_reads(monkeypatch)
    run = runs.resolve(f"once {name}".replace(":", " "), f"placement.transport={name}")
    with open_run(run) as session, closing(GrpoRecipe(run, session)) as recipe:
        assert recipe.engine.weight_version.digest == recipe.trainer.digest()
        assert recipe.engine.weight_version.step == 0
        [stats] = update(recipe, roll_out(recipe, 0))
        assert stats.logprob_mismatches == 0
        own = recipe.engine.weights
        shared = [p.data_ptr() == own[n].data_ptr() for n, p in recipe.trainer.params.items()]
        assert shared == [name in ("alias", "own_transport:Shared")] * len(own)
    specs = load_model_config(demo_model).param_specs()
    num_bytes = 4 * sum(math.prod(shape) for shape in hf_shapes(specs).values())
    read = Counter()
    for folder, count in reads:
        read[folder] += count
    assert read[demo_model] == num_bytes


@pytest.mark.parametrize("name", ["alias", "own_transport:Shared"])
def test_a_leased_engine_is_made_on_the_trainers_weights(runs, monkeypatch, name):
    """It never has weights of its own: the largest model that fits would not, for a moment."""
    allocated = []
    original = Arena.allocate

    def allocate(arena, tag, *rest):
        allocated.append(tag)
        return original(arena, tag, *rest)

    monkeypatch.setattr(Arena, "allocate", allocate)
    run = runs.resolve(f"leased {name}".replace(":", " "), f"placement.transport={name}")
    with open_run(run) as session, closing(GrpoRecipe(run, session)):
        pass
    assert allocated
    assert "weights" not in allocated
