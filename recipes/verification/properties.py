"""The promise, property by property: run it another way, and every bit must be the same."""

import asyncio
import random
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from samebit.recipes.data.samples import drawn_sample
from samebit.recipes.verification.speculation import speculation, write_random_draft
from samebit.recipes.verification.subject import NUM_SAMPLES, Result, Subject, flat
from samebit.recipes.verification.weight_properties import pauses, transports
from samebit.rollout.config import EngineConfig
from samebit.rollout.engine import Engine
from samebit.rollout.models.decoder import DenseModel
from samebit.rollout.types import Completion, SamplingParams
from samebit.trainer.packing import pack_samples

Property = Callable[[Subject], Result]

CHUNKS = (1, 15, 16, 17, 63, 64, 65, 128)
CPU_BATCH_EDGES = (1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 63, 65)
GPU_BATCH_EDGES = (
    *range(1, 18), 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513,
)  # fmt: skip


def batch_size(subject: Subject) -> Result:
    """Alone, in small batches and in batches of other company."""
    result = Result("batch size")
    everyone = range(len(subject.prompts))
    engine = subject.make_engine(prefix_cache=False)
    for size in (1, 2, 3, 5):
        for start in range(0, len(subject.prompts), size):
            order = everyone[start : start + size]
            found = flat(subject.generate(engine, order))
            result.compare(found, subject.truth(order), f"size {size}, from prompt {start}")
    return result


def batch_position(subject: Subject) -> Result:
    """Another order, and few sequences at a time."""
    result = Result("position in batch")
    order = list(range(len(subject.prompts)))
    for seed in range(3):
        random.Random(seed).shuffle(order)
        for limit in (256, 7):
            found = subject.run(order, prefix_cache=False, max_num_seqs=limit)
            result.compare(found, subject.truth(order), f"order {seed}, max_num_seqs {limit}")
    return result


def decode_batch(subject: Subject) -> Result:
    """As many decoding sequences as around every edge of a tile or of a table of row counts."""
    result = Result("decode batch edges")
    edges = GPU_BATCH_EDGES if subject.device.type == "cuda" else CPU_BATCH_EDGES
    engine = subject.make_engine(max_num_seqs=max(edges))
    new = min(8, subject.num_new_tokens)
    params = SamplingParams(n=max(edges), max_new_tokens=new, ignore_eos=True)
    prompt = subject.prompts[:3][-1]
    [truth] = engine.generate([prompt], params, [list(range(max(edges)))])
    result.drawn = sum(len(completion.token_ids) for completion in truth)
    for size in edges:
        params = SamplingParams(n=size, max_new_tokens=new, ignore_eos=True)
        [found] = engine.generate([prompt], params, [list(range(size))])
        result.compare(found, truth[:size], f"{size} sequences")
    return result


def prefill_chunk(subject: Subject) -> Result:
    """Prompts computed in chunks of every awkward size."""
    result = Result("prefill chunk")
    for chunk in CHUNKS:
        found = subject.run(prefill_chunk=chunk, prefix_cache=False)
        result.compare(found, subject.truth(), f"chunk {chunk}")
    found = subject.run(max_batch_tokens=37, prefix_cache=False)
    result.compare(found, subject.truth(), "37 tokens a step")
    return result


def prefix_cache(subject: Subject) -> Result:
    """A miss, then hits; and a hit that leaves one token."""
    result = Result("prefix cache")
    for page_size in (1, 2) if subject.is_short else (16, 64):
        engine = subject.make_engine(page_size=page_size)
        cases = ("first run", "second run")
        both = [flat(subject.generate(engine)) for _ in cases]
        assert engine.prefixes is not None
        missed = "" if engine.prefixes.num_hit_tokens else f"page {page_size}: the cache never hit"
        for case, found in zip(cases, both, strict=True):
            result.compare(found, subject.truth(), f"page {page_size}, {case}", missed)
    i = next((i for i, p in enumerate(subject.prompts) if len(p) == 65), None)
    if i is None:
        result.untried.append("the context is too short for a hit that leaves one token")
        return result
    engine = subject.make_engine(page_size=64)
    engine.generate([subject.prompts[i][:64] + [0]], SamplingParams(max_new_tokens=1))
    found = flat(subject.generate(engine, [i]))
    result.compare(found, subject.truth([i]), "64 of 65 tokens cached")
    return result


def page_size(subject: Subject) -> Result:
    """Pages smaller, larger and across the key tile."""
    result = Result("page size")
    for size in (1, 16, 48, 128):
        result.compare(subject.run(page_size=size), subject.truth(), f"page {size}")
    return result


