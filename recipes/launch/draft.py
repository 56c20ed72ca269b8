"""The draft that a run trains: what the configuration says of it, and its trainer."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samebit.kernels.reduce import ALONE, RankGroup, gather_rows
from samebit.recipes.eagle3_config import Eagle3Run
from samebit.rollout.engine import Engine
from samebit.rollout.models.config import ModelConfig
from samebit.rollout.models.decoder import EMBEDDING, FINAL_NORM, OUTPUT, DenseModel
from samebit.rollout.models.draft.config import OUTPUT as DRAFT_OUTPUT
from samebit.rollout.models.draft.config import DraftConfig, Verifier
from samebit.rollout.models.draft.vocabulary import DraftVocabulary
from samebit.rollout.runtime.draft_folder import DIALECTS, DraftFolder, open_draft
from samebit.rollout.runtime.weights import load_dummy
from samebit.trainer.config import OptimizerConfig, require_default
from samebit.trainer.draft.batch import TargetHead
from samebit.trainer.draft.config import TttConfig
from samebit.trainer.draft.trainer import DraftTrainer
from samebit.weight_sync.transports.file import require_replaceable

USUAL_VOCABULARY = 32000


def checked_draft(run: Eagle3Run, model: ModelConfig) -> tuple[DraftFolder | None, DraftConfig]:
    """The folder that the draft starts from, if there is one, and the draft's configuration.

    Raises ValueError or OSError for a draft of another target, or that cannot be written.
    """
    model = require_dense(model)
    verifier = Verifier(run.draft.verifier or run.model.path, (model.architecture,))
    folder = None
    if run.draft.path is None:
        config = _new(run, model)
    else:
        path = Path(run.draft.path)
        if not path.is_dir():
            raise FileNotFoundError(f"draft.path is '{path}', which is no folder")
        folder = open_draft(path, model.num_layers, run.draft.norm_output)
        config = folder.config
    config = replace(config, verifier=verifier, speculative_tokens=run.ttt.passes)
    for name, own in (("vocab_size", model.vocab_size), ("target_hidden_size", model.hidden_size)):
        if getattr(config, name) != own:
            raise ValueError(
                f"draft.path={run.draft.path} is another target's: its {name} is "
                f"{getattr(config, name)}; that of {run.model.path} is {own}"
            )
    require_positions(config, run.rollout.longest)
    run.ttt.require_enough(config.is_block)
    DIALECTS[run.draft.dialect].write(config, "float32")
    if run.resume:
        require_replaceable(run.run_dir / "draft")
    return folder, config


def require_dense(model: ModelConfig) -> DenseModel:
    """The target of a draft in training; ValueError for one of another kind."""
    if not isinstance(model, DenseModel):
        raise ValueError(
            f"model.path is a {model.architecture}; drafts are trained for dense decoders"
        )
    return model


def _new(run: Eagle3Run, model: DenseModel) -> DraftConfig:
    wanted = run.draft.vocab_size or min(USUAL_VOCABULARY, model.vocab_size)
    if wanted > model.vocab_size:
        raise ValueError(f"draft.vocab_size is {wanted}; the target has {model.vocab_size} tokens")
    if wanted == model.vocab_size:
        meaning = f"the draft says all of the target's {wanted} tokens"
        require_default(run.draft, "draft", ("vocab_prompts",), meaning)
    mask = run.draft.mask_token_id
    if mask is not None and mask >= model.vocab_size:
        raise ValueError(f"draft.mask_token_id is {mask}; the target has {model.vocab_size} tokens")
    names = ("fc_norm", "norm_before_fc", "norm_before_residual", "feeds_normed", "mask_token_id")
    options = {name: getattr(run.draft, name) for name in names}
    return new_draft(model, wanted, run.draft.layers, **options)


def new_draft(
    model: DenseModel, vocab_size: int, layers: Sequence[int] | None, **options: Any
) -> DraftConfig:
    """A new draft of a target; ValueError, naming draft.layers, for streams that it has not."""
    try:
        captured = None if layers is None else tuple(layers)
        return DraftConfig.of_target(model, vocab_size, captured, **options)
    except ValueError as error:
        raise ValueError(f"draft.layers: {error}") from error


def require_positions(config: DraftConfig, longest: int) -> None:
    """ValueError unless the draft reaches over a run's longest sample."""
    if config.max_position < longest:
        raise ValueError(
            f"rollout.max_prompt_len + rollout.max_new_tokens = {longest} tokens; the draft's "
            f"max_position_embeddings is {config.max_position}"
        )


def make_draft_trainer(
    run: Eagle3Run,
    folder: DraftFolder | None,
    config: DraftConfig,
    vocabulary: DraftVocabulary,
    engine: Engine,
) -> DraftTrainer:
    """A trainer beside the engine, whose weights it reads; see make_trainer_of."""
    target = engine.model_config
    assert isinstance(target, DenseModel)
    return make_trainer_of(
        *(target, engine.weights, folder, config, vocabulary),
        optimizer=run.trainer.optimizer,
        num_steps=run.trainer.num_steps,
        ttt=run.ttt,
        seed=run.seed,
    )


def make_trainer_of(
    target: DenseModel,
    weights: Mapping[str, Tensor],
    folder: DraftFolder | None,
    config: DraftConfig,
    vocabulary: DraftVocabulary,
    *,
    optimizer: OptimizerConfig,
    num_steps: int,
    ttt: TttConfig,
    seed: int,
    ranks: RankGroup = ALONE,
    target_ranks: RankGroup = ALONE,
) -> DraftTrainer:
    """A trainer of a draft whose target has these live weights, by engine names: whole, or the
    shard of one of target_ranks, each of which trains the same draft. ranks: see DraftTrainer.

    The draft is the folder's or a new one: random, by the seed, with norms of one; where the widths
    are the same its output layer begins with the target's rows.
    """
    head = weights[EMBEDDING if target.tie_embeddings else OUTPUT].detach()
    trainer = DraftTrainer(
        config,
        vocabulary,
        TargetHead(
            final_norm=weights[FINAL_NORM].detach(),
            output_weight=head,
            norm_eps=target.norm_eps,
            vocab_size=target.vocab_size,
            num_layers=target.num_layers,
            ranks=target_ranks,
        ),
        weights[EMBEDDING].detach(),
        optimizer,
        num_steps,
        ttt,
        ranks,
    )

    def new(params: Mapping[str, Tensor]) -> None:
        load_dummy(trainer.specs, params, seed)
        if config.hidden_size == target.hidden_size:
            rows = vocabulary.token_ids.to(head.device)
            whole = head if target_ranks.size == 1 else gather_rows(head, target_ranks)
            params[DRAFT_OUTPUT][: len(rows)] = whole[rows]

    trainer.fill(new if folder is None else folder.fill)
    return trainer


def engine_of(run: Eagle3Run, device: torch.device) -> Engine:
    """The target, which answers and is not trained."""
    config = replace(
        run.engine,
        max_model_len=run.rollout.longest,
        seed=run.seed,
        attention=run.numerics.attention,
        model_family=run.model_family,
    )
    return Engine(run.model.path, config, device=device)
