"""The attentions of LHSC: words over words, pooling over one side, words over regions.

Captions of a batch stand end to end, packed: `word_emb` is (W, D), `lengths` (C,) counts the words
of each caption and `owner` (W,) names the caption of each word. Nothing is padded, so nothing has
to be masked, and all captions are handled at once.

Shape letters: B images, C captions, R regions, W words of all captions end to end, L longest
caption, D joint size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distributed import BatchNorm1d

EPS = 1e-8
SHARPNESS = 9.0  # of the softmax over regions


def l2norm(x: Tensor, dim: int = -1, eps: float = EPS) -> Tensor:
    """x / (‖x‖ + eps) along `dim`; any shape, same shape out.

    eps is added to the length, as in the released code (`F.normalize` clamps instead). An
    all-zero vector stays zero and gets a zero gradient, where the square root would give NaN.
    """
    return x * inverse_length(torch.linalg.vector_norm(x, dim=dim, keepdim=True), eps)


def inverse_length(length: Tensor, eps: float = EPS) -> Tensor:
    """1 / (length + eps), and 0 where the length is 0, so that no gradient passes there."""
    return (length + eps).reciprocal().masked_fill(length == 0, 0)


def init_xavier(module: nn.Module) -> None:
    """Every linear layer inside `module`: uniform ±sqrt(6 / (in + out)), bias 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


# -- sums over the words of each caption ----------------------------------------------------------


def owner_of(lengths: Tensor) -> Tensor:
    """The caption of each word: lengths (C,) -> owner (W,)."""
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)


def segment_sum(x: Tensor, owner: Tensor, n_captions: int, dim: int) -> Tensor:
    """Sum over the words of each caption: `dim` of x shrinks from W to C."""
    shape = list(x.shape)
    shape[dim] = n_captions
    return x.new_zeros(shape).index_add_(dim, owner, x)


def segment_softmax(logits: Tensor, owner: Tensor, n_captions: int) -> Tensor:
    """Softmax over the words of each caption: (…, W) -> (…, W)."""
    peak = logits.new_full((*logits.shape[:-1], n_captions), -torch.inf)
    peak = peak.scatter_reduce(-1, owner.expand_as(logits), logits.detach(), "amax")
    exp = (logits - peak.index_select(-1, owner)).exp()
    return exp / segment_sum(exp, owner, n_captions, dim=-1).index_select(-1, owner)


def word_mean(word_emb: Tensor, lengths: Tensor) -> Tensor:
    """The mean word of each caption: word_emb (W, D), lengths (C,) -> (C, D)."""
    owner, n_captions = owner_of(lengths), len(lengths)
    return segment_sum(word_emb, owner, n_captions, dim=0) / lengths.unsqueeze(1)


# -- words over words -----------------------------------------------------------------------------


class WordSelfAttention(nn.Module):
    """One level of word relations: x ← x + (l gᵀ / n) u, an affinity without softmax.

    l, g, u = dropout(tanh(linear(x))). With a mask, only the caption's own words are attended to
    and n is its own length; without one (the released code), `<pad>` words take part and n is the
    longest caption of the batch, so a caption's embedding depends on its neighbours.
    """

    def __init__(self, word_dim: int, drop_out: float = 0.0) -> None:
        super().__init__()
        self.local = nn.Linear(word_dim, word_dim)
        self.globl = nn.Linear(word_dim, word_dim)
        self.value = nn.Linear(word_dim, word_dim)
        self.dropout = nn.Dropout(drop_out)
        init_xavier(self)

    def forward(self, words: Tensor, mask: Tensor | None) -> Tensor:
        """words (C, L, word_dim), mask (C, L) True on words or None -> (C, L, word_dim)."""
        local = self.dropout(torch.tanh(self.local(words)))
        globl = self.dropout(torch.tanh(self.globl(words)))
        value = self.dropout(torch.tanh(self.value(words)))
        affinity = local @ globl.transpose(1, 2)  # (C, L, L)
        if mask is None:
            affinity = affinity / words.shape[1]
        else:
            mask = mask.to(words.dtype)
            affinity = affinity * (mask / mask.sum(1, keepdim=True)).unsqueeze(1)
        return words + affinity @ value


# -- pooling over one side ------------------------------------------------------------------------


class RegionPooling(nn.Module):
    """The global image vector: regions weighed by how they agree with their mean.

    h_r = dropout(tanh(BN_R(W v_r)))         BN over the region's position, R channels
    k   = dropout(tanh(BN_D(W' mean_r v_r)))
    î   = l2norm(Σ_r softmax_r(c · (h_r ∘ k) + c₀) v_r)
    """

    def __init__(self, embed_size: int, num_regions: int, dropout: float) -> None:
        super().__init__()
        self.local = nn.Linear(embed_size, embed_size)
        self.local_bn = BatchNorm1d(num_regions)
        self.globl = nn.Linear(embed_size, embed_size)
        self.globl_bn = BatchNorm1d(embed_size)
        self.common = nn.Linear(embed_size, 1)
        self.dropout = nn.Dropout(dropout)
        init_xavier(self)

    def weights(self, region_emb: Tensor) -> Tensor:
        """region_emb (B, R, D) -> weights (B, R), each row sums to 1."""
        local = self.dropout(torch.tanh(self.local_bn(self.local(region_emb))))
        globl = self.dropout(torch.tanh(self.globl_bn(self.globl(region_emb.mean(1)))))
        return self.common(local * globl.unsqueeze(1)).squeeze(-1).softmax(dim=1)

    def forward(self, region_emb: Tensor) -> Tensor:
        """region_emb (B, R, D) -> image_global (B, D)."""
        weights = self.weights(region_emb).unsqueeze(1)  # (B, 1, R)
        return l2norm((weights @ region_emb).squeeze(1))


