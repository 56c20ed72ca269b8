"""The draft's forward by contract operations; differentiable, and the same for engine and training.

It knows nothing of caches and passes: the caller says what attends, and where a state comes from.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from samebit.kernels.attention_kind import Heads
from samebit.kernels.linear import linear
from samebit.kernels.logprob import logits
from samebit.kernels.reduce import ALONE, RankGroup, vocab_parallel_embedding
from samebit.kernels.rms_norm import rms_norm
from samebit.kernels.sample import draw
from samebit.kernels.swiglu import swiglu
from samebit.rollout.models.draft.config import (
    FC,
    FC_NORM,
    FINAL_NORM,
    INPUT_NORM,
    LAYER,
    MASK,
    OUTPUT,
    DraftConfig,
)

Attend = Callable[[Tensor], Tensor]  # qkv [T, (Hq + 2 Hkv) Dh] by kv head -> [T, Hq, Dh]


def split_heads(qkv: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [T, (Hq + 2 Hkv) Dh] by kv head -> queries [T, Hq, Dh], keys, values [T, Hkv, Dh]."""
    by_group = qkv.view(len(qkv), heads.num_kv_heads, heads.per_kv + 2, heads.head_dim)
    q, k, v = by_group.split([heads.per_kv, 1, 1], dim=2)
    return q.reshape(len(qkv), heads.num_heads, heads.head_dim), k.squeeze(2), v.squeeze(2)


class DraftDecoder:
    """The draft over parameters that somebody else owns and may rewrite in place.

    `params` are whole, on every rank of a target that is not. `embedding` [V, D] is the draft's
    own, or the target's rows of one of `ranks`. Norms may be given in fp32: they are rounded to the
    states' dtype where they are used. main_grads: fp32 buffers by name, to which the backward adds
    the gradients of those matrices.
    """

    def __init__(
        self,
        config: DraftConfig,
        params: Mapping[str, Tensor],
        embedding: Tensor,
        ranks: RankGroup = ALONE,
        main_grads: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.heads = config.attention_heads
        self.embedding = embedding
        self._params = params
        self._main_grads = main_grads or {}

    def fuse(self, features: Sequence[Tensor]) -> Tensor:
        """Captured streams, each [T, Dt], in the order of captured_layers -> states [T, D].

        It is done once for each token that the target has computed.
        """
        parts = list(features)
        if self.config.fc_norm:
            parts = [self._norm(x, FC_NORM.format(i)) for i, x in enumerate(parts)]
        joined = torch.cat(parts, dim=-1)
        if self.config.norm_before_fc:
            joined = self._norm(joined, INPUT_NORM)
        return self._linear(joined, FC)

    def mask_state(self) -> Tensor:
        """The state [1, D] that stands for streams which the target has yet to compute."""
        learned = self._params[MASK].to(self._params[FC].dtype)[None]
        return self.fuse(learned.split(self.config.target_hidden_size, dim=-1))

    def step(self, states: Tensor, token_ids: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        """One pass of the layer over states [T, D] and the tokens after them, token_ids [T].

        Returns the states to feed the next pass with, and those that give the logits, both [T, D].
        """
        embedded = vocab_parallel_embedding(token_ids, self.embedding, self.ranks)
        normed = self._norm(states, f"{LAYER}hidden_norm.weight")
        inputs = torch.cat([self._norm(embedded, f"{LAYER}input_layernorm.weight"), normed], -1)
        attended = attend(self._linear(inputs, f"{LAYER}self_attention.linear_qkv.weight"))
        residual = normed if self.config.norm_before_residual else states
        proj = f"{LAYER}self_attention.linear_proj.weight"
        residual = residual + self._linear(attended.flatten(1), proj)
        branch = self._norm(residual, f"{LAYER}pre_mlp_layernorm.weight")
        branch = swiglu(self._linear(branch, f"{LAYER}mlp.linear_fc1.weight"))
        residual = residual + self._linear(branch, f"{LAYER}mlp.linear_fc2.weight")
        final = self._norm(residual, FINAL_NORM)
        return (final if self.config.feeds_normed else residual), final

    def logits(self, final: Tensor) -> Tensor:
        """States [S, D] after the final norm -> [S, Vd] fp32, by draft id; not differentiable where
        main_grads hold the output layer."""
        return logits(final, self._params[OUTPUT], self.config.draft_vocab_size)

    def choose(
        self, final: Tensor, vocabulary: Tensor, temperature: Tensor, *keys: Tensor
    ) -> Tensor:
        """States [B, D] after the final norm -> the target's ids [B] of the tokens that the draft
        takes by the noise of the samples.

        vocabulary [Vd]: the target's ids; temperature [B] fp32; keys: seeds, positions, sample ids
        and greedy, [B].
        """
        known = self.logits(final)
        scaled = known.new_full((len(known), self.config.vocab_size), float("-inf"))
        scaled.index_copy_(1, vocabulary, known / temperature[:, None])
        # Logits of damaged weights may be NaN: what is chosen then must be some token.
        return draw(scaled, *keys).clamp(0, self.config.vocab_size - 1)

    @property
    def output_weight(self) -> Tensor:
        """[Vd, D]: the live rows of the output layer."""
        return self._params[OUTPUT][: self.config.draft_vocab_size]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, self._params[name].to(x.dtype), self.config.norm_eps)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return linear(x, self._params[name], main_grad=self._main_grads.get(name))
