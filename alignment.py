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
from torch import Tensor
from torch.autograd.function import once_differentiable

# About how many numbers the (b, W, D) difference of one block may have: cache size on a CPU, room
# for large matrix products on a GPU.
BLOCK_NUMEL = {"cpu": 2**20, "cuda": 2**27}


def blocks(n_images: int, per_image: int, device_type: str) -> Iterator[slice]:
    """Slices of the images with about BLOCK_NUMEL numbers each, `per_image` an image."""
    size = max(1, BLOCK_NUMEL.get(device_type, 2**24) // max(1, per_image))
    for start in range(0, n_images, size):
        yield slice(start, min(start + size, n_images))


class Alignment(torch.autograd.Function):
    """s = l2norm((attended − words)² Pᵀ + p) with attended = weights · regions, and a · s + a₀.

    weights (B, W, R), regions (B, R, D), words (W, D), P (S, D), p (S,), a (S,), a₀ (1,)
    -> alignments (B, W, S), logits of their gates (B, W).
    eps is added to the length in l2norm; an all-zero row gets a zero gradient.
    """

    @staticmethod
    def forward(ctx, weights, regions, words, P, p, a, a0, eps):
        (n_images, n_words, _), (S, D) = weights.shape, P.shape
        aligned = weights.new_empty(n_images, n_words, S)
        logits, length = (weights.new_empty(n_images, n_words) for _ in range(2))
        buffer = None
        for rows in blocks(n_images, n_words * D, weights.device.type):
            buffer = _difference(weights[rows], regions[rows], words, buffer)
            squared = buffer.square_()
            block = aligned[rows].flatten(0, 1)  # (b W, S)
            torch.addmm(p, squared.flatten(0, 1), P.T, out=block)
            torch.linalg.vector_norm(block, dim=-1, out=length[rows].flatten())
            block *= _inverse(length[rows], eps).view(-1, 1)
            torch.addmv(a0, block, a, out=logits[rows].flatten())
        ctx.save_for_backward(weights, regions, words, P, a, aligned, length)
        ctx.eps = eps
        return aligned, logits

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_aligned, grad_logits):
        weights, regions, words, P, a, aligned, length = ctx.saved_tensors
        (n_images, n_words, _), D = weights.shape, P.shape[1]
        grad_weights, grad_regions = torch.empty_like(weights), torch.empty_like(regions)
        grad_words, grad_P, twice_P = torch.zeros_like(words), torch.zeros_like(P), 2 * P
        grad_p, grad_a = torch.zeros_like(P[:, 0]), torch.zeros_like(a)
        difference = other = None
        for rows in blocks(n_images, n_words * D, weights.device.type):
            s, size = aligned[rows], length[rows].unsqueeze(-1)  # (b, W, S), (b, W, 1)
            gate = grad_logits[rows].unsqueeze(-1)
            grad_a.addmv_(s.flatten(0, 1).T, gate.flatten())
            grad = torch.addcmul(grad_aligned[rows], gate, a)  # of s, by both ways
            # Through l2norm: with s = x / (‖x‖ + eps), dx = ds / (‖x‖ + eps) − s (s · ds) / ‖x‖.
            along = torch.linalg.vecdot(s, grad).unsqueeze(-1) * _inverse(size, 0)
            grad = grad.mul_(_inverse(size, ctx.eps)).addcmul_(s, along, value=-1).flatten(0, 1)
            grad_p += grad.sum(0)

            difference = _difference(weights[rows], regions[rows], words, difference)
            if other is None or len(other) != len(difference):
                other = torch.empty_like(difference)
            squared = torch.mul(difference, difference, out=other).flatten(0, 1)  # (b W, D)
            grad_P.addmm_(grad.T, squared)
            torch.mm(grad, twice_P, out=squared)
            grad_difference = other.mul_(difference)
            torch.bmm(grad_difference, regions[rows].transpose(1, 2), out=grad_weights[rows])
            torch.bmm(weights[rows].transpose(1, 2), grad_difference, out=grad_regions[rows])
            for one in grad_difference:
                grad_words -= one
        grad_a0 = grad_logits.sum().view(1)
        return grad_weights, grad_regions, grad_words, grad_P, grad_p, grad_a, grad_a0, None


def _difference(weights: Tensor, regions: Tensor, words: Tensor, out: Tensor | None) -> Tensor:
    """weights · regions − words: (b, W, R), (b, R, D), (W, D) -> (b, W, D), in `out` if it fits."""
    if out is None or len(out) != len(weights):
        out = weights.new_empty(len(weights), *words.shape)
    return torch.baddbmm(words.expand_as(out), weights, regions, beta=-1, out=out)


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
        for rows in blocks(n_images, n_words * S, gates.device.type):
            pooled[rows].index_add_(1, owner, gates[rows].unsqueeze(-1) * aligned[rows])
        ctx.save_for_backward(gates, aligned, owner)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gates, aligned, owner = ctx.saved_tensors
        grad_gates, grad_aligned = torch.empty_like(gates), torch.empty_like(aligned)
        for rows in blocks(*aligned.shape[:1], aligned[0].numel(), gates.device.type):
            of_words = grad[rows].index_select(1, owner)  # (b, W, S)
            grad_gates[rows] = torch.linalg.vecdot(of_words, aligned[rows])
            torch.mul(of_words, gates[rows].unsqueeze(-1), out=grad_aligned[rows])
        return grad_gates, grad_aligned, None, None
