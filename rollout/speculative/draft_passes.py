"""DraftPasses: what a draft model computes for an engine, over keys and values in its KV cache.

Every tensor parallel rank has the whole draft, and computes the same on the same streams: a pass is
too short to be worth a sum over ranks at each of its products. The target's embedding alone is
theirs together.
"""

from collections.abc import Mapping

from torch import Tensor

from samebit.kernels.attention_inputs import attention_inputs
from samebit.kernels.attention_kind import AttentionPlan
from samebit.kernels.reduce import ALONE
from samebit.kernels.transfer import to_device
from samebit.rollout.models.draft.config import EMBEDDING
from samebit.rollout.models.draft.decoder import DraftDecoder
from samebit.rollout.speculative.proposer import ProposerParts


class DraftPasses:
    """The passes of an engine's draft model; its keys and values are the KV cache's last layer."""

    def __init__(self, parts: ProposerParts) -> None:
        draft = parts.draft
        assert draft is not None, "the engine loads it before it makes its KV cache"
        self._parts, self._params, self.config = parts, draft.params, draft.config
        ranks = ALONE if draft.config.owns_embedding else parts.ranks
        embedding = parts.runner.model.embedding
        self._draft = DraftDecoder(draft.config, draft.params, embedding, ranks)
        device = parts.runner.device
        self.attention = type(parts.attention)(self._draft.heads, device)
        self.attention.reads_ahead = False  # samples write a place that they share, each in turn
        self._rope_table = draft.config.rope_table(parts.num_positions, device)
        self._keys, self._values = parts.cache.keys[-1], parts.cache.values[-1]
        self._vocabulary = to_device(draft.vocabulary.token_ids, device)

    def fuse(self, streams: Mapping[int, Tensor]) -> Tensor:
        """The states [T, D] that are made of captured streams, each [T, Dt], by layer."""
        return self._model().fuse([streams[layer] for layer in self.config.captured_layers])

    def mask_state(self) -> Tensor:
        """Of a block draft: see DraftDecoder.mask_state."""
        return self._model().mask_state()

    def step(
        self,
        states: Tensor,
        token_ids: Tensor,
        positions: Tensor,
        kv_slots: Tensor,
        plan: AttentionPlan,
    ) -> tuple[Tensor, Tensor]:
        """A pass over rows [T], each with the token behind it; see DraftDecoder.step."""

        def attend(qkv: Tensor) -> Tensor:
            q = attention_inputs(
                qkv, None, self.config.norm_eps, self._rope_table, positions, kv_slots, self._keys,
                self._values,
            )  # fmt: skip
            return self.attention.attend(q, self._keys, self._values, plan)

        return self._model().step(states, token_ids, attend)

    def choose(self, final: Tensor, temperature: Tensor, *keys: Tensor) -> Tensor:
        """See DraftDecoder.choose."""
        return self._draft.choose(final, self._vocabulary, temperature, *keys)

    def _model(self) -> DraftDecoder:
        """The draft, on the embedding that is the target's now."""
        embedding = self._parts.runner.model.embedding
        self._draft.embedding = self._params.get(EMBEDDING, embedding)
        return self._draft
