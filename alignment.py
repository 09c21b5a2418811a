"""The costly lines of LHSC with hand-written backward passes: alignments, and their gated sum.

Per image and word the difference m_l − q_l is D wide (1024) while what goes in and what comes out
is narrow (R = 36 attention weights, S = 256). Autograd would keep three D-wide tensors for every
image × word of a batch; here none is kept: the backward pass computes the difference again, some
images at a time, in buffers. It is faster too, because the buffers stay in the cache. The plain
versions are the reference in tests/test_alignment.py.

Shape letters: B images, C captions, R regions, W words of all captions end to end, D joint size,
S similarity size, b images of one block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# About how many numbers the (b, w, D) difference of one block may have: what the cache holds on a
# CPU, room for large matrix products on a GPU.
BLOCK_NUMEL = {"cpu": 2**19, "cuda": 2**27}


def images_a_block(per_image: int, device_type: str) -> int:
    """How many images make a block, of `per_image` numbers each."""
    return max(1, BLOCK_NUMEL.get(device_type, 2**24) // max(1, per_image))


def blocks(
    n_images: int, n_words: int, width: int, device_type: str
) -> Iterator[tuple[slice, slice]]:
    """Images × words in blocks of about BLOCK_NUMEL numbers, `width` an image and word.

    A block has some images with all words, or one image with some words.
    """
    images = images_a_block(n_words * width, device_type)
    parts = -(-n_words // images_a_block(width, device_type))
    words = max(1, -(-n_words // max(1, parts)))
    for i in range(0, n_images, images):
        for j in range(0, n_words, words):
            yield slice(i, min(i + images, n_images)), slice(j, min(j + words, n_words))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear outside autograd; on a CPU by oneDNN, which on AMD's is a fifth faster than MKL."""
    if x.device.type == "cpu" and x.dtype != torch.float64 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class Alignment(torch.autograd.Function):
    """s = l2norm((attended − words)² Pᵀ + p) with attended = weights · regions, and a · s + a₀.

    weights (B, W, R), regions (B, R, D), words (W, D), P (S, D), p (S,), a (S,), a₀ (1,)
    -> alignments (B, W, S), logits of their gates (B, W).
    eps is added to the length in l2norm; an all-zero row gets a zero gradient. `dtype` is that of
    the matrix products and the difference, None for the inputs'; sums and what comes out have the
    inputs'.
    """

    @staticmethod
    def forward(ctx, weights, regions, words, P, p, a, a0, eps, dtype=None):
        (n_images, n_words, _), (S, D) = weights.shape, P.shape
        aligned = weights.new_empty(n_images, n_words, S)
        logits, length = (weights.new_empty(n_images, n_words) for _ in range(2))
        weights, regions, words, P, p = (
            x.to(dtype or x.dtype) for x in (weights, regions, words, P, p)
        )
        for i, j in blocks(n_images, n_words, D, weights.device.type):
            squared = _difference(weights[i, j], regions[i], words[j]).square_()
            x = linear(squared, P, p).to(aligned.dtype)  # (b, w, S)
            size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            length[i, j] = size.squeeze(-1)
            s = torch.mul(x, _inverse(size, eps), out=aligned[i, j])
            torch.addmv(a0, s.flatten(0, 1), a, out=logits[i, j].view(-1))
        ctx.save_for_backward(weights, regions, words, P, a, aligned, length)
        ctx.eps = eps
        return aligned, logits

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_aligned, grad_logits):
        weights, regions, words, P, a, aligned, length = ctx.saved_tensors
        (n_images, n_words, _), D = weights.shape, P.shape[1]
        grad_weights = torch.empty_like(weights, dtype=a.dtype)
        grad_regions, grad_words, grad_P = (
            torch.zeros_like(x, dtype=a.dtype) for x in (regions, words, P)
        )
        grad_p, grad_a, twice_P = torch.zeros_like(grad_P[:, 0]), torch.zeros_like(a), 2 * P
        buffers = None
        for i, j in blocks(n_images, n_words, D, weights.device.type):
            s, size = aligned[i, j], length[i, j].unsqueeze(-1)  # (b, w, S), (b, w, 1)
            gate = grad_logits[i, j].unsqueeze(-1)
            grad_a.addmv_(s.flatten(0, 1).T, gate.flatten())
            grad = torch.addcmul(grad_aligned[i, j], gate, a)  # of s, by both ways
            # Through l2norm: with s = x / (‖x‖ + eps), dx = ds / (‖x‖ + eps) − s (s · ds) / ‖x‖.
            along = torch.linalg.vecdot(s, grad).unsqueeze(-1) * _inverse(size, 0)
            grad = grad.mul_(_inverse(size, ctx.eps)).addcmul_(s, along, value=-1)  # of x
            grad_p += grad.sum((0, 1))

            grad = grad.flatten(0, 1).to(P.dtype)  # (b w, S)
            if buffers is None:  # the first block is the largest
                buffers = weights.new_empty(2, len(grad) * D)
            shape = (*size.shape[:2], D)
            difference, other = (buffer[: len(grad) * D].view(shape) for buffer in buffers)
            _difference(weights[i, j], regions[i], words[j], out=difference)
            squared = torch.mul(difference, difference, out=other).flatten(0, 1)
            add_product(grad_P, grad.T, squared)
            torch.mm(grad, twice_P, out=squared)
            grad_difference = other.mul_(difference)
            grad_weights[i, j] = grad_difference @ regions[i].transpose(1, 2)
            add_product(grad_regions[i], weights[i, j].transpose(1, 2), grad_difference)
            for one in grad_difference:
                grad_words[j] -= one
        grad_a0 = grad_logits.sum().view(1)
        return grad_weights, grad_regions, grad_words, grad_P, grad_p, grad_a, grad_a0, None, None


