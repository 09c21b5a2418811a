"""The hand-written backward passes against the plain versions."""

import pytest
import torch

import alignment
from alignment import Alignment, GatedSum
from attention import l2norm

OWNER = torch.tensor([0, 0, 0, 1, 2, 2, 2])  # of seven words


def plain(weights, regions, words, P, p, a, a0):
    difference = weights @ regions - words  # (B, W, D): autograd keeps this and its square
    aligned = l2norm(difference.square() @ P.T + p)
    return aligned, aligned @ a + a0


def arguments(n_images=5, n_words=7, num_regions=4, embed_size=6, sim_dim=3):
    shapes = [
        (n_images, n_words, num_regions), (n_images, num_regions, embed_size),
        (n_words, embed_size), (sim_dim, embed_size), (sim_dim,), (sim_dim,), (1,),
    ]  # fmt: skip
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def assert_same(ours, expected, inputs):
    """Values and all gradients, for a random gradient of each output."""
    grads = [torch.randn_like(x) for x in expected]
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, grads),
        torch.autograd.grad(expected, inputs, grads),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("images_a_block", [0, 0.4, 1, 2, 100])  # 0.4: some words of one
def test_alignments_equal_the_plain_version(monkeypatch, images_a_block):
    inputs = arguments()
    monkeypatch.setitem(alignment.BLOCK_NUMEL, "cpu", int(images_a_block * 7 * 6))
    assert_same(Alignment.apply(*inputs, 1e-8), plain(*inputs), inputs)


def test_products_in_bfloat16_come_close(monkeypatch):
    """Values and gradients in float32, as wrong as rounding to eight bits makes them."""
    sizes = {"n_images": 6, "n_words": 7, "num_regions": 36, "embed_size": 256, "sim_dim": 64}
    inputs = [x.detach().float().requires_grad_() for x in arguments(**sizes)]
    with torch.no_grad():  # as in a model: weights of 36 regions, rows of length 1
        inputs[0].abs_().div_(36)
        inputs[1].div_(16)
        inputs[2].div_(16)
    monkeypatch.setitem(alignment.BLOCK_NUMEL, "cpu", 3 * 7 * 256)
    ours, exact = Alignment.apply(*inputs, 1e-8, torch.bfloat16), plain(*inputs)
    grads = [torch.randn_like(x) for x in exact]
    found, expected = (torch.autograd.grad(x, inputs, grads) for x in (ours, exact))
    for a, b in zip((*ours, *found), (*exact, *expected), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm().item() < 0.02 * b.norm().item()
    assert not torch.allclose(ours[0], exact[0], rtol=1e-5)


@pytest.mark.parametrize("images_a_block", [0, 0.4, 1, 2, 100])  # 0.4: some words of one
def test_gated_sums_equal_the_plain_version(monkeypatch, images_a_block):
    monkeypatch.setitem(alignment.BLOCK_NUMEL, "cpu", int(images_a_block * 7 * 3))
    gates = torch.rand(5, 7, dtype=torch.float64, requires_grad=True)
    aligned = torch.randn(5, 7, 3, dtype=torch.float64, requires_grad=True)
    product = gates.unsqueeze(-1) * aligned
    expected = torch.stack([product[:, c == OWNER].sum(1) for c in range(3)], dim=1)
    ours = GatedSum.apply(gates, aligned, OWNER, 3)
    assert_same([ours], [expected], [gates, aligned])


@pytest.mark.parametrize(("n_images", "n_words", "width"), [(5, 7, 6), (1, 100, 3), (9, 1, 1)])
@pytest.mark.parametrize("numel", [1, 20, 50, 10**6])
def test_blocks_hold_every_image_and_word_once(monkeypatch, n_images, n_words, width, numel):
    monkeypatch.setitem(alignment.BLOCK_NUMEL, "cpu", numel)
    seen = torch.zeros(n_images, n_words)
    for i, j in alignment.blocks(n_images, n_words, width, "cpu"):
        seen[i, j] += 1
        block = seen[i, j]
        assert block.numel() * width <= max(numel, width)
        assert block.is_contiguous() or len(block) == 1
    assert (seen == 1).all()


def test_gradcheck():
    assert torch.autograd.gradcheck(lambda *x: Alignment.apply(*x, 1e-8), arguments(2, 3))
    gates = torch.rand(2, 7, dtype=torch.float64, requires_grad=True)
    aligned = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: GatedSum.apply(*x, OWNER, 3), (gates, aligned))


def test_a_zero_row_has_value_zero_and_gradient_zero():
    inputs = weights, regions, words, _, p, _, _ = arguments(1, 2)
    with torch.no_grad():
        words[0] = (weights @ regions)[0, 0]  # the difference of word 0 is 0 …
        p.zero_()  # … and so is what is projected
    aligned, logits = Alignment.apply(*inputs, 1e-8)
    (aligned.sum() + logits.sum()).backward()
    assert aligned[0, 0].abs().max() < 1e-6
    assert all(torch.isfinite(x.grad).all() for x in inputs)


def test_nothing_d_wide_is_kept_for_the_backward_pass():
    """Kept per image × word: R weights and S similarities, no D-wide number."""
    kept = {}
    n_images, n_words, num_regions, embed_size, sim_dim = 8, 50, 4, 512, 3
    inputs = arguments(n_images, n_words, num_regions, embed_size, sim_dim)

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        Alignment.apply(*inputs, 1e-8)
    per_pair = n_images * n_words * (num_regions + sim_dim + 2)
    given = n_images * num_regions * embed_size + n_words * embed_size + sim_dim * embed_size
    assert sum(kept.values()) <= per_pair + given + sim_dim
