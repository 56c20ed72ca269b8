"""How far the engine's log-probs are from exact ones, and how far those of transformers are.

    python tests/programs/transformers_error.py MODEL_FOLDER out.json [device]

On a GPU the engine and transformers, both in bf16 (eager attention), are compared with transformers
in fp32 (no TF32) on the same weights: chats and passages of English prose, if the folder has a
tokenizer, else random tokens; and the engine's greedy continuations. A few tokens have errors ten
times the usual, so thousands are needed to compare means of squares. Exit code 1 unless the
engine's mean and RMS errors are no larger than those of transformers. On the CPU the engine
computes in fp32 and must only be near.
"""

import gc
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from samebit.recipes.run.provenance import write_result
from samebit.rollout.device import resolve_device, resolve_dtype
from samebit.rollout.engine import Engine
from samebit.rollout.models.registry import load_model_config
from samebit.rollout.types import SamplingParams

_BLOCKS = Path(__file__).with_name("conversations.txt").read_text(encoding="utf-8")
CONVERSATIONS = tuple(
    tuple(part.strip() for part in block.split("\n--\n")) for block in _BLOCKS.split("\n====\n")
)
"""Questions and answers in English, from five words to a few hundred."""
NUM_PASSAGES, PASSAGE_TOKENS = 80, 200
NUM_GREEDY = 32  # tokens continued from every prompt
CPU_MAX_ERROR = 1e-3


@dataclass(frozen=True)
class Text:
    """Holds token ids and how many of them are the prompt."""

    token_ids: list[int]
    prompt_len: int


@dataclass(frozen=True)
class Outcome:
    """Holds one implementation's view: log-probs of the tokens, the likeliest tokens."""

    logprobs: torch.Tensor  # [positions] fp64
    greedy: torch.Tensor  # [greedy positions] int64


@dataclass(frozen=True)
class Errors:
    """Holds errors of log-probs in nats, and how many greedy tokens are the reference's."""

    mean: float
    rms: float
    max: float
    greedy_agreement: float


