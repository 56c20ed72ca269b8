"""The promise while weights come by a transport, or amid samples that are half drawn."""

import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from samebit.recipes.launch.updates import Source, connect, why_not_here
from samebit.recipes.verification.subject import Result, Subject, flat
from samebit.rollout.engine_weights import PAUSE_MODES
from samebit.rollout.types import Completion
from samebit.weight_sync.transports.alias import AliasLease
from samebit.weight_sync.transports.registry import FROM_ONE


def transports(subject: Subject) -> Result:
    """Other weights and the first ones again, by every transport that is for one process."""
    result = Result("update by transport")
    params = {name: tensor.clone() for name, tensor in subject.engine.weights.items()}
    source = Source(params, list(subject.engine.specs))
    for name in sorted(FROM_ONE):
        if reason := why_not_here(name, subject.device):
            result.untried.append(reason)
        else:
            result.compare(_updated_twice(subject, source, name), subject.truth(), name)
    few = replace(source, rows=slice(1))
    found = _updated_twice(subject, few, "gloo", delta=True)
    result.compare(found, subject.truth(), "gloo, of the second version what has changed")
    return result


def _updated_twice(
    subject: Subject, source: Source, transport: str, **settings: Any
) -> list[Completion]:
    """What an engine draws by the weights that it was given last."""
    with tempfile.TemporaryDirectory(prefix="samebit_verify_") as folder:
        place = subject.model_path, subject.engine.config, Path(folder) / "weights"
        engine, weights = connect(transport, source, *place, **settings)
        with closing(engine), closing(weights):
            for _ in range(2):
                weights.lease(source.step + 1)
                source.change()
                weights.update(source.params, source.version.digest)
            return flat(subject.generate(engine))


def pauses(subject: Subject) -> Result:
    """Paused in mid-flight in each mode, while the same weights come as another version."""
    result = Result("pause and continue")
    for mode in PAUSE_MODES:
        engine = subject.make_engine(prefix_cache=False)
        place = {
            engine.add_request(prompt, subject.params[i], subject.sample_ids[i]): i
            for i, prompt in enumerate(subject.prompts)
        }
        done = [group for _ in range(2) for group in engine.step()]
        late = "" if len(done) < len(place) else f"{mode}: all were done before"
        engine.pause_generation(mode)
        version, lease = engine.weight_version, AliasLease(engine.sink)
        lease.lease(version.step + 1)
        lease.update(engine.weights, version.digest)
        engine.continue_generation()
        while engine.has_unfinished_requests:
            done += engine.step()
        done.sort(key=lambda group: place[group[0].request_id])
        truth = subject.truth()
        if mode == "abort":  # what it had drawn
            pairs = zip(flat(done), truth, strict=True)
            truth = [_beginning(whole, len(found.token_ids)) for found, whole in pairs]
        result.compare(flat(done), truth, mode, late)
        result.compare(flat(subject.generate(engine)), subject.truth(), f"after {mode}")
    return result


def _beginning(completion: Completion, num_tokens: int) -> Completion:
    tokens, logprobs = completion.token_ids[:num_tokens], completion.logprobs[:num_tokens]
    return replace(completion, token_ids=tokens, logprobs=logprobs)
