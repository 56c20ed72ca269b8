"""samebit verify: pieces of a run, and a digest by which two runs can be compared."""

import json
import math
import struct

import pytest
import torch
from programs import kernel_pass, kill_demo

from samebit.recipes.cli.main import main
from samebit.recipes.models.tiny_model import make_random_model, write_config, write_weights
from samebit.recipes.verification.properties import (
    CPU_BATCH_EDGES,
    PROPERTIES,
    decode_batch,
    graphs_and_overlap,
    neighbour_abort,
    preemption,
    prefix_cache,
    score,
    trainer,
)
from samebit.recipes.verification.subject import Result, make_subject
from samebit.recipes.verify import Measured, failure
from samebit.rollout.types import Completion

CPU = torch.device("cpu")


def verify(folder, name, *arguments):
    """The report of a run on the tiny models."""
    where = [f"output_dir={folder}", f"run_name={name}", "device=cpu"]
    assert main(["verify", *where, *arguments]) == 0
    return json.loads((folder / name / "verify.json").read_text())


@pytest.mark.long
def test_chosen_properties_and_equal_digests(tmp_path, capsys):
    """Asked for in any order, measured in that of a full run; the same run finds the same bits."""
    model = odd_model(tmp_path / "small", 64, 40, 0)
    words = [f"model={model}", "properties=[concurrent_callers,group]"]
    first = verify(tmp_path, "first", *words)
    names = [[r["name"] for r in group] for group in first["models"].values()]
    assert names == [["group vs single", "concurrent callers"]]
    assert f"outcomes_digest {first['outcomes_digest']}" in capsys.readouterr().out
    again = verify(tmp_path, "again", *words)
    assert again["models"] == first["models"]
    assert again["outcomes_digest"] == first["outcomes_digest"]
    other = verify(tmp_path, "other", "properties=[concurrent_callers]", "seed=1")
    assert len(other["models"]) == 2  # ours, where none is named
    digests = [
        r["outcomes_digest"] for x in (first, other) for g in x["models"].values() for r in g
    ]
    assert len(set(digests)) == len(digests)


def test_steps_in_flight_are_compared_on_the_cpu(tmp_path, monkeypatch):
    """Overlap off and on, every token of both."""
    make_random_model(tmp_path, "qwen3", seed=3, tied=True, num_layers=1, vocab_size=40)
    subject = make_subject(tmp_path, CPU)
    for values in (subject.prompts, subject.params, subject.sample_ids, subject.baseline):
        del values[5:]
    made = []

    def engine(**settings):
        made.append(make(**settings))
        return made[-1]

    make = subject.make_engine
    monkeypatch.setattr(subject, "make_engine", engine)
    result = graphs_and_overlap(subject)
    assert (result.mismatches, result.tokens) == (0, 2 * subject.num_drawn)
    assert (
        [e.config.overlap for e in made] == [e.step_loop.depth > 0 for e in made] == [False, True]
    )


def test_an_unknown_property_names_the_known_ones(capsys):
    assert main(["verify", "properties=[batch_size,speed]"]) == 2
    error = capsys.readouterr().err
    assert "no speed; there are batch_size" in error
    assert all(check.__name__ in error for check in PROPERTIES)


@pytest.mark.parametrize(
    ("values", "others"),
    [
        ([(3, -1.5)], [(4, -1.5)]),
        ([-1.5], [math.nextafter(-1.5, 0)]),
        ([0.0], [-0.0]),
        ([1.0, 2.0], [2.0, 1.0]),
        ([1.0, 2.0], [1.0]),
    ],
    ids=["token", "one ulp", "sign of zero", "order", "length"],
)
def test_the_digest_is_of_the_bits_found(values, others):
    def digest(*calls):
        result = Result("any")
        for found, truth, case in calls:
            result.compare_values(found, truth, case)
        return result.outcomes_digest

    same = digest((values, values, "case"))
    assert digest((values, others, "case")) == same
    assert digest((others, values, "case")) != same
    assert digest((values, values, "another case")) != same
    assert digest((values, values, "case"), ([], [], "case")) != same


NAN = struct.unpack("<d", bytes.fromhex("000000000000f87f"))[0]


@pytest.mark.parametrize(
    ("found", "truth", "mismatches"),
    [
        ([-0.0], [0.0], 1),
        ([NAN], [NAN], 0),
        ([NAN], [-NAN], 1),
        ([(3, -0.0), (3, 0.0)], [(3, 0.0), (3, 0.0)], 1),
        ([(3, NAN)], [(3, NAN)], 0),
        ([1.0, 2.0], [1.0], 1),
    ],
)
def test_bits_are_compared_not_numbers(found, truth, mismatches):
    result = Result("any")
    result.compare_values(found, truth, "case")
    assert (result.mismatches, result.tokens) == (mismatches, len(found))


def test_what_could_not_be_tried_is_neither_a_mismatch_nor_a_proof():
    """Its reason is kept once, its mismatches count, its tokens do not."""
    result = Result("any")
    result.compare([completion(1)], [completion(1)], "case", "nothing happened")
    result.compare([completion(1)], [completion(1)], "case", "nothing happened")
    assert (result.tokens, result.mismatches, result.was_tried) == (0, 0, False)
    assert (result.cases, result.untried) == (2, ["nothing happened"])
    result.compare([completion(1)], [completion(2)], "case", "nothing happened")
    assert (result.tokens, result.mismatches, result.was_tried) == (0, 1, False)
    result.compare([completion(1)], [completion(1)], "case")
    assert (result.tokens, result.was_tried) == (1, True)


def completion(token):
    return Completion(
        request_id="0",
        sample_id=0,
        token_ids=(token,),
        logprobs=(-1.0,),
        finish_reason="length",
        version_spans=(),
    )