def preemption(subject: Subject) -> Result:
    """Too few pages for everyone: contexts are dropped and computed again."""
    result = Result("preemption")
    page = 1 if subject.is_short else 16
    for cached in (False, True):
        tokens = -(-subject.longest // page) * page * 4
        engine = subject.make_engine(page_size=page, kv_cache_tokens=tokens, prefix_cache=cached)
        found = flat(subject.generate(engine))
        calm = "" if engine.scheduler.num_preemptions else f"cache {cached}: nothing was preempted"
        result.compare(found, subject.truth(), f"cache {cached}", calm)
    return result


def group(subject: Subject) -> Result:
    """The samples of one prompt, one request each."""
    result = Result("group vs single")
    engine = subject.make_engine()
    for s in range(NUM_SAMPLES):
        found = engine.generate(
            subject.prompts,
            [_single(p) for p in subject.params],
            [[ids[s]] for ids in subject.sample_ids],
        )
        result.compare(flat(found), [g[s] for g in subject.baseline], f"sample {s}")
    return result


def _single(params: SamplingParams) -> SamplingParams:
    return SamplingParams(**{**vars(params), "n": 1})


def neighbour_abort(subject: Subject) -> Result:
    """Neighbours that vanish in mid-flight."""
    result = Result("abort of a neighbour")
    doomed = SamplingParams(n=2, max_new_tokens=min(20, subject.num_new_tokens), ignore_eos=True)
    for when in (1, 5):
        engine = subject.make_engine(prefix_cache=False)
        place, neighbours = {}, []
        for i, prompt in enumerate(subject.prompts):
            request = engine.add_request(prompt, subject.params[i], subject.sample_ids[i])
            place[request] = i
            neighbours.append(engine.add_request(prompt[::-1], doomed))
        found: dict[int, list[Completion]] = {}
        steps = aborted = 0
        while engine.has_unfinished_requests:
            for done in engine.step():
                found[place.get(done[0].request_id, -1)] = done
            steps += 1
            if steps == when:
                for request in neighbours:
                    with suppress(KeyError):  # it is done
                        engine.abort_request(request)
                        aborted += 1
        ordered = flat([found[i] for i in range(len(subject.prompts))])
        case = f"abort after {when} steps"
        late = "" if aborted else f"{case}: all were done before"
        result.compare(ordered, subject.truth(), case, late)
    return result


def concurrent_callers(subject: Subject) -> Result:
    """Asynchronous calls that share batches."""
    result = Result("concurrent callers")
    engine = subject.make_engine()

    async def together() -> list[list[list[Completion]]]:
        calls = [
            engine.agenerate([p], [q], [i])
            for p, q, i in zip(subject.prompts, subject.params, subject.sample_ids, strict=True)
        ]
        return await asyncio.gather(*calls)

    found = [completion for [g] in asyncio.run(together()) for completion in g]
    result.compare(found, subject.truth(), "one call a prompt")
    return result


def restart(subject: Subject) -> Result:
    """Another engine on the same weights."""
    result = Result("engine restart")
    for _ in range(2):
        result.compare(flat(subject.generate(subject.make_engine())), subject.truth(), "fresh")
    return result


def weight_update(subject: Subject) -> Result:
    """Before and after an update to the same weights, with cached prefixes dropped."""
    result = Result("identical weight update")
    engine = subject.make_engine()
    subject.generate(engine)
    copies = {name: tensor.clone() for name, tensor in engine.weights.items()}
    engine.copy_weights(copies, step=1)
    result.compare(flat(subject.generate(engine)), subject.truth(), "update from tensors")
    if subject.load_format != "safetensors":
        result.untried.append("update from disk: no weights are there")
        return result
    engine.update_weights_from_disk(subject.model_path, step=2)
    result.compare(flat(subject.generate(engine)), subject.truth(), "update from disk")
    return result


def memory_release(subject: Subject) -> Result:
    """Memory of each tag, then of all, given back and had again at the same addresses."""
    result = Result("memory release")
    engine = subject.make_engine(weights_backup=True)
    if not engine.config.releasable:
        result.untried.append("memory cannot be released here: there is no C compiler")
        return result
    every = ("weights", "kv_cache", "cuda_graphs")
    _release(result, subject, engine, [*([tag] for tag in every), every])
    del engine  # its memory is the next one's
    if not isinstance(subject.config, DenseModel):
        result.untried.append("draft: there is none for a model of this kind")
        return result
    with tempfile.TemporaryDirectory(prefix="samebit_verify_") as folder:
        write_random_draft(path := Path(folder) / "draft", subject.config)
        settings = {"speculative": "eagle3", "draft_model": str(path), "adaptive_drafts": False}
        engine = subject.make_engine(weights_backup=True, **settings)
    _release(result, subject, engine, [["draft"], (*every, "draft")])
    return result


def _release(
    result: Result, subject: Subject, engine: Engine, cases: Sequence[Sequence[str]]
) -> None:
    subject.generate(engine)
    for tags in cases:
        released = engine.release_memory_occupation(tags)
        engine.resume_memory_occupation(tags)
        case = ", ".join(tags)
        if any(released.values()):
            result.compare(flat(subject.generate(engine)), subject.truth(), case)
        else:
            result.untried.append(f"{case}: there is none to release")


def shared_prefixes(subject: Subject) -> Result:
    """Groups of 1 to 64 samples, mixed, with prefixes within prefixes: each sample on pages of its
    own, then on shared ones; on a GPU these are read once for all as well."""
    result = Result("shared prefixes")
    on_gpu = subject.device.type == "cuda"
    edges: tuple[int, ...] = (128, 256, 640, 1024, 1152, 2048) if on_gpu else (64, 128)
    sizes: tuple[int, ...] = (1, 2, 3, 5, 8, 16, 17, 33, 64) if on_gpu else (1, 2, 3)
    most = subject.config.max_position - subject.num_new_tokens
    lens = [n + d for n in edges for d in (-1, 0, 1) if n + d <= most]
    if not lens:
        result.untried.append("shared prefixes: the context is shorter than a tile")
        return result
    rng, vocab = random.Random(3), subject.config.vocab_size
    longest, other = ([rng.randrange(vocab) for _ in range(max(lens))] for _ in range(2))
    prompts = [longest[:n] for n in lens] + [other[:n] for n in lens[-2:]]
    new, page = subject.num_new_tokens, EngineConfig().page_size
    params = [
        SamplingParams(n=sizes[i % len(sizes)], max_new_tokens=new) for i in range(len(prompts))
    ]
    ids = [[5000 * i + s for s in range(p.n)] for i, p in enumerate(params)]
    tokens = sum(len(x) + p.n * (new + 2 * page) for p, x in zip(params, prompts, strict=True))
    settings = {"max_num_seqs": 512, "kv_cache_tokens": tokens}
    alone = subject.make_engine(prefix_cache=False, group_attention=False, **settings)
    each = [
        (x, _single(p), [i]) for x, p, own in zip(prompts, params, ids, strict=True) for i in own
    ]
    truth = flat(alone.generate(*map(list, zip(*each, strict=True))))
    del alone  # its memory is the next one's
    for graphs in (True, False) if on_gpu else (None,):
        engine = subject.make_engine(cuda_graphs=graphs, **settings)
        engine.attention.least_shared_bytes = 1
        for case in ("first run", "second run"):
            found = flat(engine.generate(prompts, params, ids))
            result.compare(found, truth, f"{case}, graphs {graphs}")
        del engine
    return result


def graphs_and_overlap(subject: Subject) -> Result:
    """Decode by CUDA graphs or not, steps planned ahead or not."""
    result = Result("graphs and overlap")
    on_gpu = subject.device.type == "cuda"
    if not on_gpu:
        result.untried.append("CUDA graphs: there are none on the CPU")
    for graphs in (False, True) if on_gpu else (False,):
        for overlap in (False, True):
            found = subject.run(cuda_graphs=graphs, overlap=overlap)
            result.compare(found, subject.truth(), f"graphs {graphs}, overlap {overlap}")
    return result


def score(subject: Subject) -> Result:
    """`score` of the drawn tokens, against the log-probs that drawing returned."""
    result = Result("score vs generate")
    for chunk in (1024, 17):
        engine = subject.make_engine(prefill_chunk=chunk)
        for i, prompt in enumerate(subject.prompts):
            contexts = [[*prompt, *c.token_ids] for c in subject.baseline[i]]
            scores = engine.score(contexts, subject.params[i].temperature or 1.0)
            result.cases += 1
            for completion, values in zip(subject.baseline[i], scores, strict=True):
                found = values[len(prompt) - 1 :]
                result.compare_values(found, list(completion.logprobs), f"prompt {i}")
    return result


def trainer(subject: Subject) -> Result:
    """Megatron's forward over packed samples, against the rollout's log-probs; of prompts with
    limits also against those of truncated distributions."""
    from samebit.trainer.megatron.forward import ForwardModel

    result = Result("trainer vs rollout")
    engine = subject.engine
    kind = type(engine.attention)
    megatron = ForwardModel(subject.config, subject.device, engine.weights, attention=kind)
    limited = [i for i, params in enumerate(subject.params) if params.limits]
    params = [replace(subject.params[i], truncated_logprobs=True) for i in limited]
    prompts, ids = ([x[i] for i in limited] for x in (subject.prompts, subject.sample_ids))
    truncated = dict(zip(limited, engine.generate(prompts, params, ids), strict=True))
    for kind_of, groups in (("", dict(enumerate(subject.baseline))), ("truncated, ", truncated)):
        for temperature in sorted({subject.params[i].temperature or 1.0 for i in groups}):
            drawn = [
                (subject.prompts[i], completion)
                for i, group in groups.items()
                if (subject.params[i].temperature or 1.0) == temperature
                for completion in group
            ]
            samples = [drawn_sample(prompt, completion) for prompt, completion in drawn]
            truth = [v for _, completion in drawn for v in completion.logprobs]
            for max_tokens in (subject.longest, subject.longest + 777, 100_000):
                batches = pack_samples(
                    samples, max_tokens, temperature=temperature, device=subject.device
                )
                found = [v for part in megatron.logprobs(batches) for v in part.tolist()]
                result.cases += 1
                case = f"{kind_of}temperature {temperature}, packs of {max_tokens}"
                result.compare_values(found, truth, case)
    return result


PROPERTIES: tuple[Property, ...] = (
    batch_size, batch_position, decode_batch, prefill_chunk, prefix_cache, page_size, preemption,
    group, neighbour_abort, concurrent_callers, restart, weight_update, graphs_and_overlap, score,
    trainer, memory_release, transports, pauses, shared_prefixes, speculation,
)  # fmt: skip
