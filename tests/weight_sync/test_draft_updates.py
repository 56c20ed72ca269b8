"""A draft is updated by itself: no update of it moves the target or a token, nor the reverse."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_same_bits
from pauses import add, finish, step_until
from serving import SETTINGS, SIZES, local_engine, served

from samebit.kernels.memory import ReleasedError
from samebit.recipes.verification.speculation import write_random_draft
from samebit.rollout.draft_side import DraftSide
from samebit.rollout.engine import Engine
from samebit.rollout.models.draft.config import Verifier
from samebit.rollout.models.draft.vocabulary import DraftVocabulary
from samebit.rollout.models.registry import load_model_config
from samebit.rollout.remote import RemoteEngine
from samebit.rollout.runtime.draft_folder import open_draft, write_draft
from samebit.rollout.runtime.weights import load_dummy
from samebit.weight_sync.digest import weights_digest
from samebit.weight_sync.mapping import hf_tensors
from samebit.weight_sync.transports.copy import CopyTransport
from samebit.weight_sync.transports.file import FileTransport, write_hf_folder
from samebit.weight_sync.transports.remote import GlooTransport
from samebit.weight_sync.transports.with_draft import WithDraft
from samebit.weight_sync.types import WeightSyncError, WeightVersion

DRAFTING = SETTINGS | {"adaptive_drafts": False}


@pytest.fixture(scope="module")
def folder(qwen3_path, tmp_path_factory):
    """A draft of the random Qwen3 that knows nothing. Do not write to it."""
    path = tmp_path_factory.mktemp("draft") / "draft"
    write_random_draft(path, load_model_config(qwen3_path))
    return path


@pytest.fixture(scope="module")
def draft(folder):
    """(config, vocabulary, specs) of it."""
    found = open_draft(folder)
    return SimpleNamespace(
        config=found.config, vocabulary=found.vocabulary, specs=found.config.param_specs()
    )


class Weights:
    """A full set of a draft's, as a transport's source."""

    def __init__(self, specs, seed, step=0):
        self.specs, self.step = specs, step
        self.params = {spec.name: torch.empty(spec.shape) for spec in specs}
        load_dummy(specs, self.params, seed, std=0.2)

    def digest(self):
        return weights_digest(self.specs, self.params)

    def named(self):
        """As frameworks send them."""
        return [(f"draft.{name}", x) for name, x in hf_tensors(self.specs, self.params)]


@pytest.fixture(scope="module")
def better(draft):
    return Weights(draft.specs, seed=7)


@pytest.fixture
def make(qwen3_path, folder):
    def make(speculative="eagle3", kind=Engine, **settings):
        own = {"speculative": speculative, "draft_model": str(folder)}
        return kind(qwen3_path, **DRAFTING | own | settings)

    return make


@pytest.fixture
def engine(make):
    return make()


@pytest.fixture(scope="module")
def truth(qwen3_path):
    return served(local_engine(qwen3_path))


def guesses(engine, draw=served):
    """What it draws, and what was guessed meanwhile."""
    engine.flush_cache()
    proposer, seen = engine.speculation.proposer, []
    propose = type(proposer).propose

    def recording(contexts):
        found = propose(proposer, contexts)
        seen.extend((c.sample.sample_id, len(c.token_ids), list(p.token_ids))
                    for c, p in zip(contexts, found, strict=True))  # fmt: skip
        return found

    proposer.propose = recording
    try:
        return draw(engine), sorted(seen)
    finally:
        del proposer.propose


def test_a_draft_is_replaced_in_place(make, better, truth, draft, tmp_path):
    """It guesses as an engine does that was made with it, and the target stays as it was."""
    write_draft(tmp_path / "better", draft.config, draft.vocabulary, better.params)
    other, own = make(draft_model=str(tmp_path / "better")), make()
    before = own.weight_version
    drawn, guessed = guesses(own)
    assert drawn == truth
    assert own.draft_version == WeightVersion(0, own.digest("draft"))
    version = own.copy_weights(better.params, 3, better.digest(), "draft")
    assert version == own.draft_version == WeightVersion(3, better.digest())
    assert own.weight_version == before == WeightVersion(0, own.digest())
    for name, param in better.params.items():
        assert_same_bits(own.draft_control.params[name], param, name)
    drawn, again = guesses(own)
    assert drawn == truth
    assert again == guesses(other)[1] != guessed
    assert any(ids for _, _, ids in again)


def test_an_update_of_the_target_leaves_the_draft(engine, better, old, new, expected):
    """Also one of all to which no tensor of the draft comes, as frameworks send it."""
    kept = {name: param.clone() for name, param in engine.draft_control.params.items()}
    version = engine.draft_version
    engine.copy_weights(new.params, step=1, digest=new.digest)
    assert served(engine) == expected[new.digest]
    for selector in ("all", "target"):
        engine.begin_weight_update(selector)
        engine.update_weights_from_tensor(list(hf_tensors(old.specs, old.params)))
        engine.end_weight_update(old.digest)
    assert engine.weight_version == WeightVersion(3, old.digest)
    assert engine.draft_version == version
    for name, param in engine.draft_control.params.items():
        assert_same_bits(param, kept[name], name)
    assert set(engine.weight_report("draft").values()) == {"old"}
    assert served(engine) == expected[old.digest]


def test_an_update_of_both_and_one_of_the_draft_alone(engine, better, old, new, expected):
    """Under one step; each has the digest of its own weights."""
    engine.begin_weight_update("all", step=4)
    own = [(name.removeprefix("draft."), tensor) for name, tensor in better.named()]
    engine.update_weights_from_tensor(own[:3], selector="draft", weight_version="4")
    engine.update_weights_from_tensor([*hf_tensors(new.specs, new.params), *better.named()[3:]])
    assert engine.end_weight_update(new.digest, better.digest()) == WeightVersion(4, new.digest)
    assert engine.draft_version == WeightVersion(4, better.digest())
    assert served(engine) == expected[new.digest]
    for name, param in better.named():
        assert_same_bits(engine.get_weights_by_name(name), param, name)
    engine.begin_weight_update("draft")
    engine.update_weights_from_tensor(own, selector="draft")
    with pytest.raises(ValueError, match="draft_digest is given, and the update has not brought"):
        engine.end_weight_update(draft_digest=better.digest())
    assert engine.end_weight_update(better.digest()) == WeightVersion(5, better.digest())
    assert engine.weight_version == WeightVersion(4, new.digest)


def test_a_draft_that_is_ahead_joins_an_update_of_both(engine, better, old, new, expected):
    """Its own updates may have taken it further than the target's next step."""
    for step in (1, 2):
        version = engine.copy_weights(better.params, step, selector="draft")
        assert version.step == engine.draft_version.step == step
    engine.begin_weight_update("all")
    engine.update_weights_from_tensor([*hf_tensors(new.specs, new.params), *better.named()])
    assert engine.end_weight_update() == WeightVersion(1, new.digest)
    assert engine.draft_version == WeightVersion(1, better.digest())
    assert served(engine) == expected[new.digest]


