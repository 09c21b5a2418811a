"""The attention layers of LHSC: words over words, pooling of one modality, words over regions.

The captions of a batch are concatenated: `word_emb` is (W, D), `lengths` (C,) counts the words of
each caption, and `caption_index` (W,) gives the caption of each word. So nothing has to be masked,
and all captions are processed at once. Only the L × L affinities of words over words are padded.

Shape letters: B images, C captions, R regions, W words of all captions end to end, L longest
caption, D joint size, S similarity size; b images of one chunk, w words of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from graph_layers import BatchNorm1d

EPS = 1e-8
LAMBDA_SOFTMAX = 9.0  # inverse temperature of the attention over regions; SCAN's lambda_softmax


def l2norm(x: Tensor, dim: int = -1, eps: float = EPS) -> Tensor:
    """x / (‖x‖ + eps) along `dim`; any shape, same shape out.

    eps is added to the norm, as in the official code (`F.normalize` clamps instead). An all-zero
    vector stays zero and gets a zero gradient; the gradient of the square root would be NaN.
    """
    return x * inverse_length(torch.linalg.vector_norm(x, dim=dim, keepdim=True), eps)


def inverse_length(length: Tensor, eps: float = EPS) -> Tensor:
    """1 / (length + eps), and 0 where the length is 0, so that no gradient passes there."""
    return (length + eps).reciprocal().masked_fill(length == 0, 0)


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root of x ≥ 0 whose gradient at 0 is 0 instead of infinite."""
    zero = x == 0
    return x.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def init_xavier(module: nn.Module) -> None:
    """Initialise each linear layer in `module`: uniform in ±sqrt(6 / (in + out)), bias 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


def matmul(x: Tensor, y: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x @ y, multiplied in `dtype` if one is given; the result has the dtype of x."""
    return (x.to(dtype or x.dtype) @ y.to(dtype or y.dtype)).to(x.dtype)


# -- sums over the words of each caption ----------------------------------------------------------


def caption_index_of(lengths: Tensor) -> Tensor:
    """The caption of each word: lengths (C,) -> caption_index (W,)."""
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)


def segment_sum(x: Tensor, caption_index: Tensor, n_captions: int, dim: int) -> Tensor:
    """Sum over the words of each caption: `dim` of x shrinks from W to C."""
    shape = list(x.shape)
    shape[dim] = n_captions
    return x.new_zeros(shape).index_add_(dim, caption_index, x)


def segment_softmax(logits: Tensor, caption_index: Tensor, n_captions: int) -> Tensor:
    """Softmax over the words of each caption: (…, W) -> (…, W)."""
    peak = logits.new_full((*logits.shape[:-1], n_captions), -torch.inf)
    peak = peak.scatter_reduce(-1, caption_index.expand_as(logits), logits.detach(), "amax")
    exp = (logits - peak.index_select(-1, caption_index)).exp()
    sums = segment_sum(exp, caption_index, n_captions, dim=-1)
    return exp / sums.index_select(-1, caption_index)


def word_mean(word_emb: Tensor, lengths: Tensor) -> Tensor:
    """The mean word of each caption: word_emb (W, D), lengths (C,) -> (C, D)."""
    sums = segment_sum(word_emb, caption_index_of(lengths), len(lengths), dim=0)
    return sums / lengths.unsqueeze(1)


# -- words over words -----------------------------------------------------------------------------


class WordSelfAttention(nn.Module):
    """One level of word relations: x ← x + (l gᵀ / n) u. The affinity has no softmax.

    l, g, u = dropout(tanh(linear(x))). Words attend only to words of their own caption, and n is
    its length. In the official code `<pad>` takes part, and n is the longest length in the batch:
    a caption's embedding depends on its batch. To reproduce this, pass `<pad>` as words too.
    """

    def __init__(self, word_dim: int, drop_out: float = 0.0) -> None:
        super().__init__()
        self.local = nn.Linear(word_dim, word_dim)
        self.global_ = nn.Linear(word_dim, word_dim)
        self.value = nn.Linear(word_dim, word_dim)
        self.dropout = nn.Dropout(drop_out)
        init_xavier(self)

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        """words (W, word_dim), mask (C, L) True at each word -> (W, word_dim)."""
        layers = self.local, self.global_, self.value
        parts = torch.cat([self.dropout(torch.tanh(layer(words))) for layer in layers], dim=1)
        local, global_, value = pad_words(parts, mask).chunk(3, dim=2)  # (C, L, word_dim) each
        affinity = local @ global_.transpose(1, 2) / mask.sum(1).view(-1, 1, 1)  # (C, L, L)
        return words + (affinity @ value)[mask]


