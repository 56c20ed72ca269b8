"""dry_run: what a run would be, from its configuration and its records alone."""

import pytest
from safetensors.torch import load_file
from test_online_draft import ONLINE

from samebit.recipes.cli.compose import resolve
from samebit.recipes.cli.dry_run import describe_grpo, describe_sft
from samebit.recipes.cli.main import main


def test_dry_run_describes_the_run_and_stops(demo_model, tmp_path, capsys):
    """Batch arithmetic, parameters and memory, from the configuration alone."""
    arguments = [
        f"model.path={demo_model}",
        f"output_dir={tmp_path}",
        "device=cpu",
        "dry_run=true",
        "data=reverse_digits",
        "rollout.prompts_per_step=6",
        "rollout.samples_per_prompt=4",
        "rollout.max_prompt_len=40",
        "rollout.max_new_tokens=24",
        "trainer.batch_size=12",
        "trainer.num_steps=50",
        "algorithm.kl_coef=0.1",
    ]
    assert main(["grpo", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    figures = dict(line.split() for line in lines[lines.index("device" + " " * 23 + "cpu") :])
    # Embedding 12 x 64; per layer: norms, q and k norms, qkv, proj, gate, up, down; final norm.
    layer = 2 * 64 + 2 * 16 + (4 + 2 * 2) * 16 * 64 + 64 * 64 + 3 * 64 * 192
    assert figures["parameters"] == f"{12 * 64 + 2 * layer + 64:,}"
    assert figures["samples_per_step"] == "24"
    assert figures["optimizer_steps_per_step"] == "2"
    assert figures["optimizer_steps"] == "100"
    assert figures["most_tokens_per_step"] == f"{24 * (40 + 24):,}"
    size, mib = 12 * 64 + 2 * layer + 64, 2**20
    assert float(figures["weights_mib"]) == round(4 * size / mib, 1) > 0
    assert figures["gradients_mib"] == figures["reference_mib"] == figures["weights_mib"]
    assert float(figures["optimizer_mib"]) == round(8 * size / mib, 1)
    assert float(figures["checkpoint_on_host_mib"]) == pytest.approx(16 * size / mib, abs=0.11)
    # Keys and values of two heads of 16 in two layers, in fp32, for every token of 24 samples.
    kv = 24 * 64 * 2 * 2 * 2 * 16 * 4
    assert float(figures["kv_mib_if_all_run_at_once"]) == round(kv / mib, 1)
    assert (figures["train_records"], figures["held_out_records"]) == ("100,000", "256")
    assert "kl_coef: 0.1" in "\n".join(lines)
    assert list(tmp_path.iterdir()) == []


def test_a_step_with_refills_is_described(demo_model, tmp_path):
    """All that it may draw; what it trains on is as without them."""
    words = [f"model.path={demo_model}", f"output_dir={tmp_path}", "device=cpu"]
    words += ["data=reverse_digits", "data.size=8", "rollout.prompts_per_step=6"]
    words += ["rollout.dynamic_sampling=true", "rollout.max_refills=3", "rollout.refill_prompts=2"]
    words += ["rollout.max_prompt_len=40", "rollout.max_new_tokens=24"]
    figures = describe_grpo(resolve("grpo", words))
    assert (figures["samples_per_step"], figures["most_prompts_per_step"]) == (48, 12)
    assert figures["most_tokens_per_step"] == 12 * 8 * 64
    with pytest.raises(
        ValueError, match="up to 1048582 prompts a step; sample ids can name 1048576"
    ):
        describe_grpo(resolve("grpo", [*words, f"rollout.max_refills={1 << 19}"]))


@pytest.mark.parametrize(
    ("layout", "more", "moments", "name"),
    [
        ({"tensor": 2, "data": 2}, [], 8, "optimizer_mib"),
        (
            {"tensor": 2, "data": 2},
            ["trainer.parallel.distributed_optimizer=true"],
            4,
            "optimizer_mib",
        ),
        (
            {"tensor": 2, "data": 2},
            ["trainer.parallel.offload_optimizer=true"],
            8,
            "optimizer_on_host_mib",
        ),
        ({"tensor": 2, "data": 2}, ["trainer.background_checkpoints=false"], 8, "optimizer_mib"),
        (
            {"pipeline": 2, "context": 2},
            ["trainer.parallel.distributed_optimizer=true"],
            4,
            "optimizer_mib",
        ),
    ],
)
def test_the_description_of_several_processes(demo_model, layout, more, moments, name):
    """Two shards of the weights, two copies; what one process holds of all."""
    arguments = [f"model.path={demo_model}", "device=cpu", "trainer.batch_size=8"]
    arguments += ["data=reverse_digits"]
    arguments += [f"trainer.parallel.{key}={value}" for key, value in layout.items()]
    figures = describe_sft(resolve("sft", [*arguments, *more]))
    size = sum(x.numel() for x in load_file(demo_model / "model.safetensors").values())
    shard = -(-size // 2) / 2**20
    assert (figures["processes"], figures["parameters"]) == (4, size)
    assert figures["weights_mib"] == figures["gradients_mib"] == round(4 * shard, 1)
    assert figures[name] == round(moments * shard, 1)
    background = "trainer.background_checkpoints=false" not in more
    assert figures["checkpoint_on_host_mib"] == round((4 + moments) * shard * background, 1)


@pytest.mark.parametrize(("running", "count"), [(5, 5), (256, 24)])
def test_the_description_of_a_kv_cache(demo_model, running, count):
    """Of what can run at once: all samples of a step, or as many as the engine takes."""
    arguments = [f"model.path={demo_model}", "device=cpu", "data=reverse_digits"]
    arguments += ["data.eval_size=4", "trainer.num_steps=1", f"engine.max_num_seqs={running}"]
    arguments += ["rollout.prompts_per_step=6", "rollout.samples_per_prompt=4"]
    arguments += ["rollout.max_prompt_len=40", "rollout.max_new_tokens=24"]
    figures = describe_grpo(resolve("grpo", arguments))
    kv = count * 64 * 2 * 2 * 2 * 16 * 4 / 2**20
    assert figures["kv_mib_if_all_run_at_once"] == round(kv, 1)


@pytest.mark.parametrize(("placement", "drafts"), [("colocated", 2), ("process", 1)])
def test_the_description_of_a_draft_beside_tensor_ranks(demo_model, placement, drafts):
    """Each rank of an engine has the whole draft; an engine apart is of one."""
    arguments = [f"model.path={demo_model}", "device=cpu", "data=reverse_digits", *ONLINE]
    arguments += ["data.eval_size=4", "trainer.num_steps=1", f"placement={placement}"]
    arguments += ["rollout.prompts_per_step=6", "rollout.samples_per_prompt=4"]
    arguments += ["rollout.max_prompt_len=40", "rollout.max_new_tokens=24"]
    arguments += ["trainer.parallel.tensor=2", "numerics.tp_invariant=true"]
    figures = describe_grpo(resolve("grpo", arguments))
    kv = 24 * 64 * (2 + drafts) * 2 * 2 * 16 * 4 / 2**20
    assert figures["kv_mib_if_all_run_at_once"] == round(kv, 1)


@pytest.mark.parametrize(("place", "kept"), [("loss", 1), ("reward", 1), (None, 0)])
def test_the_description_of_a_reference(demo_model, place, kept):
    """Its weights are kept wherever the KL to it stands."""
    arguments = [f"model.path={demo_model}", "device=cpu", "data=reverse_digits", "algorithm=rloo"]
    arguments += ["data.eval_size=4", "trainer.num_steps=1"]
    arguments += ["rollout.max_prompt_len=40", "rollout.max_new_tokens=24"]
    arguments += [f"algorithm.kl_in={place}", "algorithm.kl_coef=0.1"] if place else []
    figures = describe_grpo(resolve("grpo", arguments))
    assert figures["reference_mib"] == kept * figures["weights_mib"]
    if kept:
        arguments += ["trainer.parallel.offload_reference=true"]
        offloaded = describe_grpo(resolve("grpo", arguments))
        assert offloaded.pop("reference_on_host_mib") == figures.pop("reference_mib")
        assert offloaded == figures


def test_dry_run_of_sft(demo_model, tmp_path, capsys):
    """The same for supervised fine-tuning."""
    arguments = [f"model.path={demo_model}", f"output_dir={tmp_path}", "dry_run=true"]
    arguments += ["data=reverse_digits", "trainer.batch_size=8"]
    assert main(["sft", *arguments]) == 0
    output = capsys.readouterr().out
    assert "optimizer_steps              100\n" in output
    assert "samples_per_step             8\n" in output
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_a_missing_model(capsys):
    """The description needs the model's sizes; exit code 1 with one line."""
    assert main(["grpo", "model.path=/no/such/model", "dry_run=true"]) == 1
    error = "samebit grpo: model folder /no/such/model does not exist"
    assert capsys.readouterr().err.startswith(error)
