"""The local alignment with its own backward pass against the plain version."""

import pytest
import torch

import alignment
from alignment import LocalAlignment
from attention import l2norm


def plain(weights, regions, words, P, p):
    difference = weights @ regions - words  # (B, W, D): autograd keeps this and its square
    return l2norm(difference.square() @ P.T + p)


def arguments(n_images=5, n_words=7, num_regions=4, embed_size=6, sim_dim=3):
    shapes = [
        (n_images, n_words, num_regions), (n_images, num_regions, embed_size),
        (n_words, embed_size), (sim_dim, embed_size), (sim_dim,),
    ]  # fmt: skip
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("images_a_block", [1, 2, 100])
def test_values_and_gradients_equal_the_plain_version(monkeypatch, images_a_block):
    inputs = arguments()
    monkeypatch.setitem(alignment.BLOCK_NUMEL, "cpu", images_a_block * 7 * 6)
    grad = torch.randn(5, 7, 3, dtype=torch.float64)
    ours, expected = LocalAlignment.apply(*inputs, 1e-8), plain(*inputs)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_gradcheck():
    assert torch.autograd.gradcheck(lambda *x: LocalAlignment.apply(*x, 1e-8), arguments(2, 3))


def test_a_zero_row_has_value_zero_and_gradient_zero():
    weights, regions, words, P, p = arguments(1, 2)
    with torch.no_grad():
        words[0] = (weights @ regions)[0, 0]  # the difference of word 0 is 0 …
        p.zero_()  # … and so is what is projected
    aligned = LocalAlignment.apply(weights, regions, words, P, p, 1e-8)
    aligned.sum().backward()
    assert aligned[0, 0].abs().max() < 1e-6
    assert all(torch.isfinite(x.grad).all() for x in (weights, regions, words, P, p))


def test_nothing_d_wide_is_kept_for_the_backward_pass():
    """Kept per image × word: R weights and S similarities, no D-wide number."""
    kept = {}
    n_images, n_words, num_regions, embed_size, sim_dim = 8, 50, 4, 512, 3
    inputs = arguments(n_images, n_words, num_regions, embed_size, sim_dim)

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        LocalAlignment.apply(*inputs, 1e-8)
    per_pair = n_images * n_words * (num_regions + sim_dim + 2)
    given = n_images * num_regions * embed_size + n_words * embed_size + sim_dim * embed_size
    assert sum(kept.values()) <= per_pair + given