def test_when_a_report_fails():
    """On a mismatch, without any comparison, and without one that was asked for."""
    held, untried = Result("held", tokens=3), Result("untried", untried=["why"])
    differing = Result("differing", tokens=3, mismatches=2)

    def of(*results):
        return {"m": Measured(list(results), 3)}

    assert failure(of(held), True) is None
    assert failure(of(held, untried), False) is None
    assert failure(of(held, untried), True) == "asked for and could not be tried: 'untried' (m)"
    assert failure(of(held, differing, untried), False) == "2 mismatches"
    for nothing in (of(untried), of(), {}):
        assert failure(nothing, False) == "nothing was compared, so nothing is shown"


def odd_model(folder, context, vocab_size, eos):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 16}
    write_config(
        folder,
        "qwen3",
        **shape,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=vocab_size,
        eos_token_id=eos,
        tie_word_embeddings=True,
        max_position_embeddings=context,
    )
    write_weights(folder, seed=1, std=0.2)
    return folder


def test_a_model_too_short_for_some_properties(tmp_path, capsys):
    """A context of two tokens: one is drawn. Said in table and report, and a failure only for who
    asks for that very property."""
    folder = odd_model(tmp_path / "short", 2, 5, 0)
    names = "properties=[neighbour_abort,group]"
    where = [f"model={folder}", "device=cpu", f"output_dir={tmp_path}", "run_name=out"]
    assert main(["verify", *where, names]) == 1
    said = capsys.readouterr()
    assert "abort of a neighbour            2           0          0 could not be tried" in said.out
    assert "not tried: abort after 5 steps: all were done before" in said.out
    assert "Could not be tried on short: abort of a neighbour." in said.out
    reason = "asked for and could not be tried: 'abort of a neighbour' (short)"
    assert said.err.strip() == f"samebit verify: {reason}"
    report = json.loads((tmp_path / "out" / "verify.json").read_text())
    assert report["could_not_be_tried"] == {"short": ["abort of a neighbour"]}
    assert (report["mismatches"], report["tokens"]) == (0, report["comparisons"])
    assert report["comparisons"] == report["distinct_tokens"] == 3  # a prompt, three samples
    assert report["models"]["short"][1]["untried"]


def test_a_folder_that_holds_a_config_alone(tmp_path):
    """Its weights are made; the tokens of a baseline of a property's own count as drawn too."""
    folder = odd_model(tmp_path / "bare", 2, 5, 0)
    (folder / "model.safetensors").unlink()
    report = verify(
        tmp_path, "out", f"model={folder}", "load_format=dummy", "properties=[decode_batch]"
    )
    assert report["distinct_tokens"] == 3 + max(CPU_BATCH_EDGES)
    assert report["comparisons"] == sum(CPU_BATCH_EDGES)


@pytest.mark.parametrize(
    ("context", "vocab_size", "eos"),
    [(64, 12, 0), (16, 5, 4), (32, 8, list(range(8)))],
    ids=["the demo's", "a page", "ends at once"],
)
def test_odd_models(tmp_path, context, vocab_size, eos):
    """What the context or the end tokens leave of a property is tried, and nothing raises."""
    subject = make_subject(odd_model(tmp_path / "odd", context, vocab_size, eos), CPU)
    assert subject.longest <= context
    for check in (decode_batch, prefix_cache, preemption, neighbour_abort, score, trainer):
        result = check(subject)
        assert result.mismatches == 0, result.notes
        assert result.was_tried or result.untried, result.name


def test_a_context_of_one_token_is_refused(tmp_path, capsys):
    folder = odd_model(tmp_path / "one", 1, 5, 0)
    assert main(["verify", f"model={folder}", "device=cpu", f"output_dir={tmp_path}"]) == 1
    assert "one: a context of 1 tokens is too short to verify; it must" in capsys.readouterr().err


def test_a_kernel_pass_without_output_fails(monkeypatch, capsys):
    def empty_pass(make):
        return iter(())

    monkeypatch.setattr(kernel_pass, "PASSES", (empty_pass,))
    assert kernel_pass.main("cpu") == 1
    monkeypatch.setattr(kernel_pass, "PASSES", kernel_pass.GPU_PASSES)
    assert kernel_pass.main("cpu") == 0
    assert capsys.readouterr().out.count(": not tried, it needs a GPU") == 2


def test_equal_demos_hold_something_and_the_same_bits():
    whole = ({"reward": 0.5}, [{"step": 1, "loss": -0.0, "ratio": math.nan}])
    assert kill_demo.are_equal(whole, (dict(whole[0]), [dict(whole[1][0])]))
    assert not kill_demo.are_equal(whole, (whole[0], [{**whole[1][0], "loss": 0.0}]))
    assert not kill_demo.are_equal(({}, []), ({}, []))
    assert not kill_demo.are_equal((whole[0], []), (whole[0], []))
    with pytest.raises(ValueError, match="kills is 0; it must be at least 1"):
        kill_demo.parse(["kills=0"])


def test_a_demo_that_could_not_be_killed_shows_nothing(tmp_path, monkeypatch, capsys):
    """It was done before the last kill: equal results are no proof."""
    whole = ({"reward": 0.5}, [{"step": 1}])
    monkeypatch.setattr(kill_demo, "run_demo", lambda *_, **__: kill_demo.Attempt(True, 2.0, 1.0))
    monkeypatch.setattr(kill_demo, "result", lambda *_: whole)
    assert kill_demo.main(str(tmp_path / "out.json"), "kills=2", "device=cpu") == 1
    report = json.loads((tmp_path / "out.json").read_text())
    assert (report["equal"], report["killed_after_s"]) == (True, [])
    capsys.readouterr()
