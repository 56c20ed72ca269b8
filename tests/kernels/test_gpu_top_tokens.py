"""The likeliest tokens and the reverse KL on the card."""

import pytest
import torch

from samebit.kernels.top_tokens import reverse_kl, top_tokens

pytestmark = pytest.mark.gpu

T, D, V, K = 300, 256, 50_000, 64


def rows(seed, *shape):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", generator=generator)


def test_they_are_the_rows_own():
    """As a stable sort has them, with ties; and no bit depends on the other rows."""
    logits = (4 * rows(1, T, V)).round(decimals=1)
    top = top_tokens(logits, K)
    expected = logits.sort(dim=1, descending=True, stable=True).indices[:, :K]
    assert torch.equal(top.token_ids.long(), expected)
    alone = top_tokens(logits[7:8], K)
    for name in ("token_ids", "logprobs", "rest"):
        assert torch.equal(getattr(alone, name), getattr(top, name)[7:8]), name


@pytest.mark.parametrize("own_sum", [False, True])
def test_kl_and_gradients(own_sum):
    """Of bf16 operands, against fp64; into a buffer of Megatron's too. The same bits twice."""
    hidden, weight = (x.bfloat16() for x in (rows(2, T, D) / 4, rows(3, V + 176, D)))
    top, temperature = top_tokens(2 * rows(4, T, V), K), torch.full((T,), 0.7, device="cuda")
    found = []
    for _ in range(2):
        own = [x.clone().requires_grad_() for x in (hidden, weight)]
        main_grad = torch.zeros(weight.shape, device="cuda") if own_sum else None
        kl = reverse_kl(*own, top, temperature, V, main_grad=main_grad)
        kl.sum().backward()
        found.append((kl.detach(), own[0].grad, main_grad if own_sum else own[1].grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    exact = [x.double().requires_grad_() for x in (hidden, weight[:V])]
    logprobs = (exact[0] @ exact[1].T / 0.7).log_softmax(1)
    chosen = logprobs.gather(1, top.token_ids.long())
    outcomes = [torch.cat([x, torch.log1p(-x.exp().sum(1, keepdim=True))], 1)
                for x in (chosen, top.logprobs.double())]  # fmt: skip
    expected = (outcomes[0].exp() * (outcomes[0] - outcomes[1])).sum(1)
    expected.sum().backward()
    kl, *gradients = found[0]
    torch.testing.assert_close(kl.double(), expected.detach(), atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(gradients, exact, strict=True):
        ours = ours[: len(theirs)].double()
        assert (ours - theirs.grad).norm() / theirs.grad.norm() < 1e-2
