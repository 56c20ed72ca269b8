"""A trained Qwen2 leaves the trainer as a folder that transformers loads, with every bias."""

import pytest
import torch
from helpers import assert_same_bits

from samebit.recipes.export import write_model
from samebit.rollout.engine import Engine
from samebit.trainer.algorithms.sft import Sft
from samebit.trainer.checkpoint import latest_checkpoint
from samebit.trainer.checkpoint_writer import CheckpointWriter
from samebit.trainer.packing import pack_samples
from samebit.weight_sync.mapping import hf_tensors

BIAS = "decoder.layers.{}.self_attention.linear_qkv.bias"


@pytest.fixture(scope="module")
def theirs(qwen2_path):
    """transformers' model of the folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        qwen2_path, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def test_an_export_has_the_trained_models_logits(
    make_trainer, qwen2_path, random_samples, theirs, tmp_path
):
    """transformers' own, to the bit, with the trained weights given to it directly; and the engine
    that loads the folder holds the trainer's parameters."""
    from transformers import AutoModelForCausalLM

    trainer = make_trainer(qwen2_path)
    before = {name: p.detach().clone() for name, p in trainer.params.items()}
    for seed in range(2):
        trainer.train_step(pack_samples(random_samples(6, seed), 100), Sft())
    for layer in range(3):
        moved = trainer.params[BIAS.format(layer)] - before[BIAS.format(layer)]
        assert (moved != 0).float().mean() > 0.9
    CheckpointWriter(tmp_path / "run", 1, background=False).save(2, trainer.state_dict(), {})
    out = tmp_path / "out"
    version, _ = write_model(latest_checkpoint(tmp_path / "run"), qwen2_path, out)
    assert (version.step, version.digest) == (2, trainer.digest())

    exported, info = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    trained = dict(hf_tensors(trainer.specs, {n: p.detach() for n, p in trainer.params.items()}))
    theirs.load_state_dict(trained, strict=False)  # the tied output layer has no tensor
    ids = torch.arange(7, 90)[None]
    with torch.no_grad():
        logits = exported.eval()(ids).logits
        assert_same_bits(logits, theirs(ids).logits)
    engine = Engine(out, device="cpu")
    for name, p in trainer.params.items():
        assert_same_bits(engine.weights[name], p.detach(), name)
    expected = logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
    found = torch.tensor(engine.score(ids.tolist())[0])
    assert (found - expected).abs().max() < 1e-4


def test_a_folder_goes_round_to_the_byte(qwen2_path, tmp_path):
    """Loaded into the engine's rows and written again: the same tensors under the same names."""
    from safetensors.torch import load_file, save_file

    engine = Engine(qwen2_path, device="cpu")
    written = dict(hf_tensors(engine.specs, engine.weights))
    save_file({n: t.contiguous() for n, t in written.items()}, tmp_path / "model.safetensors")
    found = load_file(tmp_path / "model.safetensors")
    original = load_file(qwen2_path / "model.safetensors")
    assert found.keys() == original.keys()
    assert sum(name.endswith("_proj.bias") for name in found) == 9
    for name, tensor in original.items():
        assert_same_bits(found[name], tensor, name)
