"""Attention by path equals attention over everything with a mask, forward and backward."""

import pytest
import torch

from twinloop.models.attention import CausalRows, Path, Scores, TreePaths

LENGTH, HEADS, WIDTH = 23, 4, 16
DEEP_TREE = [
    Path((0, 5)),  # a prompt
    Path((5, 9), ((0, 5),)),  # its first answer
    Path((9, 12), ((0, 9),)),  # two below that
    Path((12, 18), ((0, 9),)),
    Path((18, 20), ((0, 5),)),  # its second answer
    Path((20, 23)),  # another tree
]
LAYERS = {
    "plain": Scores(scale=0.3),
    "window": Scores(scale=0.3, window=4),
    "softcap": Scores(scale=0.3, softcap=0.5),
    "both": Scores(scale=0.3, window=2, softcap=0.5),
}


def heads(count: int, rows: int = 1) -> torch.Tensor:
    """As a projection leaves them: [B, L, heads, E], seen as [B, heads, L, E]."""
    return torch.randn(rows, LENGTH, count, WIDTH).transpose(1, 2).requires_grad_()


def sees(paths: list[Path], window: int | None) -> torch.Tensor:
    """[queries, keys], one by one."""
    allowed = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    for path in paths:
        along = [index for begin, end in path.spans for index in range(begin, end)]
        for place in range(path.num_keys - path.num_queries, path.num_keys):
            seen = along[: place + 1][-(window or LENGTH) :]
            allowed[along[place], seen] = True
    return allowed


def plain_attention(q, k, v, scores: Scores, allowed: torch.Tensor) -> torch.Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    products = (q @ k.mT) * scores.scale
    if scores.softcap:
        products = scores.softcap * torch.tanh(products / scores.softcap)
    return products.masked_fill(~allowed, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("layer", LAYERS)
def test_paths_equal_one_masked_attention_with_their_gradients(layer: str, kv_heads: int) -> None:
    torch.manual_seed(0)
    scores, plan = LAYERS[layer], TreePaths(DEEP_TREE)
    inputs = heads(HEADS), heads(kv_heads), heads(kv_heads)
    weights = torch.randn(1, HEADS, LENGTH, WIDTH)
    expected = plain_attention(*inputs, scores, sees(DEEP_TREE, scores.window))
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    for _ in range(2):  # the second layer finds the masks of the first
        found = plan.attend(*inputs, scores)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        for gradient, other in zip(torch.autograd.grad((found * weights).sum(), inputs), wanted, strict=True):
            torch.testing.assert_close(gradient, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", LAYERS)
def test_causal_rows_equal_one_masked_attention(layer: str) -> None:
    torch.manual_seed(0)
    scores = LAYERS[layer]
    inputs = heads(HEADS, rows=2), heads(2, rows=2), heads(2, rows=2)
    expected = plain_attention(*inputs, scores, sees([Path((0, LENGTH))], scores.window))
    torch.testing.assert_close(CausalRows().attend(*inputs, scores), expected, atol=1e-6, rtol=1e-5)


def test_layers_of_other_windows_share_one_plan() -> None:
    torch.manual_seed(0)
    plan, inputs = TreePaths(DEEP_TREE), (heads(HEADS), heads(2), heads(2))
    for window in (3, None, 7):
        scores = Scores(scale=1.0, window=window)
        expected = plain_attention(*inputs, scores, sees(DEEP_TREE, window))
        torch.testing.assert_close(plan.attend(*inputs, scores), expected, atol=1e-6, rtol=1e-5)
