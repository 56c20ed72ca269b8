"""Transfer plans: any layout gives any other what loading would, and each byte once."""

from dataclasses import replace

import pytest
import torch

from samebit.rollout.models.registry import load_model_config
from samebit.rollout.runtime.weights import load_safetensors
from samebit.weight_sync import mapping
from samebit.weight_sync.transfer_plan import Holding, make_plan
from samebit.weight_sync.types import WeightSyncError

FC1 = "decoder.layers.0.mlp.linear_fc1.weight"
QKV = "decoder.layers.0.self_attention.linear_qkv.weight"


class Rank:
    """What one rank of a layout holds."""

    def __init__(self, folder, shard=(0, 1), layers=None):
        config = load_model_config(folder)
        self.specs = [s for s in config.param_specs(shard) if layers is None or layers(s.name)]
        self.params = {spec.name: torch.zeros(spec.shape) for spec in self.specs}
        load_safetensors(folder, self.specs, self.params, config.param_specs())

    @property
    def holding(self):
        """As the other ranks are told of it."""
        return Holding.of_plain(Holding.of(self.specs, self.params).to_plain())


def first_stage(name):
    return name.startswith(("embedding", "decoder.layers.0."))


def later_stage(name):
    return not first_stage(name)


LAYOUTS = {
    "1": [{}],
    "tp2": [{"shard": (0, 2)}, {"shard": (1, 2)}],
    "pp2": [{"layers": first_stage}, {"layers": later_stage}],
    "tp2 x pp2": [
        {"shard": (rank, 2), "layers": stage}
        for stage in (first_stage, later_stage)
        for rank in (0, 1)
    ],
    "dp2": [{}, {}],
    "tp2 x dp2": [{"shard": (rank, 2)} for _ in range(2) for rank in (0, 1)],
}


def ranks_of(layout, folder):
    return [Rank(folder, **where) for where in LAYOUTS[layout]]


def carry_out(plan, senders, receivers):
    """What the data planes do, without one."""
    for transfer in plan.transfers:
        source, target = transfer.source, transfer.target
        there, here = senders[transfer.sender].params, receivers[transfer.receiver].params
        target.region_of(here[target.name]).copy_(source.region_of(there[source.name]))


def require_same_as_loaded(senders, receivers, bucket_bytes):
    """Empty the receivers and fill them by a plan: all is back, and each byte came once."""
    expected = [{name: p.clone() for name, p in r.params.items()} for r in receivers]
    plan = make_plan(*([r.holding for r in side] for side in (senders, receivers)), bucket_bytes)
    for receiver in receivers:
        for spec in receiver.specs:
            covered = sum(block.num_rows for block in spec.blocks)
            receiver.params[spec.name][:covered].fill_(torch.nan)
    carry_out(plan, senders, receivers)
    for receiver, params in zip(receivers, expected, strict=True):
        assert all(torch.equal(receiver.params[name], params[name]) for name in params)
    held = [
        sum(
            param.numel() // spec.shape[0] * sum(b.num_rows for b in spec.blocks) * 4
            for spec, param in zip(r.specs, r.params.values(), strict=True)
        )
        for r in receivers
    ]
    assert [plan.bytes_to(i) for i in range(len(receivers))] == held, "a byte travels twice"


@pytest.mark.parametrize("bucket_bytes", [64, 5000, 1 << 30])
@pytest.mark.parametrize("there", ["1", "tp2", "tp2 x dp2"])
@pytest.mark.parametrize("here", LAYOUTS)
def test_every_layout_gives_every_other_what_loading_gives(qwen3_path, here, there, bucket_bytes):
    """A wrong row of gate or up, or a wrong head, is what diverges slowly and is never found."""
    sides = ranks_of(here, qwen3_path), ranks_of(there, qwen3_path)
    require_same_as_loaded(*sides, bucket_bytes)


class Shard(Rank):
    """What a rank of `size` holds of a few tensors that divide by many sizes."""

    def __init__(self, rank, size):
        shard = rank, size
        self.specs = [
            mapping.plain("norm", "n", (4,), shard),
            mapping.columns("proj", "o", (6, 12), shard),
            mapping.stacked("fc1", ("gate", "up"), (12, 4), shard),
            mapping.vocab("embedding", "e", (19, 4), 24, shard),
            mapping.grouped_qkv("qkv", ("q", "k", "v"), (24, 12, 2), 4, shard),
            mapping.grouped_qkv("bias", ("bq", "bk", "bv"), (24, 12, 2), None, shard),
        ]
        shapes = {name: shape for spec in self.specs for name, shape in spec.hf_shapes.items()}
        values = {
            name: torch.arange(torch.Size(shape).numel()).view(shape) + 1000.0 * i
            for i, (name, shape) in enumerate(shapes.items())
        }
        self.params = {spec.name: torch.zeros(spec.shape) for spec in self.specs}
        mapping.load_params(self.specs, self.params, mapping.parts_of(values.__getitem__))


