"""The costly line of LHSC, s_l = l2norm(P (m_l − q_l)² + p), without keeping its D-wide numbers.

Per image and word the difference m_l − q_l is D wide (1024) while what goes in and what comes out
is narrow (R = 36 attention weights, S = 256). Autograd would keep three D-wide tensors for every
image × word of a batch; here none is kept: the backward pass computes the difference again, some
images at a time, in two buffers. It is faster too, because the buffers stay in the cache. The
plain version is the reference in tests/test_alignment.py.

Shape letters: B images, R regions, W words of all captions end to end, D joint size, S similarity
size, b images of one block.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# About how many numbers the (b, W, D) difference of one block may have: cache size on a CPU, room
# for large matrix products on a GPU.
BLOCK_NUMEL = {"cpu": 2**20, "cuda": 2**27}


def block_images(device_type: str, n_words: int, embed_size: int) -> int:
    """How many images make a block."""
    return max(1, BLOCK_NUMEL.get(device_type, 2**24) // max(1, n_words * embed_size))


class LocalAlignment(torch.autograd.Function):
    """l2norm((attended − words)² Pᵀ + p) with attended = weights · regions.

    weights (B, W, R), regions (B, R, D), words (W, D), P (S, D), p (S,) -> (B, W, S).
    eps is added to the length in l2norm; an all-zero row gets a zero gradient.
    """

    @staticmethod
    def forward(ctx, weights, regions, words, P, p, eps):
        n_images, n_words, _ = weights.shape
        block = block_images(weights.device.type, n_words, words.shape[1])
        aligned = weights.new_empty(n_images, n_words, len(P))
        buffer = weights.new_empty(min(block, n_images), n_words, words.shape[1])
        for rows in torch.arange(n_images).split(block):
            rows = slice(int(rows[0]), int(rows[-1]) + 1)
            squared = _difference(weights[rows], regions[rows], words, buffer).square_()
            torch.addmm(p, squared.flatten(0, 1), P.T, out=aligned[rows].flatten(0, 1))
        length = torch.linalg.vector_norm(aligned, dim=-1, keepdim=True)
        scale = (length + eps).reciprocal_().masked_fill_(length == 0, 0)
        aligned *= scale
        ctx.save_for_backward(weights, regions, words, P, aligned, length, scale)
        return aligned

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weights, regions, words, P, aligned, length, scale = ctx.saved_tensors
        # Through l2norm: with s = x · scale, dx = scale · ds − s (s · ds) / ‖x‖.
        along = (aligned * grad).sum(-1, keepdim=True)
        along = (along / length).masked_fill_(length == 0, 0)
        grad = (grad * scale).addcmul_(aligned, along, value=-1)  # (B, W, S)

        n_images, n_words, _ = weights.shape
        block = block_images(weights.device.type, n_words, words.shape[1])
        grad_weights, grad_regions = torch.empty_like(weights), torch.empty_like(regions)
        grad_words, grad_P, twice_P = torch.zeros_like(words), torch.zeros_like(P), 2 * P
        buffers = weights.new_empty(2, min(block, n_images), n_words, words.shape[1])
        for rows in torch.arange(n_images).split(block):
            rows = slice(int(rows[0]), int(rows[-1]) + 1)
            grad_rows = grad[rows].flatten(0, 1)  # (b W, S)
            difference = _difference(weights[rows], regions[rows], words, buffers[0])
            squared = torch.mul(difference, difference, out=buffers[1, : len(difference)])
            grad_P.addmm_(grad_rows.T, squared.flatten(0, 1))
            torch.mm(grad_rows, twice_P, out=squared.flatten(0, 1))
            grad_difference = squared.mul_(difference)  # (b, W, D)
            torch.bmm(grad_difference, regions[rows].transpose(1, 2), out=grad_weights[rows])
            torch.bmm(weights[rows].transpose(1, 2), grad_difference, out=grad_regions[rows])
            for one in grad_difference:
                grad_words -= one
        return grad_weights, grad_regions, grad_words, grad_P, grad.sum((0, 1)), None


def _difference(weights: Tensor, regions: Tensor, words: Tensor, buffer: Tensor) -> Tensor:
    """weights · regions − words in `buffer`: (b, W, R), (b, R, D), (W, D) -> (b, W, D)."""
    out = buffer[: len(weights)]
    out.copy_(words)
    return torch.baddbmm(out, weights, regions, beta=-1, out=out)