def random_texts(vocab_size: int, lens: Sequence[int], seed: int = 0) -> list[Text]:
    """Draw random tokens; the first half of each sequence is its prompt."""
    rng = random.Random(seed)
    return [Text([rng.randrange(vocab_size) for _ in range(n)], (n + 1) // 2) for n in lens]


def chat_texts(model_path: Path) -> list[Text]:
    """Return the conversations by the folder's chat template, or as plain text without one."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model_path, trust_remote_code=False)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    texts = []
    for question, answer in CONVERSATIONS:
        messages = [{"role": "user", "content": question}]
        prompt = (
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            if tokenizer.chat_template
            else tokenizer.encode(question)
        )
        label = tokenizer.encode(answer, add_special_tokens=False)
        texts.append(Text([*prompt, *label, *end], len(prompt)))
    return texts


def prose_texts(model_path: Path, num_passages: int, num_tokens: int) -> list[Text]:
    """Return passages of the Python language reference, which every installation holds."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model_path, trust_remote_code=False)
    prose = "\n".join(topics[name] for name in sorted(topics))
    token_ids = tokenizer.encode(prose[: 8 * num_passages * num_tokens], add_special_tokens=False)
    starts = range(0, num_passages * num_tokens, num_tokens)
    passages = [token_ids[start : start + num_tokens] for start in starts]
    return [Text(passage, num_tokens // 2) for passage in passages]


def ours(
    model_path: Path, device: torch.device, texts: Sequence[Text]
) -> tuple[list[Text], Outcome]:
    """Return the prompts' greedy continuations, and what the engine makes of all."""
    engine = Engine(model_path, device=device, kv_cache_tokens=1 << 15)
    prompts = [text.token_ids[: text.prompt_len] for text in texts]
    params = SamplingParams(temperature=0.0, max_new_tokens=NUM_GREEDY, ignore_eos=True)
    greedy = [c.token_ids for [c] in engine.generate(prompts, params)]
    continued = [Text([*p, *c], len(p)) for p, c in zip(prompts, greedy, strict=True)]
    scores = engine.score([text.token_ids for text in texts])
    values = torch.tensor([v for row in scores for v in row], dtype=torch.float64)
    return continued, Outcome(values, torch.tensor([t for tokens in greedy for t in tokens]))


@torch.no_grad()
def theirs(
    model_path: Path,
    device: torch.device,
    texts: Sequence[Text],
    continued: Sequence[Text],
    weights: torch.dtype,
    dtype: torch.dtype,
) -> Outcome:
    """Return the same by transformers: weights rounded to `weights`, computed in `dtype`."""
    from transformers import AutoModelForCausalLM

    gc.collect()  # the model before
    torch.cuda.empty_cache()
    model = AutoModelForCausalLM.from_pretrained(
        model_path, dtype=weights, attn_implementation="eager", trust_remote_code=False
    ).to(device)
    if dtype == torch.float32:
        model = model.float()

    def rows_of(text: Text) -> torch.Tensor:
        ids = torch.tensor([text.token_ids], device=device)
        return model.eval()(ids).logits[0, :-1].float()

    logprobs = []
    for text in texts:
        targets = torch.tensor(text.token_ids[1:], device=device)[:, None]
        logprobs.append(rows_of(text).log_softmax(-1).gather(1, targets)[:, 0].cpu())
    greedy = [rows_of(text)[text.prompt_len - 1 :].argmax(-1).cpu() for text in continued]
    return Outcome(torch.cat(logprobs).double(), torch.cat(greedy))


def errors(found: Outcome, reference: Outcome) -> Errors:
    """Return distances from the reference."""
    distance = (found.logprobs - reference.logprobs).abs()
    return Errors(
        mean=float(distance.mean()),
        rms=float(distance.square().mean().sqrt()),
        max=float(distance.max()),
        greedy_agreement=float((found.greedy == reference.greedy).double().mean()),
    )


def measure(model_path: Path, device: torch.device, texts: Sequence[Text]) -> dict[str, Any]:
    """Return the errors of both, and whether the engine passes."""
    torch.set_float32_matmul_precision("highest")
    continued, engine = ours(model_path, device, texts)
    weights = resolve_dtype(None, device)
    reference = theirs(model_path, device, texts, continued, weights, torch.float32)
    mine = errors(engine, reference)
    report = {
        "sequences": len(texts),
        "tokens": len(engine.logprobs),
        "greedy_tokens": len(engine.greedy),
        "engine": asdict(mine),
    }
    if device.type == "cpu":
        return report | {"pass": mine.max <= CPU_MAX_ERROR}
    bf16 = errors(theirs(model_path, device, texts, continued, weights, torch.bfloat16), reference)
    no_larger = mine.mean <= bf16.mean and mine.rms <= bf16.rms
    return report | {"transformers_bf16": asdict(bf16), "pass": no_larger}


def random_lens(longest: int) -> list[int]:
    """Return lengths of random sequences, up to a few hundred tokens."""
    return [n for n in range(2, 400, 13) if n <= longest]


def main(model: str, out: str, device: str | None = None) -> int:
    """Measure and write the report."""
    path, resolved = Path(model), resolve_device(device)
    has_tokenizer = any((path / f"tokenizer{n}.json").exists() for n in ("", "_config"))
    config = load_model_config(path)
    lens = random_lens(config.max_position - NUM_GREEDY)
    if has_tokenizer:
        texts = chat_texts(path) + prose_texts(path, NUM_PASSAGES, PASSAGE_TOKENS)
    elif lens:
        texts = random_texts(config.vocab_size, lens)
    else:
        raise ValueError(
            f"{path}: a context of {config.max_position} tokens is too short to measure on; it "
            f"must hold at least {NUM_GREEDY + 2}"
        )
    report = {
        "model": path.name,
        "text": "chats and prose" if has_tokenizer else "random tokens",
        **measure(path, resolved, texts),
    }
    write_result(Path(out), resolved, report, ["python", *sys.argv])
    print(json.dumps(report, indent=1))
    return 0 if report["pass"] else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
