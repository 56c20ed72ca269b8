"""What draft training works on: packed samples with what the target made of their tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from samebit.kernels.logprob import logits
from samebit.kernels.reduce import ALONE, RankGroup
from samebit.kernels.rms_norm import rms_norm
from samebit.rollout.models.draft.config import DraftConfig
from samebit.trainer.types import MicroBatch


@dataclass(frozen=True, kw_only=True, eq=False)
class TargetHead:
    """How the target's last stream becomes logits: its final norm and its output layer."""

    final_norm: Tensor  # [Dt]
    output_weight: Tensor  # [V or more, Dt], or this rank's rows of it
    norm_eps: float
    vocab_size: int
    num_layers: int
    ranks: RankGroup = ALONE
    """Who share its output layer and its embedding; all take the same micro-batches."""

    def logits(self, stream: Tensor) -> Tensor:
        """Streams [c, Dt] after all layers, not normalised -> [c, V] fp32."""
        hidden = rms_norm(stream, self.final_norm, self.norm_eps)
        return logits(hidden, self.output_weight, self.vocab_size, self.ranks)


@dataclass(frozen=True, kw_only=True, eq=False)
class DraftBatch:
    """A micro-batch and the target's residual streams of its tokens.

    streams: by number of layers, those that the draft captures and that after all of them, each
    [T, Dt] in the model's dtype. Where the target has not computed a sample's last token, whose
    streams nothing reads, they may hold anything finite.
    """

    batch: MicroBatch
    streams: Mapping[int, Tensor]

    @property
    def index(self) -> int:
        """The micro-batch's place in its optimizer step."""
        return self.batch.index

    @property
    def num_tokens(self) -> int:
        """Tokens computed."""
        return self.batch.num_tokens

    def require(self, config: DraftConfig, num_layers: int) -> None:
        """ValueError unless the streams are those that this draft is trained on, and its positions
        reach over the longest sample."""
        if (longest := max(self.batch.seq_lens)) > config.max_position:
            raise ValueError(
                f"micro-batch {self.index}: a sample has {longest} tokens; the draft's "
                f"max_position_embeddings is {config.max_position}"
            )
        shape = (self.num_tokens, config.target_hidden_size)
        for layer in sorted({*config.captured_layers, num_layers}):
            stream = self.streams.get(layer)
            found = None if stream is None else tuple(stream.shape)
            if found != shape:
                raise ValueError(
                    f"micro-batch {self.index}: the stream after {layer} layers is {found}; it "
                    f"must be {shape}"
                )


def pack_streams(
    parts: Sequence[Mapping[int, Tensor]], seq_lens: Sequence[int], device: torch.device
) -> dict[int, Tensor]:
    """The streams [T, Dt] of samples of seq_lens tokens, one behind another, from each sample's.

    A sample's are [L, Dt], or [L - 1, Dt] as Completion.hidden_states has them: the last token,
    whose streams nothing reads, then gets zeros. Raises ValueError for another length.
    """
    packed: dict[int, list[Tensor]] = {}
    for streams, length in zip(parts, seq_lens, strict=True):
        for layer, stream in streams.items():
            if length - len(stream) not in (0, 1):
                raise ValueError(
                    f"the stream after {layer} layers has {len(stream)} tokens; its sample has "
                    f"{length}"
                )
            missing = stream.new_zeros(length - len(stream), stream.shape[1])
            packed.setdefault(layer, []).append(torch.cat([stream, missing]))
    return {layer: torch.cat(streams).to(device) for layer, streams in packed.items()}