class WordPooling(nn.Module):
    """The global caption vector: as RegionPooling, over a caption's words, without BatchNorm."""

    def __init__(self, embed_size: int, dropout: float) -> None:
        super().__init__()
        self.local = nn.Linear(embed_size, embed_size)
        self.globl = nn.Linear(embed_size, embed_size)
        self.common = nn.Linear(embed_size, 1)
        self.dropout = nn.Dropout(dropout)
        init_xavier(self)

    def weights(self, word_emb: Tensor, lengths: Tensor) -> Tensor:
        """word_emb (W, D), lengths (C,) -> weights (W,), those of a caption sum to 1."""
        owner, n_captions = owner_of(lengths), len(lengths)
        local = self.dropout(torch.tanh(self.local(word_emb)))
        globl = self.dropout(torch.tanh(self.globl(word_mean(word_emb, lengths))))
        logits = self.common(local * globl.index_select(0, owner)).squeeze(-1)
        return segment_softmax(logits, owner, n_captions)

    def forward(self, word_emb: Tensor, lengths: Tensor) -> Tensor:
        """word_emb (W, D), lengths (C,) -> caption_global (C, D)."""
        weighted = self.weights(word_emb, lengths).unsqueeze(1) * word_emb
        return l2norm(segment_sum(weighted, owner_of(lengths), len(lengths), dim=0))


class AttendedPooling(nn.Module):
    """The global image vector as a caption sees it (the paper's figure).

    As WordPooling, of the regions m_l that the caption's words attend to:

    h_l = dropout(tanh(W m_l + b)),  k = dropout(tanh(W' mean_l m_l + b'))
    î   = l2norm(Σ_l softmax_l(c · (h_l ∘ k) + c₀) m_l)

    With m_l = Σ_r weight_lr v_r, W and W' meet the R regions of an image, not the words of all
    captions. Time for an image: W R D + W D, and D² R once; memory: W D.
    """

    def __init__(self, embed_size: int, dropout: float) -> None:
        super().__init__()
        self.local = nn.Linear(embed_size, embed_size)
        self.globl = nn.Linear(embed_size, embed_size)
        self.common = nn.Linear(embed_size, 1)
        self.dropout = nn.Dropout(dropout)
        init_xavier(self)

    def forward(
        self,
        weights: Tensor,
        region_emb: Tensor,
        lengths: Tensor,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """weights (B, W, R), region_emb (B, R, D), lengths (C,) -> (B, C, R).

        The sum of the regions by these weights is î, of length 1. dtype: as cross_attention's.
        """
        owner, n_captions = owner_of(lengths), len(lengths)
        mean = segment_sum(weights, owner, n_captions, dim=1) / lengths.view(-1, 1)  # (B, C, R)
        local, globl = (
            product(part, product(region_emb, fc.weight.T, dtype), dtype) + fc.bias
            for part, fc in ((weights, self.local), (mean, self.globl))
        )  # (B, W, D), (B, C, D)
        local, globl = self.dropout(torch.tanh(local)), self.dropout(torch.tanh(globl))
        logits = self.common(local * globl.index_select(1, owner)).squeeze(-1)  # (B, W)
        pooling = segment_softmax(logits, owner, n_captions).unsqueeze(-1)
        pooled = segment_sum(pooling * weights, owner, n_captions, dim=1)  # (B, C, R)
        return unit_weights(pooled, region_emb)


# -- words over regions ---------------------------------------------------------------------------


def cross_attention(
    region_emb: Tensor,
    word_emb: Tensor,
    owner: Tensor,
    n_captions: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Word-guided attention over the regions of each image.

    A = leaky_relu₀.₁(q v), each region's column divided by its length over the words of the
    caption, softmax over regions of SHARPNESS · A.

    region_emb (B, R, D), word_emb (W, D), owner (W,) -> weights (B, W, R), rows sum to 1.
    dtype: of the large matrix products, None for the inputs'.
    """
    n_images, n_regions, _ = region_emb.shape
    affinity = product(word_emb, region_emb.flatten(0, 1).T, dtype)  # (W, B R): one product
    affinity = F.leaky_relu(affinity, 0.1)
    affinity = affinity.view(-1, n_images, n_regions)  # (W, B, R)
    squared = segment_sum(affinity.square(), owner, n_captions, dim=0)  # (C, B, R)
    scale = SHARPNESS * inverse_length(safe_sqrt(squared))
    weights = (affinity * scale.index_select(0, owner)).softmax(dim=-1)
    return weights.transpose(0, 1).contiguous()  # (B, W, R)


def product(x: Tensor, y: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x @ y, multiplied in `dtype` if there is one; the result is of x's."""
    return (x.to(dtype or x.dtype) @ y.to(dtype or y.dtype)).to(x.dtype)


def unit_weights(weights: Tensor, region_emb: Tensor) -> Tensor:
    """Weights, scaled so that the sums of regions that they make have length 1.

    ‖Σ_r w_r v_r‖² = wᵀ (V Vᵀ) w: the R weights are scaled instead of the D-wide sum.
    weights (B, W, R), region_emb (B, R, D) -> (B, W, R).
    """
    gram = region_emb @ region_emb.transpose(1, 2)  # (B, R, R)
    squared = ((weights @ gram) * weights).sum(-1, keepdim=True)  # (B, W, 1)
    return weights * inverse_length(safe_sqrt(squared.clamp_min(0)))


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root of x ≥ 0 whose gradient at 0 is 0 instead of infinite."""
    zero = x == 0
    return x.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)
