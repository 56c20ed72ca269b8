"""The policy gradients in a run: presets, on-policy first steps, the reference of rewards."""

from contextlib import closing

import numpy as np
import pytest
import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from run_children import open_run, roll_out, update
from torch.nn.modules.module import register_module_forward_hook

from samebit.recipes.cli.compose import CONFIG_DIR, resolve
from samebit.recipes.cli.main import main
from samebit.recipes.grpo import GrpoRecipe
from samebit.trainer.algorithms.registry import ALGORITHMS, find_algorithm

PRESETS = sorted(file.stem for file in (CONFIG_DIR / "algorithm").glob("*.yaml"))
NOT_DEFAULT = {
    "dapo": {"clip_ratio_high": 0.28, "length_penalty": "overlong", "max_response_len": 48},
    "dr_grpo": {"normalize_std": False},
    "gspo_token": {"token_level": True},
    "grpo_kl": {"kl_coef": 0.001},
}
REQUIRED = {"distillation": ["distillation.teacher=t"]}
MEANS = {"dr_grpo": ("constant", 48), "gspo": ("sequence", None), "gspo_token": ("sequence", None)}
OFF_POLICY = [
    *((name, {}) for name in ALGORITHMS if not find_algorithm(name).Config.sections),
    ("grpo", {"tis_clip": 2.0}),
    ("rloo", {"tis_clip": 1.5, "length_penalty": "relative"}),
    ("reinforce_plus_plus", {"kl_coef": 0.1, "entropy_coef": 0.01}),
]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_its_algorithm(preset):
    """Its settings, its loss mean, DAPO's prompts, and nothing else; lengths are the rollout's."""
    words = ["model.path=m", "rollout.max_new_tokens=48"]
    chosen = [f"algorithm={preset}", *REQUIRED.get(preset, [])]
    run, plain = resolve("grpo", [*words, *chosen]), resolve("grpo", words)
    assert run.algorithm.name in ALGORITHMS
    default = find_algorithm(run.algorithm.name).Config(name=run.algorithm.name)
    assert vars(run.algorithm) == vars(default) | NOT_DEFAULT.get(preset, {})
    mean = MEANS.get(preset, ("token", None))
    assert (run.trainer.loss_mean, run.trainer.loss_mean_tokens) == mean
    run.trainer.loss_mean, run.trainer.loss_mean_tokens = "token", None
    assert run.trainer == plain.trainer
    assert run.rollout.dynamic_sampling == (preset == "dapo")
    run.rollout.dynamic_sampling = False
    assert run.rollout == plain.rollout


def test_every_algorithm_has_a_preset():
    assert set(ALGORITHMS) <= set(PRESETS)


@pytest.mark.parametrize("size", [12, 6])
def test_no_pass_computes_what_the_rollout_knows(runs, size):
    """Every sample goes through the policy once, with gradients: the rollout's log-probs are those
    of the weights that drew it, of later optimizer steps too."""
    run, passed = runs.resolve("once", f"trainer.batch_size={size}"), []

    def watch(module, _, embedded):
        if isinstance(module, LanguageModelEmbedding):
            passed.append((len(embedded), torch.is_grad_enabled()))

    with closing(GrpoRecipe(run, open_run(run))) as recipe:
        rollout = roll_out(recipe, 0)
        with register_module_forward_hook(watch):
            stats = update(recipe, rollout)
    samples = [sample for group in rollout.samples() for sample in group]
    assert len(stats) == 12 // size
    assert all(has_gradients for _, has_gradients in passed)
    assert sum(tokens for tokens, _ in passed) == sum(len(s.token_ids) for s in samples)


def test_two_optimizer_steps_of_each(runs):
    """Of samples of two turns, some of whose tokens are masked: on the first every drawn token's
    ratio is exactly 1, on the second it has moved, and no masked one has any."""
    words = ["trainer.batch_size=6", "rollout.generate=run_children:two_turns"]
    run = runs.resolve("steps", *words, f"trainer.num_steps={len(OFF_POLICY)}")
    ratios, groups = [], []
    with closing(GrpoRecipe(run, open_run(run))) as recipe:
        recipe.trainer.freeze_reference()
        for step, (name, settings) in enumerate(OFF_POLICY):
            found = find_algorithm(name)

            class Watched(found):
                def advantages(self, rewards, samples):
                    groups.append(samples)
                    return super().advantages(rewards, samples)

                def loss(self, inputs):
                    ratios.append((recipe.trainer.step, inputs.log_ratio.detach().exp()))
                    return super().loss(inputs)

            recipe.algorithm = Watched(found.Config(name=name, **settings))
            before = recipe.trainer.step
            rollout = roll_out(recipe, step)
            stats = update(recipe, rollout)
            first, second = (
                torch.cat([r for at, r in ratios if at == before + i]) for i in range(2)
            )
            drawn = [sum(c.loss_mask) for group in rollout.completions for c in group]
            assert (len(first), len(second)) == (sum(drawn[:6]), sum(drawn[6:]))
            assert first.eq(1).all(), name
            assert second.ne(1).float().mean() > 0.5, name
            assert stats[0].logprob_mismatches == 0
            assert (stats[0].metrics["train/ratio"], len(stats)) == (1.0, 2)
            referred = [s.ref_logprobs is not None for group in groups.pop() for s in group]
            assert set(referred) == {recipe.algorithm.rewards_need_reference}


