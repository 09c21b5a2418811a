"""The alignments' and gated sums' own backward passes, against plain versions by autograd."""

import pytest
import torch
from torch.testing import assert_close

import attention
from attention import Alignment, GatedSum

LENGTHS = torch.tensor([3, 1, 3])  # of three captions, seven words


def plain_alignment(weights, regions, words, P, p, a):
    x = (weights @ regions - words).square() @ P.T + p  # (B, W, S); D-wide tensors are kept
    return x, torch.linalg.vector_norm(x, dim=-1), x @ a


def plain_gated_sum(gates, x, lengths):
    parts = (gates.unsqueeze(-1) * x).split(lengths.tolist(), dim=1)
    return torch.stack([part.sum(1) for part in parts], dim=1)  # (B, C, S)


def random(*shapes):
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def of_alignment(n_images=5, n_words=7, num_regions=4, embed_size=6, sim_dim=3):
    return random(
        (n_images, n_words, num_regions), (n_images, num_regions, embed_size),
        (n_words, embed_size), (sim_dim, embed_size), (sim_dim,), (sim_dim,),
    )  # fmt: skip


def align(*inputs, dtype=None):
    return Alignment.apply(*inputs, dtype)


def grads_of(outputs, inputs):
    """Of all inputs, for a repeatable random gradient of each output."""
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in outputs]
    return torch.autograd.grad(outputs, inputs, grads)


# Chunks of: one word of one image, three words, one image, two images, all images.
@pytest.mark.parametrize("numel", [1, 3 * 6, 7 * 6, 2 * 7 * 6, 10**6])
def test_values_and_gradients_are_those_of_the_plain_versions(monkeypatch, numel):
    monkeypatch.setitem(attention.CHUNK_NUMEL, "cpu", numel)
    inputs = of_alignment()
    ours, expected = align(*inputs), plain_alignment(*inputs)
    assert_close(ours, expected, rtol=1e-12, atol=1e-13)
    assert_close(grads_of(ours, inputs), grads_of(expected, inputs), rtol=1e-10, atol=1e-12)
    inputs = random((5, 7), (5, 7, 3))  # gates and alignments
    ours, expected = GatedSum.apply(*inputs, LENGTHS), plain_gated_sum(*inputs, LENGTHS)
    assert_close(ours, expected, rtol=1e-12, atol=1e-13)
    assert_close(grads_of([ours], inputs), grads_of([expected], inputs), rtol=1e-10, atol=1e-12)


def test_products_in_bfloat16_come_close(monkeypatch):
    """Values and gradients in float32, as wrong as rounding to eight bits makes them."""
    weights, regions, words, *others = of_alignment(6, 7, 36, 256, 64)
    # As in a model: weights of 36 regions, rows of length 1.
    inputs = [weights.abs() / 36, regions / 16, words / 16, *others]
    inputs = [x.detach().float().requires_grad_() for x in inputs]
    monkeypatch.setitem(attention.CHUNK_NUMEL, "cpu", 3 * 7 * 256)
    ours, exact = align(*inputs, dtype=torch.bfloat16), plain_alignment(*inputs)
    pairs = zip((*ours, *grads_of(ours, inputs)), (*exact, *grads_of(exact, inputs)), strict=True)
    for found, expected in pairs:
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 0.02 * expected.norm()
    assert not torch.allclose(ours[0], exact[0], rtol=1e-5)


def test_an_alignment_of_length_zero_has_finite_gradients():
    inputs = weights, regions, words, _, p, _ = of_alignment(1, 2)
    with torch.no_grad():
        words[0] = (weights @ regions)[0, 0]  # the difference of word 0 is 0 …
        p.zero_()  # … and so is what is projected
    x, length, product = align(*inputs)
    sum(output.sum() for output in (x, length, product)).backward()
    assert x[0, 0].abs().max() < 1e-12 and length[0, 0] < 1e-12
    assert all(torch.isfinite(x.grad).all() for x in inputs)


def test_nothing_d_wide_is_kept_for_the_backward_pass():
    """Kept for an image and a word: R weights and S similarities, no D-wide tensor."""
    kept = {}
    n_images, n_words, num_regions, embed_size, sim_dim = 8, 50, 4, 512, 3

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 8
        return tensor

    inputs = of_alignment(n_images, n_words, num_regions, embed_size, sim_dim)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        align(*inputs)
    per_pair = num_regions + sim_dim + 3
    given = sum(x.numel() for x in inputs[1:])
    assert sum(kept.values()) <= n_images * n_words * per_pair + given
