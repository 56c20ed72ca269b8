"""Engine and trainer take turns with memory: what is resident in each phase, and the plan of it."""

from contextlib import closing

import pytest
import torch
from run_children import open_run, roll_out, update

from samebit.kernels.memory import ReleasedError
from samebit.recipes.config import ConfigError
from samebit.recipes.grpo import GrpoRecipe
from samebit.recipes.launch import placement
from samebit.recipes.run.inputs import GrpoInputs
from samebit.recipes.run.metrics import read_rows
from samebit.recipes.run.phase_ledger import MemoryPlanError
from samebit.rollout.types import SamplingParams
from samebit.weight_sync.types import WeightSyncError

RELEASE = "placement.release_memory=true"
GIB = 2**30


def resident(recipe):
    taken = recipe.engine.memory_occupation() | recipe.trainer.memory_occupation()
    return {tag: found.resident for tag, found in taken.items()}


def test_gradients_and_keys_take_turns(runs, monkeypatch):
    run = runs.resolve("turns", RELEASE)
    with open_run(run) as session, closing(GrpoRecipe(run, session)) as recipe:
        size = {
            tag: found.reserved
            for tag, found in (
                recipe.engine.memory_occupation() | recipe.trainer.memory_occupation()
            ).items()
        }
        assert size.keys() == {"kv_cache", "gradients", "optimizer"}
        assert all(size.values())
        drawing, training = size | {"gradients": 0}, size | {"kv_cache": 0}
        assert resident(recipe) == drawing
        with pytest.raises(ReleasedError, match="memory of gradients is released"):
            recipe.trainer.train_step([], recipe.algorithm)
        seen, train_step = [], recipe.trainer.train_step

        def watched(*arguments):
            seen.append(resident(recipe))
            with pytest.raises(WeightSyncError, match="memory of kv_cache is released"):
                recipe.engine.generate([[1]], SamplingParams(max_new_tokens=1))
            return train_step(*arguments)

        monkeypatch.setattr(recipe.trainer, "train_step", watched)
        update(recipe, roll_out(recipe, 0))
        assert seen == [training]
        assert resident(recipe) == drawing
        found = recipe.ledger.metrics()
        for phase, taken in (("rollout", drawing), ("train", training)):
            for tag, num_bytes in taken.items():
                assert found.pop(f"perf/{phase}_{tag}_gib") == num_bytes / GIB
            own = sum(param.nbytes for param in recipe.engine.weights.values())
            assert found.pop(f"perf/{phase}_weights_gib") == own / GIB
        assert found.keys() == {"perf/switch_to_train_s", "perf/switch_to_rollout_s"}


def test_a_run_that_releases_nothing_has_all_resident(runs):
    run = runs.resolve("beside")
    with open_run(run) as session, closing(GrpoRecipe(run, session)) as recipe:
        update(recipe, roll_out(recipe, 0))
        found, taken = recipe.ledger.metrics(), resident(recipe)
        assert all(taken.values())
        for tag, num_bytes in taken.items():
            assert found[f"perf/train_{tag}_gib"] == found[f"perf/rollout_{tag}_gib"]
            assert found[f"perf/train_{tag}_gib"] == num_bytes / GIB


@pytest.mark.parametrize(("phase", "tag"), [("train", "kv_cache"), ("rollout", "gradients")])
def test_what_is_not_as_planned_ends_the_step(runs, monkeypatch, phase, tag):
    """A release that releases nothing, and says that it has."""
    run = runs.resolve("spoiled", RELEASE)
    with open_run(run) as session, closing(GrpoRecipe(run, session)) as recipe:
        ledger = recipe.ledger
        if phase == "rollout":
            ledger.enter("train")
        owner = recipe.engine if phase == "train" else recipe.trainer
        name = "release_memory_occupation" if phase == "train" else "release_memory"
        monkeypatch.setattr(owner, name, lambda tags: dict.fromkeys(tags, 1))
        message = rf"phase {phase}: [1-9]\d* bytes of {tag} are resident; the plan is 0"
        with pytest.raises(MemoryPlanError, match=message):
            ledger.enter(phase)


def test_memory_that_stays_away_is_named(runs, monkeypatch):
    run = runs.resolve("away", RELEASE)
    with open_run(run) as session, closing(GrpoRecipe(run, session)) as recipe:
        monkeypatch.setattr(recipe.trainer, "resume_memory", lambda tags: {})
        with pytest.raises(MemoryPlanError, match=r"phase train: 0 bytes of gradients .* is [1-9]"):
            recipe.ledger.enter("train")


def test_the_figures_are_logged_and_drawn(runs):
    runs.train("logged", RELEASE, "trainer.num_steps=2")
    folder = runs.folder / "logged"
    for row in read_rows(folder / "metrics.jsonl")[1:]:
        assert row["perf/train_kv_cache_gib"] == 0 < row["perf/rollout_kv_cache_gib"]
        assert row["perf/rollout_gradients_gib"] == 0 < row["perf/train_gradients_gib"]
        assert {"perf/switch_to_train_s", "perf/switch_to_rollout_s"} < row.keys()
    page = (folder / "report.html").read_text()
    for text in ("KV cache, training", "gradients, drawing", "switch_to_train"):
        assert text in page


@pytest.mark.parametrize(
    ("device", "settings", "why_not", "releases"),
    [
        ("cuda", [], "", True),
        ("cuda", [], "there is no compiler", False),
        ("cuda", ["placement.release_memory=false"], "", False),
        ("cuda", ["engine.releasable=false"], "", False),
        ("cuda", ["placement=process"], "", False),
        ("cpu", [], "", False),
        ("cpu", [RELEASE], "", True),
    ],
)
def test_memory_changes_hands_on_a_gpu_or_where_asked_for(
    runs, monkeypatch, device, settings, why_not, releases
):
    monkeypatch.setattr(placement, "why_not_releasable", lambda _: why_not)
    run = runs.resolve("where", *settings)
    assert placement.releases_memory(run, torch.device(device)) is releases


def test_where_memory_cannot_change_hands_a_demand_is_refused(runs, monkeypatch):
    monkeypatch.setattr(placement, "why_not_releasable", lambda _: "there is no compiler")
    run = runs.resolve("where", RELEASE)
    with pytest.raises(ValueError, match="release_memory=true cannot be: there is no compiler"):
        placement.releases_memory(run, torch.device("cuda"))
    with pytest.raises(ValueError, match="release_memory=true cannot be: there is no compiler"):
        GrpoInputs(run)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["placement=process", "placement.release_memory=true"],
            "placement.release_memory is True; it must be unset or false with placement.engine=pro",
        ),
        (
            [RELEASE, "engine.releasable=false"],
            "engine.releasable is False; it must be left alone with placement.release_memory=true",
        ),
        (
            ["engine.kv_memory_fraction=0.5", "engine.kv_cache_tokens=4096"],
            "engine.kv_memory_fraction is 0.5; it must be unset with kv_cache_tokens=4096",
        ),
        (["engine.weights_backup=true"], "engine.weights_backup is True"),
        (["engine.kv_memory_fraction=1.5"], "engine.kv_memory_fraction is 1.5; it must be above 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(runs, settings, message):
    with pytest.raises(ConfigError, match=message):
        runs.resolve("refused", *settings)
