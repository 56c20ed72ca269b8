"""samebit bench speculative: what it measures, on the CPU and in small."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from samebit.recipes.bench import simulated, speculative
from samebit.recipes.bench.output import BenchError
from samebit.recipes.cli.compose import resolve
from samebit.recipes.cli.main import main
from samebit.recipes.config import ConfigError
from samebit.recipes.models.tiny_model import make_demo_model
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
