"""Ranks that have a part of a model's layers, or of a sample's tokens, are shown whole streams."""

import pytest
import torch
from helpers import assert_same_bits
from rank_streams import STREAMS

from samebit.recipes.models.tiny_model import write_config, write_weights
from samebit.rollout.models.decoder import EMBEDDING, FINAL_NORM, OUTPUT

SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "head_dim": 16,
    "vocab_size": 331,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
}


@pytest.fixture(scope="module")
def watch(run_together, tmp_path_factory):
    """watch(mode, size, tied=False): what each rank of a layout is shown; of one process without a
    mode. Once for each."""
    root, known = tmp_path_factory.mktemp("streams"), {}
    folders = {False: root / "qwen3", True: root / "llama"}
    for tied, folder in folders.items():
        write_config(folder, folder.name, **SHAPE, tie_word_embeddings=tied)
        write_weights(folder, seed=5)

    def run(mode, size=1, tied=False):
        if (mode, tied) not in known:
            place = tmp_path_factory.mktemp("ranks")
            files = [place / f"out.{rank}" for rank in range(size)]
            if mode:
                more = place / "store", folders[tied], mode, place / "out"
                run_together("rank_streams.watched", [(r, size, *more) for r in range(size)])
            else:
                run_together("rank_streams.alone", [(folders[tied], files[0])])
            known[mode, tied] = [torch.load(file) for file in files]
        return known[mode, tied]

    return run


def assert_same(found, expected):
    """Each micro-batch once, in order, with the same streams and outer parameters."""
    assert [index for index, _, _ in found] == [index for index, _, _ in expected] == [0, 1, 2]
    for (_, streams, outer), (_, wanted, params) in zip(found, expected, strict=True):
        assert tuple(streams) == STREAMS
        assert outer.keys() == params.keys()
        for own, other in ((streams, wanted), (outer, params)):
            for name, tensor in other.items():
                assert_same_bits(own[name], tensor, name)


@pytest.mark.parametrize(
    ("mode", "size", "tied"),
    [
        ("virtual_pipeline", 2, False),
        pytest.param("virtual_pipeline", 2, True, marks=pytest.mark.long),
        pytest.param("pipeline", 2, True, marks=pytest.mark.long),
        ("context", 2, False),
        pytest.param("pipeline+context", 4, False, marks=pytest.mark.long),
        pytest.param("pipeline+sequence", 4, False, marks=pytest.mark.long),
    ],
)
def test_parts_are_shown_the_whole(watch, mode, size, tied):
    """The streams of one process, to the bit (or of the same tensor parallel ranks without stages),
    and the outer parameters that go with them, on every rank; and no weight moves for it."""
    sequence = "sequence" in mode
    expected = watch("sequence", 2) if sequence else watch("", tied=tied)
    ranks = watch(mode, size, tied)
    for rank, (first, second, digests) in enumerate(ranks):
        model = rank % len(expected)
        assert_same(first, expected[model][0])
        assert_same(second, ranks[model][1])
        assert digests[0] == digests[1] == ranks[0][2][0]
    (first, second, _), *_ = ranks  # whose weights have moved in between
    for name in {EMBEDDING, FINAL_NORM, *([] if tied else [OUTPUT])}:
        assert not torch.equal(first[0][2][name], second[0][2][name]), name