def test_the_reference_of_rewards_is_the_policy_at_the_start(runs):
    """To the bit, so that the KL of the first step is exactly 0; and no longer on the second."""
    run = runs.resolve("kl", "algorithm=rloo", "algorithm.kl_coef=0.1", "rollout.temperature=0.7")
    with closing(GrpoRecipe(run, open_run(run))) as recipe:
        for step in range(2):
            rollout, seen = roll_out(recipe, step), []
            own = recipe.algorithm.advantages
            recipe.algorithm.advantages = lambda rewards, groups, seen=seen, own=own: (
                seen.extend(s for group in groups for s in group) or own(rewards, groups)
            )
            update(recipe, rollout)
            recipe.algorithm.advantages = own
            equal = [(s.ref_logprobs == s.logprobs)[s.loss_mask] for s in seen]
            assert len(equal) == 12
            assert all(x.all() for x in equal) if step == 0 else not any(x.all() for x in equal)
            rows = [(s.logprobs.astype(float) - s.ref_logprobs)[s.loss_mask] for s in seen]
            kl = recipe.reference_metrics["rollout/kl"]
            assert kl == pytest.approx(np.concatenate(rows).mean(), rel=1e-5)
            assert (kl == 0.0) == (step == 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["algorithm=rloo", "algorithm.clip_ratio_low=0.1"],
            "unknown key: algorithm.clip_ratio_low",
        ),
        (["algorithm=rloo", "algorithm.dual_clip=3"], "unknown key: algorithm.dual_clip"),
        (["algorithm=cispo", "algorithm.tis_clip=2"], "algorithm.tis_clip is 2.0; it must be 0"),
        (["algorithm=gspo", "algorithm.kl_in=reward"], "it must be 'loss', its default: nothing"),
        (["algorithm.tis_clip=1.1"], "it must be 0, or finite and above 1 + clip_ratio_high = 1.2"),
        (
            ["algorithm.tis_clip=2", "algorithm.dual_clip=3"],
            "algorithm.tis_clip is 2.0; it must be",
        ),
        (["algorithm.overlong_buffer=0.5"], "algorithm.overlong_buffer is 0.5; it must be 0.2"),
        (["algorithm.length_penalty=overlong"], "algorithm.max_response_len is None; it must be a"),
        (
            ["algorithm=dapo", "algorithm.max_response_len=999"],
            "it must be at most 256, rollout.max",
        ),
        (["algorithm.length_penalty=short"], "algorithm.length_penalty is 'short'; it must be one"),
        (["algorithm=rloo", "rollout.samples_per_prompt=1"], "rollout.samples_per_prompt is 1; it"),
        (
            ["algorithm.kl_coef=1", "algorithm.kl_in=reward", "algorithm.kl_estimator=k3_unbiased"],
            "it must be k1, k2 or k3 with algorithm.kl_in=reward",
        ),
        (
            ["algorithm=dr_grpo", "algorithm.std_over=batch"],
            "nothing reads it where algorithm.norm",
        ),
        (["trainer.loss_mean=constant"], "trainer.loss_mean_tokens is None; it must be a positive"),
        (["trainer.loss_mean_tokens=9"], "nothing reads it where trainer.loss_mean is 'token'"),
        (["algorithm.entropy_coef=-1"], "algorithm.entropy_coef is -1.0; it must be finite and at"),
    ],
)
def test_what_an_algorithm_would_ignore_is_refused(words, message, capsys):
    """At the start, of a dry run too; one line names field, value and what would be right."""
    assert main(["grpo", "model.path=m", *words, "dry_run=true"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_one_sample_of_a_prompt_is_enough_for_reinforce_plus_plus():
    words = ["model.path=m", "algorithm=reinforce_plus_plus", "rollout.samples_per_prompt=1"]
    assert resolve("grpo", words).algorithm.name == "reinforce_plus_plus"