def pad_words(words: Tensor, mask: Tensor) -> Tensor:
    """Words (W, D), put where mask (C, L) is True, with zeros elsewhere -> (C, L, D)."""
    padded = words.new_zeros(*mask.shape, words.shape[1])
    padded[mask] = words
    return padded


# -- pooling of one modality ----------------------------------------------------------------------


class RegionPooling(nn.Module):
    """The global image vector: regions weighted by how well they agree with their mean.

    h_r = dropout(tanh(BN_R(W v_r)))         one BN channel per region position
    k   = dropout(tanh(BN_D(W' mean_r v_r)))
    î   = l2norm(Σ_r softmax_r(c · (h_r ∘ k) + c₀) v_r)
    """

    def __init__(self, embed_size: int, num_regions: int, dropout: float) -> None:
        super().__init__()
        self.local = nn.Linear(embed_size, embed_size)
        self.local_bn = BatchNorm1d(num_regions)
        self.global_ = nn.Linear(embed_size, embed_size)
        self.global_bn = BatchNorm1d(embed_size)
        self.common = nn.Linear(embed_size, 1)
        self.dropout = nn.Dropout(dropout)
        init_xavier(self)

    def weights(self, region_emb: Tensor) -> Tensor:
        """region_emb (B, R, D) -> weights (B, R); each row sums to 1."""
        local = self.dropout(torch.tanh(self.local_bn(self.local(region_emb))))
        global_ = self.dropout(torch.tanh(self.global_bn(self.global_(region_emb.mean(1)))))
        return self.common(local * global_.unsqueeze(1)).squeeze(-1).softmax(dim=1)

    def forward(self, region_emb: Tensor) -> Tensor:
        """region_emb (B, R, D) -> image_global (B, D)."""
        weights = self.weights(region_emb).unsqueeze(1)  # (B, 1, R)
        return l2norm((weights @ region_emb).squeeze(1))


class WordPooling(nn.Module):
    """The global caption vector: RegionPooling for a caption's words, without BatchNorm."""

    def __init__(self, embed_size: int, dropout: float) -> None:
        super().__init__()
        self.local = nn.Linear(embed_size, embed_size)
        self.global_ = nn.Linear(embed_size, embed_size)
        self.common = nn.Linear(embed_size, 1)
        self.dropout = nn.Dropout(dropout)
        init_xavier(self)

    def weights(self, word_emb: Tensor, lengths: Tensor) -> Tensor:
        """word_emb (W, D), lengths (C,) -> weights (W,), which sum to 1 in each caption."""
        caption_index = caption_index_of(lengths)
        local = self.dropout(torch.tanh(self.local(word_emb)))
        global_ = self.dropout(torch.tanh(self.global_(word_mean(word_emb, lengths))))
        logits = self.common(local * global_.index_select(0, caption_index)).squeeze(-1)
        return segment_softmax(logits, caption_index, len(lengths))

    def forward(self, word_emb: Tensor, lengths: Tensor) -> Tensor:
        """word_emb (W, D), lengths (C,) -> caption_global (C, D)."""
        weighted = self.weights(word_emb, lengths).unsqueeze(1) * word_emb
        return l2norm(segment_sum(weighted, caption_index_of(lengths), len(lengths), dim=0))


# -- words over regions ---------------------------------------------------------------------------