@pytest.mark.parametrize("bucket_bytes", [64, 1 << 30])
@pytest.mark.parametrize("there", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("here", [1, 2, 3, 4, 6])
def test_shards_of_any_size_fill_shards_of_any_other(here, there, bucket_bytes):
    """Also where neither side is whole, and neither size divides the other."""
    sides = ([Shard(rank, size) for rank in range(size)] for size in (here, there))
    require_same_as_loaded(*sides, bucket_bytes)


def test_equal_layouts_move_whole_parameters(qwen3_path):
    """Fused projections of equal shards are one piece at both ends: nothing is copied aside."""
    for layout in ("1", "tp2"):
        sides = [[r.holding for r in ranks_of(layout, qwen3_path)] for _ in range(2)]
        plan = make_plan(*sides, 1 << 30)
        for t in plan.transfers:
            assert t.sender == t.receiver or "norm" in t.target.name
            if t.target.name in (FC1, QKV):
                assert t.source.start is None
                assert t.target.start is None


def test_copies_share_the_sending(qwen3_path):
    """One data rank that sends everything would make the others wait."""
    plan = make_plan(
        [r.holding for r in ranks_of("dp2", qwen3_path)],
        [r.holding for r in ranks_of("1", qwen3_path)],
        4096,
    )
    sent = [sum(t.target.num_bytes for t in plan.transfers if t.sender == i) for i in range(2)]
    largest = max(t.num_bytes for t in (t.target for t in plan.transfers))
    assert abs(sent[0] - sent[1]) <= 64 * largest


def test_rounds_and_parcels_stay_within_the_bucket(qwen3_path):
    """Buffers are made for it; parts of a parcel do not overlap in it."""
    holdings = [r.holding for r in ranks_of("tp2", qwen3_path)]
    plan = make_plan(holdings, [ranks_of("1", qwen3_path)[0].holding], 9000)
    assert plan.round_bytes <= 2 * 9000
    for parcels in plan.rounds:
        for parcel in parcels:
            assert len({(t.sender, t.receiver) for t in parcel.transfers}) == 1
            for t, after in zip(parcel.transfers, parcel.transfers[1:], strict=False):
                assert t.target.offset + t.target.num_bytes <= after.target.offset
                assert (t.source.offset, t.source.shape) == (t.target.offset, t.target.shape)


def test_all_ranks_make_the_same_plan_and_another_layout_another(qwen3_path):
    """The digest is what ranks compare before a byte moves."""
    two, one = ([r.holding for r in ranks_of(n, qwen3_path)] for n in ("tp2", "1"))
    digests = {make_plan(two, one, 1 << 20).digest for _ in range(2)}
    assert len(digests) == 1
    others = [(one, one, 1 << 20), (two, one, 1 << 12), (one, two, 1 << 20)]
    assert len(digests | {make_plan(*args).digest for args in others}) == 4


def test_two_models_are_refused(qwen3_path, llama_path):
    """Told at the meeting, by name: nothing is cast, cut or left out."""
    [one], [other] = ranks_of("1", qwen3_path), ranks_of("1", llama_path)
    with pytest.raises(WeightSyncError, match="different models|no receiver has|no sender holds"):
        make_plan([one.holding], [other.holding], 1 << 20)
    part = Rank(qwen3_path, layers=lambda name: name != FC1)
    wanted = "no sender holds rows 0 to 103 of model.layers.0.mlp.gate_proj.weight, which "
    with pytest.raises(WeightSyncError, match=wanted + FC1):
        make_plan([part.holding], [one.holding], 1 << 20)
    with pytest.raises(
        WeightSyncError, match="no receiver has a place for model.layers.0.mlp.gate"
    ):
        make_plan([one.holding], [part.holding], 1 << 20)
    low = replace(one.holding, dtypes=("torch.bfloat16",) * len(one.holding.dtypes))
    with pytest.raises(WeightSyncError, match="bfloat16 at the receiver, .* is torch.float32"):
        make_plan([one.holding], [low], 1 << 20)
    with pytest.raises(ValueError, match="bucket_bytes is 63; it must be at least 64"):
        make_plan([one.holding], [one.holding], 63)
    with pytest.raises(WeightSyncError, match=f"1 tensors are missing: {FC1}"):
        Holding.of(one.specs, part.params)


def test_a_tied_embedding_comes_from_either_end_of_a_pipeline(tmp_path_factory, qwen3_path):
    """Both ends hold it; the engine gets it once."""
    [whole] = ranks_of("1", qwen3_path)
    embedding = next(s for s in whole.specs if s.name.startswith("embedding"))
    copy = Rank(qwen3_path, layers=later_stage)
    copy.specs = [replace(embedding, name="output_copy", replica=True), *copy.specs]
    copy.params["output_copy"] = whole.params[embedding.name].clone()
    senders = [Rank(qwen3_path, layers=first_stage), copy]
    plan = make_plan([r.holding for r in senders], [whole.holding], 1 << 20)
    expected = {name: p.clone() for name, p in whole.params.items()}
    for param in whole.params.values():
        param.zero_()
    carry_out(plan, senders, [whole])
    assert all(torch.equal(whole.params[name], expected[name]) for name in expected)