def add_product(sums: Tensor, a: Tensor, b: Tensor) -> None:
    """sums += a b, of two or three axes, in the dtype of the sums whatever that of a and b."""
    if sums.dtype != b.dtype:
        sums += a @ b
    elif sums.dim() == 2:
        sums.addmm_(a, b)
    else:
        sums.baddbmm_(a, b)


def _difference(
    weights: Tensor, regions: Tensor, words: Tensor, out: Tensor | None = None
) -> Tensor:
    """weights · regions − words: (b, w, R), (b, R, D), (w, D) -> (b, w, D)."""
    words = words.expand(len(weights), -1, -1)
    return torch.baddbmm(words, weights, regions, beta=-1, out=out)


def _inverse(length: Tensor, eps: float) -> Tensor:
    """1 / (length + eps), 0 where the length is 0."""
    return (length + eps).reciprocal_().masked_fill_(length == 0, 0)


class GatedSum(torch.autograd.Function):
    """Σ over the words of each caption of gate · alignment.

    gates (B, W), aligned (B, W, S), owner (W,) the caption of each word -> pooled (B, C, S).
    """

    @staticmethod
    def forward(ctx, gates, aligned, owner, n_captions):
        n_images, n_words, S = aligned.shape
        pooled = aligned.new_zeros(n_images, n_captions, S)
        for i, j in blocks(n_images, n_words, S, gates.device.type):
            pooled[i].index_add_(1, owner[j], gates[i, j].unsqueeze(-1) * aligned[i, j])
        ctx.save_for_backward(gates, aligned, owner)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gates, aligned, owner = ctx.saved_tensors
        grad_gates, grad_aligned = torch.empty_like(gates), torch.empty_like(aligned)
        for i, j in blocks(*aligned.shape, gates.device.type):
            of_words = grad[i].index_select(1, owner[j])  # (b, w, S)
            grad_gates[i, j] = torch.linalg.vecdot(of_words, aligned[i, j])
            torch.mul(of_words, gates[i, j].unsqueeze(-1), out=grad_aligned[i, j])
        return grad_gates, grad_aligned, None, None