def test_what_is_refused_is_over_with_the_next_session(engine, better, old, new, expected):
    """Of both models: a session of the target alone heals it, and says nothing of the draft."""
    engine.begin_weight_update("all")
    with pytest.raises(WeightSyncError, match="unknown tensor"):
        engine.update_weights_from_tensor([*better.named(), ("nope", torch.zeros(1))])
    engine.begin_weight_update("target")
    engine.update_weights_from_tensor(list(hf_tensors(new.specs, new.params)))
    assert engine.end_weight_update() == WeightVersion(1, new.digest)
    assert served(engine) == expected[new.digest]
    assert engine.draft_version.step == 0
    engine.begin_weight_update("draft", step=3)
    with pytest.raises(WeightSyncError, match="an update of draft is under way; end it first"):
        engine.begin_weight_update("target")
    engine.update_weights_from_tensor(better.named())
    assert engine.end_weight_update() == WeightVersion(3, better.digest())


def update_badly(engine, better, how):
    """An update of the draft that one thing is wrong with."""
    named = better.named()
    name, tensor = named[0]
    firsts = {
        "missing": [],
        "not finite": [(name, torch.full_like(tensor, float("nan")))],
        "misshapen": [(name, tensor[1:])],
    }
    engine.begin_weight_update("draft")
    engine.update_weights_from_tensor([*firsts.get(how, named[:1]), *named[1:]])
    engine.end_weight_update("0" * 16)


@pytest.mark.parametrize("how", ["missing", "not finite", "misshapen", "another digest"])
@pytest.mark.parametrize("speculative", ["eagle3", "hybrid"])
def test_a_broken_update_of_a_draft_moves_no_token(make, better, truth, how, speculative):
    """It is refused with the reason; until a full one commits nothing is guessed by the draft."""
    engine = make(speculative)
    assert served(engine) == truth
    reasons = {"missing": "1 tensors never arrived", "not finite": "NaN or Inf in 1 tensors"}
    reason = reasons.get(how, "here and" if how == "misshapen" else "digest .* at the sender")
    with pytest.raises(WeightSyncError, match=f"update of the draft to step 1 refused: .*{reason}"):
        update_badly(engine, better, how)
    assert (engine.draft_version.step, engine.weight_version.step) == (0, 0)
    assert set(engine.weight_report("draft").values()) != {"old"} or how == "misshapen"
    tokens, seen = guesses(engine)
    assert tokens == truth
    if speculative == "eagle3":
        assert not any(ids for _, _, ids in seen)
    engine.copy_weights(better.params, 1, better.digest(), "draft")
    tokens, seen = guesses(engine)
    assert tokens == truth
    assert any(ids for _, _, ids in seen)