def cross_attention(
    region_emb: Tensor,
    word_emb: Tensor,
    caption_index: Tensor,
    n_captions: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Each word's attention over the regions of each image: weights that give unit vectors.

    A = leaky_relu₀.₁(q v). Each region's column is divided by its norm over the words of the
    caption. The softmax over regions of LAMBDA_SOFTMAX · A is divided by ‖Σ_r softmax_lr v_r‖, so
    that m_l = Σ_r weight_lr v_r = l2norm(Σ_r softmax_lr v_r).

    region_emb (B, R, D), word_emb (W, D), caption_index (W,) -> weights (B, W, R).
    dtype: used for the large matrix products; None keeps the inputs' dtype.
    """
    n_images, n_regions, _ = region_emb.shape
    affinity = matmul(word_emb, region_emb.flatten(0, 1).T, dtype)  # (W, B R)
    affinity = F.leaky_relu(affinity, 0.1)
    squared = segment_sum(affinity.square(), caption_index, n_captions, dim=0)  # (C, B R)
    scale = LAMBDA_SOFTMAX * inverse_length(safe_sqrt(squared))
    affinity = affinity * scale.index_select(0, caption_index)
    weights = affinity.view(-1, n_images, n_regions).softmax(dim=-1)
    return unit_weights(weights.transpose(0, 1).contiguous(), region_emb)  # (B, W, R)


def unit_weights(weights: Tensor, region_emb: Tensor) -> Tensor:
    """Weights, scaled so that each weighted sum of regions has norm 1.

    ‖Σ_r w_r v_r‖² = wᵀ (V Vᵀ) w: the R weights are scaled instead of the D-wide sum.
    weights (B, W, R), region_emb (B, R, D) -> (B, W, R).
    """
    gram = region_emb @ region_emb.transpose(1, 2)  # (B, R, R)
    squared = ((weights @ gram) * weights).sum(-1, keepdim=True)  # (B, W, 1)
    return weights * inverse_length(safe_sqrt(squared.clamp_min(0)))


# -- the costly step, with a hand-written backward pass -------------------------------------------
#
# For each image and word the difference m_l − q_l is D wide (1024), but input and output are narrow
# (R = 36 weights, S = 256). Autograd would keep three D-wide tensors for every image and word of a
# batch. Here none is kept: the backward pass recomputes the difference, one chunk of images at a
# time. This is also faster, because a chunk stays in the cache. The plain versions in
# tests/test_attention.py are the reference.

# About how many numbers a chunk may have: on a CPU as many as fit in the cache, on a GPU enough for
# large matrix products.
CHUNK_NUMEL = {"cpu": 2**21, "cuda": 2**27}


def chunk_size(numel: int, device: torch.device) -> int:
    """How many images make up a chunk, if each has `numel` numbers."""
    return max(1, CHUNK_NUMEL[device.type] // max(1, numel))


def chunks(
    n_images: int, n_words: int, width: int, device: torch.device
) -> Iterator[tuple[slice, slice]]:
    """Split images × words into chunks of about CHUNK_NUMEL numbers, `width` per image and word.

    A chunk has some images with all words, or one image with some words.
    """
    images = chunk_size(n_words * width, device)
    words = n_words if images > 1 else min(n_words, chunk_size(width, device))
    for i in range(0, n_images, images):
        for j in range(0, n_words, words):
            yield slice(i, i + images), slice(j, j + words)


def in_chunks(
    function: Callable[..., Tensor], numel: int, of_images: tuple[Tensor, ...], *others: object
) -> Tensor:
    """Apply `function` to some images at a time, and recompute it in the backward pass.

    of_images: its first arguments, (B, …); numel: about how many numbers it needs per image.
    """
    size = chunk_size(numel, of_images[0].device)
    parts = zip(*(x.split(size) for x in of_images), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([function(*part, *others) for part in parts])
    # Dropout, if there is any, has to draw the same numbers again.
    random = isinstance(function, nn.Module) and function.training
    return torch.cat([
        checkpoint(function, *part, *others, use_reentrant=False, preserve_rng_state=random)
        for part in parts
    ])  # fmt: skip


class Alignment(torch.autograd.Function):
    """x = P (m − q)² + p with m = weights · regions; its norm, and its dot product with a.

    weights (B, W, R), regions (B, R, D), words (W, D), P (S, D), p (S,), a (S,)
    -> x (B, W, S), ‖x‖ (B, W), a · x (B, W).
    dtype: used for the matrix products and the difference; None keeps the inputs' dtype. Sums and
    results always have the inputs' dtype.
    """

    @staticmethod
    def forward(ctx, weights, regions, words, P, p, a, dtype=None):
        (n_images, n_words, _), (S, D) = weights.shape, P.shape
        x = weights.new_empty(n_images, n_words, S)
        length, product = (weights.new_empty(n_images, n_words) for _ in range(2))
        weights, regions, words, P, p = (
            y.to(dtype or y.dtype) for y in (weights, regions, words, P, p)
        )
        for i, j in chunks(n_images, n_words, D, weights.device):
            squared = _difference(weights[i, j], regions[i], words[j]).square_()  # (b, w, D)
            rows = x[i, j].view(-1, S)  # (b w, S), a view: a chunk of x is contiguous
            if dtype in (None, x.dtype):
                torch.addmm(p, squared.flatten(0, 1), P.T, out=rows)
            else:
                rows.copy_(F.linear(squared.flatten(0, 1), P, p))
            length[i, j] = torch.linalg.vector_norm(x[i, j], dim=-1)
            product[i, j] = x[i, j] @ a
        ctx.save_for_backward(weights, regions, words, P, a, x, length)
        return x, length, product

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_x, grad_length, grad_product):
        weights, regions, words, P, a, x, length = ctx.saved_tensors
        (n_images, n_words, _), D = weights.shape, P.shape[1]
        grad_weights = torch.empty_like(weights, dtype=a.dtype)
        grad_regions, grad_words, grad_P = (
            torch.zeros_like(y, dtype=a.dtype) for y in (regions, words, P)
        )
        grad_p, grad_a, twice_P = torch.zeros_like(a), torch.zeros_like(a), 2 * P
        along_x = grad_length * inverse_length(length, 0)  # d‖x‖ / dx = x / ‖x‖
        for i, j in chunks(n_images, n_words, D, weights.device):
            grad_a.addmv_(x[i, j].flatten(0, 1).T, grad_product[i, j].flatten())
            grad = torch.addcmul(grad_x[i, j], x[i, j], along_x[i, j].unsqueeze(-1))
            grad = grad.addcmul_(grad_product[i, j].unsqueeze(-1), a).flatten(0, 1)  # (b w, S)
            grad_p += grad.sum(0)
            grad = grad.to(P.dtype)
            difference = _difference(weights[i, j], regions[i], words[j])  # (b, w, D)
            grad_P += grad.T @ difference.square().flatten(0, 1)
            if not any(ctx.needs_input_grad[:3]):  # the encoders are not trained
                continue
            grad_difference = difference.mul_((grad @ twice_P).view_as(difference))
            grad_weights[i, j] = grad_difference @ regions[i].transpose(1, 2)
            grad_regions[i] += weights[i, j].transpose(1, 2) @ grad_difference
            for of_image in grad_difference:
                grad_words[j] -= of_image
        return grad_weights, grad_regions, grad_words, grad_P, grad_p, grad_a, None


def _difference(weights: Tensor, regions: Tensor, words: Tensor) -> Tensor:
    """weights · regions − words: (b, w, R), (b, R, D), (w, D) -> (b, w, D)."""
    return torch.baddbmm(words.expand(len(weights), -1, -1), weights, regions, beta=-1)


class GatedSum(torch.autograd.Function):
    """The sum of gate · x over the words of each caption.

    gates (B, W), x (B, W, S), lengths (C,) -> (B, C, S).
    """

    @staticmethod
    def forward(ctx, gates, x, lengths):
        ctx.save_for_backward(gates, x, lengths)
        (n_images, n_words, S), n_captions = x.shape, len(lengths)
        # embedding_bag computes a weighted sum over consecutive rows, without copying x.
        rows = torch.arange(n_images * n_words, device=x.device)
        start = torch.arange(n_images, device=x.device).unsqueeze(1) * n_words
        offsets = (start + lengths.cumsum(0) - lengths).flatten()  # (B C,) first word of each
        sums = F.embedding_bag(
            rows, x.flatten(0, 1), offsets, mode="sum", per_sample_weights=gates.flatten()
        )
        return sums.view(n_images, n_captions, S)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gates, x, lengths = ctx.saved_tensors
        caption_index = caption_index_of(lengths)
        grad_gates, grad_x = torch.empty_like(gates), torch.empty_like(x)
        for i, j in chunks(*x.shape, x.device):
            of_words = grad[i].index_select(1, caption_index[j])  # (b, w, S)
            grad_gates[i, j] = torch.linalg.vecdot(of_words, x[i, j])
            torch.mul(of_words, gates[i, j].unsqueeze(-1), out=grad_x[i, j])
        return grad_gates, grad_x, None
