"""samebit bench speculative: what it measures, on the CPU and in small."""

import json
import math
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from samebit.recipes.bench import simulated, speculative
from samebit.recipes.bench.output import BenchError
from samebit.recipes.cli.compose import resolve
from samebit.recipes.cli.main import main
from samebit.recipes.config import ConfigError
from samebit.recipes.models.tiny_model import make_demo_model
from samebit.rollout.models.registry import load_model_config
from samebit.rollout.speculative.proposer import Context

SMALL = ["device=cpu", "batches=[1,3]", "input_len=9", "output_len=12", "repeats=2"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["proposers=[]"], "proposers is .*at least one"),
        (["proposers=[none]"], "without none, which is measured beside them"),
        (["simulated_acceptance=0.5"], "simulated_acceptance is 0.5"),
        (["proposers=[simulated]", "simulated_acceptance=1.5"], "it must be from 0 to 1"),
        (["proposers=[peagle]"], "block_draft_model is None; it must be a block draft's folder"),
        (["block_draft_model=x"], "block_draft_model is 'x'; .* where proposers has peagle, else"),
        (["draft_model=/nowhere"], "draft_model is '/nowhere'; .* has neither eagle3 nor hybrid"),
        (["samples_per_prompt=0"], "samples_per_prompt is 0; it must be positive"),
        (["batches=[4,6]", "samples_per_prompt=4"], "multiples of samples_per_prompt, 4"),
        (["batches=[0]"], "from 1 to engine.max_num_seqs, 512, each"),
        (["batches=[1,513]"], "from 1 to engine.max_num_seqs, 512, each"),
        (["output_len=0"], "output_len is 0"),
        (["temperature=-1"], "temperature is -1.0"),
        (["engine.speculative=suffix"], "engine.speculative is 'suffix'"),
        (["engine.prefix_cache=false"], "engine.prefix_cache is False"),
        (["num_draft_tokens=16"], "num_draft_tokens is 16"),
    ],
)
def test_wrong_settings_say_what_is_wrong(overrides, message):
    """Before anything runs."""
    with pytest.raises(ConfigError, match=message):
        resolve("bench speculative", ["model=m", *overrides])


def test_end_to_end(qwen3_path, tmp_path, capsys):
    """Guesses that are all right take the fewest verifications there can be."""
    words = ["proposers=[suffix,simulated]", "simulated_acceptance=1", f"output_dir={tmp_path}"]
    words += ["adaptive_drafts=false", "num_draft_tokens=3"]
    assert main(["bench", "speculative", f"model={qwen3_path}", *SMALL, *words]) == 0
    report = json.loads((tmp_path / "bench_speculative" / "bench.json").read_text())
    assert list(report["batches"]) == ["1", "3"]
    for entry in report["batches"].values():
        assert list(entry) == ["none", "suffix", "simulated"]
        assert entry["none"]["x_none"] == 1
        assert all(len(found["seconds"]) == 2 for found in entry.values())
        # The first token is the prompt's; then 4, 4 and 3.
        assert entry["simulated"]["accept_length"] == pytest.approx(11 / 3)
        assert entry["simulated"]["acceptance"] == [1, 1, 1]
    output = capsys.readouterr().out
    assert "accept length" in output
    assert "simulated: no proposer; each guess is right with a probability of 1" in output


def test_prompts_of_a_task(tmp_path, capsys):
    make_demo_model(tmp_path / "model", 1)
    words = ["data.task=reverse_digits", "data.eval_size=2", f"output_dir={tmp_path}"]
    assert main(["bench", "speculative", f"model={tmp_path / 'model'}", *SMALL, *words]) == 0
    assert "suffix" in capsys.readouterr().out


def test_siblings_are_measured(qwen3_path, tmp_path):
    """Suffix finds in another sample's text what a sample alone has not said yet."""
    words = [f"model={qwen3_path}", *SMALL, "output_len=40", f"output_dir={tmp_path}"]
    words += ["batches=[6]", "temperature=0.01", "adaptive_drafts=false"]
    lengths = []
    for n in (1, 6):
        name = f"run_name=siblings_{n}"
        assert main(["bench", "speculative", *words, f"samples_per_prompt={n}", name]) == 0
        report = json.loads((tmp_path / f"siblings_{n}" / "bench.json").read_text())
        found = report["batches"]["6"]["suffix"]
        assert found["output_tokens"] == [240, 240]
        lengths.append(found["accept_length"])
        assert found["verifications"] > 0
    assert lengths[0] != lengths[1]
    run = resolve("bench speculative", [*words, "samples_per_prompt=3"])
    prompts, ids = speculative.Prompts(run).draw(6)
    assert (len(prompts), ids) == (2, [[0, 1, 2], [3, 4, 5]])