def test_what_is_of_another_model_breaks_the_update(engine, better, new):
    """Whoever does not know of the draft cannot overwrite it, nor the other way round."""
    target = list(hf_tensors(new.specs, new.params))
    for selector, named in (("target", better.named()), ("draft", target)):
        engine.begin_weight_update(selector)
        other = "draft" if selector == "target" else "target"
        with pytest.raises(WeightSyncError, match="end it first"):
            engine.begin_weight_update(other)
        with pytest.raises(WeightSyncError, match="is of another model than the update"):
            engine.update_weights_from_tensor(named)
        with pytest.raises(WeightSyncError, match="is of another model than the update"):
            engine.end_weight_update()
        assert set(engine.weight_report(other).values()) == {"old"}
    engine.copy_weights(new.params, 5)
    engine.served("draft").copy_weights(better.params, 5, None)


def test_selectors(engine, qwen3_path):
    """One that is unknown, and a draft where there is none."""
    with pytest.raises(ValueError, match="selector 'drafter' is unknown; use one of all, target"):
        engine.begin_weight_update("drafter")
    with pytest.raises(ValueError, match="selector 'all' is unknown; use one of target, draft"):
        engine.copy_weights({}, 1, selector="all")
    alone = local_engine(qwen3_path)
    assert alone.draft_version is None
    for call in (alone.begin_weight_update, alone.weight_report, alone.digest):
        with pytest.raises(WeightSyncError, match="'draft': no draft model is served, the target"):
            call("draft")
    alone.begin_weight_update("all")
    with pytest.raises(WeightSyncError, match="unknown tensor draft.fc.weight"):
        alone.update_weights_from_tensor([("draft.fc.weight", torch.zeros(1))])


def test_a_draft_changes_while_samples_wait(engine, better, qwen3_path):
    """Their keys by the draft before stay; what they draw is what they always would have."""
    plain = local_engine(qwen3_path)
    expected = finish(plain, add(plain))
    names = add(engine)
    step_until(engine, names[0], 5)
    with pytest.raises(WeightSyncError, match="a weight update needs an idle engine"):
        engine.copy_weights(better.params, 1, selector="draft")
    engine.pause_generation("keep")
    engine.copy_weights(better.params, 1, selector="draft")
    engine.continue_generation()
    for group, right in zip(finish(engine, names), expected, strict=True):
        for c, e in zip(group, right, strict=True):
            assert (c.token_ids, c.logprobs) == (e.token_ids, e.logprobs)
            assert [span.version.step for span in c.version_spans] == [0]


def test_a_draft_breaks_while_samples_wait(engine, better):
    """What was computed for their next guesses is not guessed by, and they draw on."""
    names = add(engine)
    step_until(engine, names[0], 5)
    engine.pause_generation("keep")
    with pytest.raises(WeightSyncError, match="NaN or Inf"):
        update_badly(engine, better, "not finite")
    engine.continue_generation()
    groups, seen = guesses(engine, lambda engine: finish(engine, names))
    assert all(len(c.token_ids) == 12 for group in groups for c in group)
    assert seen
    assert not any(ids for _, _, ids in seen)


def test_released_memory_of_a_draft(engine, better, new, truth, expected):
    """It comes back as it was; without it the target can be updated, and the draft cannot."""
    assert served(engine) == truth
    digest = engine.digest("draft")
    engine.release_memory_occupation()
    with pytest.raises(ReleasedError, match="draft"):
        engine.digest("draft")
    with pytest.raises(WeightSyncError, match="the memory of draft is released; resume it first"):
        engine.begin_weight_update("draft")
    engine.resume_memory_occupation(["weights"])
    engine.copy_weights(new.params, 1, new.digest)
    engine.resume_memory_occupation()
    assert engine.digest("draft") == digest == engine.draft_version.digest
    assert served(engine) == expected[new.digest]
    engine.begin_weight_update("draft")
    with pytest.raises(WeightSyncError, match="memory of draft cannot be released: an update"):
        engine.release_memory_occupation(["draft"])


