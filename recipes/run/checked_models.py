"""The models that a run reads: whether each could be had, before anything is made of it.

Layouts and the headers of the weights are looked at, no weight is read.
"""

from pathlib import Path

from samebit.kernels.registry import attention_kind
from samebit.recipes.config import GrpoRun
from samebit.recipes.data.text import TextCodec, vocabulary_of
from samebit.recipes.eagle3_config import TrainingRun
from samebit.recipes.models.shards import require_shards
from samebit.rollout.device import resolve_device
from samebit.rollout.models.config import ModelConfig
from samebit.rollout.models.registry import has_value_head, load_model_config
from samebit.rollout.runtime.weights import open_safetensors
from samebit.trainer.algorithms.registry import find_algorithm, make_algorithm
from samebit.trainer.config import ParallelConfig, require
from samebit.trainer.critic.value_model import value_model_of
from samebit.trainer.megatron.stages import make_stage


def checked_model(run: TrainingRun) -> ModelConfig:
    """Return the model that a run starts from; raises ValueError or OSError if it could not."""
    attention = attention_kind(run.numerics.attention)
    attention.require_usable(resolve_device(run.device).type)
    fits = attention.is_invariant or not run.numerics.grad_segments
    meaning = "an invariant kind, such as canonical, with numerics.grad_segments"
    require(fits, "numerics.attention", run.numerics.attention, meaning)
    model = _checked_folder(run, run.model.path, run.trainer.parallel)
    if isinstance(run, GrpoRun):
        require_shards(model, run.placement.engine_tensor, "placement.engine_tensor")
    return model


def checked_critic(run: GrpoRun, model: ModelConfig) -> ModelConfig | None:
    """Return the model that a run's critic starts from, if it has one; `model` is the policy's.

    Raises as checked_model does, and ValueError for an algorithm whose section is missing.
    """
    if run.critic is None:
        _require_idle(
            run, find_algorithm(run.algorithm.name).needs_values, "critic", "needs_values"
        )
        return None
    if run.critic.model is None:
        _require_layout(model, run.critic_parallel)
        return model
    rates = has_value_head(run.critic.model)
    found = _checked_folder(run, run.critic.model, run.critic_parallel, rates)
    for name in ("architecture", "vocab_size"):
        own, policy = getattr(found, name), getattr(model, name)
        meaning = f"a folder whose {name} is that of model.path, {policy!r}; it is {own!r}"
        require(own == policy, "critic.model", run.critic.model, meaning)
    _require_longest(run, found, "critic.model")
    return found


def checked_teacher(run: GrpoRun, model: ModelConfig, text: TextCodec) -> ModelConfig | None:
    """Return the teacher's model, if the run has one; `model` and `text` are the policy's.

    Raises as checked_critic does, and ValueError unless every token that the policy can draw is the
    teacher's too, under the same id, and for more of its tokens than it has.
    """
    if run.distillation is None:
        algorithm = find_algorithm(run.algorithm.name)
        _require_idle(run, algorithm.needs_teacher, "distillation", "needs_teacher")
        return None
    key, folder = "distillation.teacher", run.distillation.teacher
    engine = ParallelConfig(tensor=run.trainer.parallel.tensor)
    found = _checked_folder(run, folder, engine)
    own, its = text.vocabulary, vocabulary_of(folder, key)
    for token, token_id in sorted(own.items(), key=lambda item: item[1]):
        meaning = f"a folder whose tokenizer has the policy's vocabulary: token {token_id} of "
        meaning += f"model.path is {token!r}, which is {its.get(token, 'none')} there"
        require(its.get(token) == token_id, key, folder, meaning)
    meaning = f"a folder whose vocab_size is at least that of model.path, {model.vocab_size}; it "
    meaning += f"is {found.vocab_size}"
    require(found.vocab_size >= model.vocab_size, key, folder, meaning)
    top_k = make_algorithm(run.algorithm).teacher_top_k
    meaning = f"at most {found.vocab_size}, the teacher's tokens"
    require(top_k <= found.vocab_size, "algorithm.loss_top_k", top_k, meaning)
    _require_longest(run, found, key)
    return found


def _checked_folder(
    run: TrainingRun, folder: str, parallel: ParallelConfig, rates: bool = False
) -> ModelConfig:
    """parallel: how the model is to be spread; rates: the folder's output layer is a value head,
    and the model is that of its trunk."""
    model = load_model_config(folder, run.model_family, rates)
    _require_layout(model, parallel)
    if run.numerics.tp_invariant:
        model.segment_shapes(resolve_device(run.device))
    open_safetensors(Path(folder), (value_model_of(model) if rates else model).param_specs())
    return model


def _require_layout(model: ModelConfig, parallel: ParallelConfig) -> None:
    """ValueError for tensor ranks or stages that cannot share the model equally."""
    require_shards(model, parallel.tensor, f"{parallel.key}.tensor")
    make_stage(model, 0, parallel.pipeline, parallel.virtual_pipeline, parallel.key)


def _require_idle(run: GrpoRun, needed: bool, section: str, flag: str) -> None:
    meaning = f"a class whose Config.sections has `{section}`, as its {flag} is set"
    require(not needed, "algorithm.name", run.algorithm.name, meaning)


def _require_longest(run: GrpoRun, model: ModelConfig, key: str) -> None:
    lengths = f"{key}: rollout.max_prompt_len + rollout.max_new_tokens"
    model.require_context(run.rollout.longest, lengths)