def test_engines_that_do_not_fit_are_refused(qwen3_path, tmp_path):
    """With what they take: weights once, keys and values of every engine."""
    words = [f"model={qwen3_path}", *SMALL, f"output_dir={tmp_path}", "engine.page_size=8"]
    run = resolve("bench speculative", [*words, "proposers=[suffix,simulated]"])
    model = load_model_config(qwen3_path)
    token_bytes = model.kv_layout.bytes_per_token(torch.bfloat16)
    kv = 3 * (3 * 40) * token_bytes  # 9 + 12 tokens, 5 guesses and a page, in whole pages
    weights = sum(math.prod(spec.shape) for spec in model.param_specs()) * 2
    speculative.require_memory(run, torch.bfloat16, kv + weights)
    with pytest.raises(BenchError, match="of 120 tokens in each of 3 engines .* ask for smaller"):
        speculative.require_memory(run, torch.bfloat16, kv + weights - 1)
    engines = speculative.engines_of(run, torch.device("cpu"))
    assert {engine.kv_capacity for engine in engines.values()} == {120}


def test_captures_are_over_before_time_is_taken(qwen3_path, tmp_path, monkeypatch):
    """It warms up until a whole repeat has captured no CUDA graph, however many that takes; what is
    captured later is told."""
    words = [f"model={qwen3_path}", *SMALL, f"output_dir={tmp_path}", "batches=[3]"]
    run = resolve("bench speculative", words)
    engines = speculative.engines_of(run, torch.device("cpu"))
    prompts, drawn = speculative.Prompts(run), []
    draw = prompts.draw
    monkeypatch.setattr(prompts, "draw", lambda count: drawn.append(count) or draw(count))
    # Before and after each turn: two warm-ups that capture, and one that does not.
    seen = iter([1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4, 4, *range(5, 99)])

    @contextmanager
    def counted():
        yield lambda: next(seen)

    monkeypatch.setattr(speculative, "captures", counted)
    found = speculative.measure(run, engines, prompts, 3)
    assert len(drawn) == 3 + 2
    assert [entry["graphs_captured"] for entry in found.values()] == [0, 1]
    drawn.clear()
    found = speculative.measure(run, engines, prompts, 3)  # of which every turn captures one
    assert len(drawn) == 10 + 2
    assert [entry["graphs_captured"] for entry in found.values()] == [2, 2]


def test_other_tokens_are_told(qwen3_path, tmp_path, capsys, monkeypatch):
    """What a wrong verification would draw is no speed-up."""
    words = [f"model={qwen3_path}", *SMALL, f"output_dir={tmp_path}", "proposers=[simulated]"]
    run = resolve("bench speculative", words)
    engines = speculative.engines_of(run, speculative.resolve_device("cpu"))
    generate = engines["simulated"].generate

    def one_is_another(prompts, params, ids):
        groups = generate(prompts, params, ids)
        return [[replace(groups[0][0], token_ids=(0,) * 12)], *groups[1:]]

    monkeypatch.setattr(engines["simulated"], "generate", one_is_another)
    with pytest.raises(BenchError, match="simulated, 3 at a time: 1 of 3 samples are not those"):
        speculative.measure(run, engines, speculative.Prompts(run), 3)


def test_guesses_are_right_as_often_as_asked(monkeypatch):
    """By the place alone, however the sample is asked."""
    tokens = tuple(range(1000))
    monkeypatch.setattr(simulated, "GUESSES", {})
    simulated.expect(7, tokens, 0.7, vocab_size=5000)
    proposer = simulated.Simulated(SimpleNamespace(vocab_size=5000))
    sample = SimpleNamespace(sample_id=7, request=SimpleNamespace(prompt_ids=(1, 2)))
    [whole] = proposer.propose([Context(sample, 0, np.zeros(2), 1000)])
    right = [a == b for a, b in zip(whole.token_ids, tokens, strict=True)]
    assert 650 < sum(right) < 750
    [part] = proposer.propose([Context(sample, 0, np.zeros(12), 5)])
    assert part.token_ids == whole.token_ids[10:15]