def test_a_folder_of_the_same_draft(engine, better, draft, tmp_path):
    """Of either dialect, or of weights alone under a version; none of another draft."""
    for dialect in ("sglang", "speculators"):
        config = replace(draft.config, verifier=Verifier("x", ("Qwen3ForCausalLM",)))
        write_draft(tmp_path / dialect, config, draft.vocabulary, better.params, dialect)
        version = engine.update_weights_from_disk(tmp_path / dialect, selector="draft")
        assert version.digest == better.digest()
    write_hf_folder(
        tmp_path / "alone", draft.specs, better.params, WeightVersion(9, better.digest())
    )
    version = engine.update_weights_from_disk(tmp_path / "alone", selector="draft")
    assert version == WeightVersion(9, better.digest())
    size = draft.config.draft_vocab_size
    others = DraftVocabulary(torch.arange(size) + 1, draft.config.vocab_size)
    write_draft(tmp_path / "others", draft.config, others, better.params)
    with pytest.raises(ValueError, match="others holds another draft's vocabulary"):
        engine.update_weights_from_disk(tmp_path / "others", selector="draft")
    with pytest.raises(ValueError, match="config.json: architectures is"):
        engine.update_weights_from_disk(engine.model_path, selector="draft")
    assert engine.draft_version == version


def test_transports_of_this_process(engine, better, draft, new, old, expected, tmp_path):
    """The target and its draft under one step; a draft that was not trained does not go again."""
    for step, kind in enumerate((CopyTransport, FileTransport), start=1):
        source, side = Weights(draft.specs, seed=step), DraftSide(engine)
        target = SimpleNamespace(step=0, params=new.params, specs=new.specs)
        own = FileTransport.between(target, engine, tmp_path / "target")
        both = WithDraft(own, kind.between(source, side, tmp_path / "draft"), source)
        both.lease(2 * step)
        assert both.update(new.params, new.digest) == WeightVersion(2 * step, new.digest)
        assert engine.draft_version == WeightVersion(2 * step, source.digest())
        assert side.weight_version == engine.draft_version
        assert_same_bits(side.weights["draft.fc.weight"], source.params["draft.fc.weight"])
        both.lease(2 * step + 1)
        both.update(old.params, old.digest)
        assert engine.weight_version == WeightVersion(2 * step + 1, old.digest)
        assert engine.draft_version.step == 2 * step
        both.close()
    assert served(engine) == expected[old.digest]


def test_a_draft_that_is_refused_leaves_the_target_served(engine, draft, new, expected):
    """The error is the draft's; tokens are the new target's, and nothing is guessed."""
    source = Weights(draft.specs, seed=5)
    target = SimpleNamespace(
        lease=lambda step: None, update=lambda p, d: engine.copy_weights(p, 1, d)
    )
    both = WithDraft(target, CopyTransport.between(source, DraftSide(engine), None), source)
    source.params["draft.fc.weight"][0, 0] = float("inf")
    both.lease(1)
    with pytest.raises(WeightSyncError, match="NaN or Inf in 1 tensors: draft.fc.weight"):
        both.update(new.params, new.digest)
    assert guesses(engine)[0] == expected[new.digest]
    source.params["draft.fc.weight"][0, 0] = 0.0
    both.update(new.params, new.digest)  # of the same step of the draft: it had not arrived
    assert engine.draft_version == WeightVersion(1, source.digest())


@SIZES
def test_engines_in_other_processes(size, make, draft, old, new, expected, tmp_path):
    """Target and draft each over a weight group of their own, and by folders."""
    remote = make(kind=RemoteEngine, num_ranks=size)
    try:
        source, side = Weights(draft.specs, seed=3), DraftSide(remote)
        target = SimpleNamespace(step=0, params=new.params, specs=new.specs)
        own = GlooTransport.between(target, remote, tmp_path, timeout_s=60)
        both = WithDraft(own, GlooTransport.between(source, side, tmp_path, timeout_s=60), source)
        both.lease(3)
        both.update(new.params, new.digest)
        assert remote.draft_version == WeightVersion(3, source.digest())
        assert served(remote) == expected[new.digest]
        source.params["draft.fc.weight"][0, 0] = float("nan")
        source.step += 1
        both.lease(4)
        with pytest.raises(WeightSyncError, match="NaN or Inf in 1 tensors: draft.fc.weight"):
            both.update(old.params, old.digest)
        assert served(remote) == expected[old.digest]
        assert remote.accept_lengths.verifications > 0
        both.close()
        other = Weights(draft.specs, seed=4)
        way = FileTransport.between(other, side, tmp_path / "file")
        way.lease(5)
        way.update(other.params, other.digest())
        assert remote.draft_version == WeightVersion(5, other.digest())
        assert set(remote.weight_report("draft").values()) == {"old"}
    finally:
        remote.close()
