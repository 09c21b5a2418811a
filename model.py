"""LHSC: image encoder, text encoder, similarity encoder, and the loss.

"Learning Hierarchical Semantic Correspondences for Cross-Modal Image-Text Retrieval", ICMR 2022.

Shape letters: B images, C captions, R regions, W words of all captions end to end, L longest
caption, D joint size (embed_size), S similarity size (sim_dim).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from attention import (
    EPS,
    Alignment,
    GatedSum,
    RegionPooling,
    WordPooling,
    WordSelfAttention,
    caption_index_of,
    cross_attention,
    in_chunks,
    init_xavier,
    inverse_length,
    l2norm,
    pad_words,
    segment_sum,
    word_mean,
)
from distributed import all_gather_with_grad, all_reduce_sum
from graph_layers import FusedWeights, RegionGraph

# -- encoders -------------------------------------------------------------------------------------


class ImageEncoder(nn.Module):
    """Region features to region embeddings: FC, then the region graph."""

    def __init__(
        self, img_dim: int, embed_size: int, graph_layers: int = 4, no_imgnorm: bool = False
    ) -> None:
        super().__init__()
        self.fc = nn.Linear(img_dim, embed_size)
        self.graph = RegionGraph(embed_size, graph_layers)
        self.no_imgnorm = no_imgnorm
        init_xavier(self.fc)

    def forward(self, images: Tensor, fused: Sequence[FusedWeights] | None = None) -> Tensor:
        """images (B, R, img_dim) -> region_emb (B, R, D). fused: the graph's fused_weights."""
        region_emb = self.graph(self.fc(images).to(images.dtype), fused)
        return region_emb if self.no_imgnorm else l2norm(region_emb)


class TextEncoder(nn.Module):
    """Word ids to word embeddings: embedding, word self-attention, (Bi-)GRU.

    The self-attention layers mirror the region graph level by level: words, pairs of words, higher
    levels. padding: "masked" (a caption's embedding depends on that caption alone) or "official"
    (pads attend and are attended to, see WordSelfAttention).
    """

    def __init__(
        self,
        vocab_size: int,
        word_dim: int,
        embed_size: int,
        num_layers: int = 1,
        bi_gru: bool = True,
        text_layers: int = 4,
        drop_out: float = 0.0,
        embed_dropout: float = 0.4,
        no_txtnorm: bool = False,
        padding: str = "masked",
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, word_dim)  # <pad> has a row like any other word
        self.dropout = nn.Dropout(embed_dropout)
        self.self_attention = nn.ModuleList(
            WordSelfAttention(word_dim, drop_out) for _ in range(text_layers)
        )
        self.gru = nn.GRU(word_dim, embed_size, num_layers, batch_first=True, bidirectional=bi_gru)
        self.no_txtnorm = no_txtnorm
        self.padding = padding
        nn.init.uniform_(self.embed.weight, -0.1, 0.1)

    def forward(self, captions: Tensor, lengths: Tensor) -> Tensor:
        """captions (C, L) word ids, padded; lengths (C,) -> word_emb (W, D), end to end."""
        mask = torch.arange(captions.shape[1], device=captions.device) < lengths.unsqueeze(1)
        attends = mask if self.padding == "masked" else torch.ones_like(mask)  # (C, L)
        words = self.dropout(self.embed(captions[attends]))  # (W, word_dim), or (C L, word_dim)
        for layer in self.self_attention:
            words = layer(words, attends)
        words = pad_words(words, attends)  # (C, L, word_dim)
        packed = pack_padded_sequence(words, lengths.cpu(), batch_first=True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True)
        word_emb = hidden[mask[:, : hidden.shape[1]]].to(words.dtype)  # (W, D or 2 D)
        if self.gru.bidirectional:
            word_emb = torch.stack(word_emb.chunk(2, dim=-1)).mean(0)  # (W, D)
        return word_emb if self.no_txtnorm else l2norm(word_emb)


# -- similarity -----------------------------------------------------------------------------------


class EncodedImages(NamedTuple):
    region_emb: Tensor  # (B, R, D)
    image_global: Tensor  # (B, D)

    def rows(self, rows: slice) -> EncodedImages:
        return EncodedImages(self.region_emb[rows], self.image_global[rows])


class EncodedCaptions(NamedTuple):
    word_emb: Tensor  # (W, D) words of all captions end to end
    caption_global: Tensor  # (C, D)
    lengths: Tensor  # (C,)

    def rows(self, rows: slice) -> EncodedCaptions:
        ends = self.lengths.cumsum(0)
        first = int(ends[rows.start - 1]) if rows.start else 0
        words = self.word_emb[first : int(ends[rows.stop - 1])]
        return EncodedCaptions(words, self.caption_global[rows], self.lengths[rows])


class Similarity(nn.Module):
    """The base class: one vector per image, one vector per caption, and the scores of all pairs."""

    def image_global(self, region_emb: Tensor) -> Tensor:
        """One vector per image: (B, R, D) -> (B, D); the mean region, unless it is learned."""
        return l2norm(region_emb.mean(1))

    def caption_global(self, word_emb: Tensor, lengths: Tensor) -> Tensor:
        """One vector per caption: (W, D), (C,) -> (C, D); the mean word, unless it is learned."""
        return l2norm(word_mean(word_emb, lengths))

    def forward(
        self,
        region_emb: Tensor,
        word_emb: Tensor,
        lengths: Tensor,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """region_emb (B, R, D), word_emb (W, D), lengths (C,) -> sims (B, C).

        When several processes train, C counts the captions of all of them.
        """
        images = EncodedImages(region_emb, self.image_global(region_emb))
        captions = EncodedCaptions(word_emb, self.caption_global(word_emb, lengths), lengths)
        if self.training:
            captions = EncodedCaptions(*map(all_gather_with_grad, captions))
        return self.score(images, captions, dtype)

    def score(
        self, images: EncodedImages, captions: EncodedCaptions, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The scores of B images with C captions: (B, C).

        dtype: used for the large matrix products; None keeps the inputs' dtype.
        """
        raise NotImplementedError


class CaptionBatchNorm(nn.BatchNorm1d):
    """BatchNorm1d(1) as the official code's loop calls it: once per caption, in caption order.

    The statistics are those of one caption's gates over all images of the batch (of all processes),
    n = B·(words + 1). Pooling them over captions would train a different model. A step moves
    the running buffers C times, in closed form: (1−m)^C old + Σ_i m (1−m)^(C−1−i) statistic_i.
    """

    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, gates: Tensor, caption_index: Tensor, n_captions: int) -> Tensor:
        """gates (B, N), caption_index (N,) the caption of each column -> (B, N)."""
        if not self.training:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            return gates * scale + (self.bias - self.running_mean * scale)
        n = caption_index.bincount(minlength=n_captions)  # (C,)
        n = n * all_reduce_sum(caption_index.new_tensor(len(gates)))
        mean = segment_sum(gates.sum(0), caption_index, n_captions, dim=0)
        mean = all_reduce_sum(mean) / n
        squares = (gates - mean[caption_index]).square().sum(0)
        squares = all_reduce_sum(segment_sum(squares, caption_index, n_captions, dim=0))
        self._move_buffers(mean.detach(), (squares / (n - 1)).detach())
        scale = self.weight * (squares / n + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return gates * scale[caption_index] + shift[caption_index]

    @torch.no_grad()
    def _move_buffers(self, mean: Tensor, unbiased_var: Tensor) -> None:
        keep = 1 - self.momentum
        n_captions = len(mean)
        age = torch.arange(n_captions - 1, -1, -1, device=mean.device, dtype=mean.dtype)
        weight = self.momentum * keep**age  # (C,)
        for buffer, statistic in ((self.running_mean, mean), (self.running_var, unbiased_var)):
            buffer.mul_(keep**n_captions).add_(weight @ statistic)
        self.num_batches_tracked += n_captions


class Aligned(NamedTuple):
    """Alignments s = x / ‖x‖, kept as x and 1 / ‖x‖, which saves a pass over x."""

    x: Tensor  # (B, N, S) P (m − q)² + p, of words (N = W) or of whole captions (N = C)
    inverse: Tensor  # (B, N) 1 / (‖x‖ + eps)
    logits: Tensor  # (B, N) a · s + a₀, the gate before BatchNorm and sigmoid


class Alignments(NamedTuple):
    """All parts of the scores of B images with C captions."""

    weights: Tensor  # (B, W, R) of each word; the weighted sum of regions has norm 1
    local: Aligned  # N = W
    global_: Aligned | None  # N = C; None in a similarity without global alignments
    local_gate: Tensor  # (B, W); together with global_gate, sums to 1 for each caption
    global_gate: Tensor | None  # (B, C)


class SimilarityEncoder(Similarity):
    """Local and global alignments of every image with every caption, gated into one score.

    m_l = l2norm(Σ_r weight_lr v_r)                  what word l attends to (cross_attention)
    s_l = l2norm(P (m_l − q_l)² + p)                 local alignment
    s_0 = l2norm(P' (î − ĉ)² + p')                   global alignment
    e_l = sigmoid(BN₁(a · s_l + a₀)), l = 0, 1, …    gates, divided by their sum over the caption
    score = sigmoid(w · l2norm(Σ_l e_l s_l) + w₀)
    """

    def __init__(
        self, embed_size: int, sim_dim: int, num_regions: int = 36, pool_dropout: float = 0.4
    ) -> None:
        super().__init__()
        self.region_pooling = RegionPooling(embed_size, num_regions, pool_dropout)
        self.word_pooling = WordPooling(embed_size, pool_dropout)
        self.local_fc = nn.Linear(embed_size, sim_dim)  # P, p
        self.global_fc = nn.Linear(embed_size, sim_dim)  # P', p'
        self.gate_fc = nn.Linear(sim_dim, 1)  # a, a₀
        self.gate_bn = CaptionBatchNorm()
        self.score_fc = nn.Linear(sim_dim, 1)  # w, w₀
        init_xavier(self)

    def image_global(self, region_emb: Tensor) -> Tensor:
        return self.region_pooling(region_emb)

    def caption_global(self, word_emb: Tensor, lengths: Tensor) -> Tensor:
        return self.word_pooling(word_emb, lengths)

    def score(
        self, images: EncodedImages, captions: EncodedCaptions, dtype: torch.dtype | None = None
    ) -> Tensor:
        _, local, global_, local_gate, global_gate = self.alignments(images, captions, dtype)
        pooled = GatedSum.apply(local_gate * local.inverse, local.x, captions.lengths)  # (B, C, S)
        pooled = pooled + (global_gate * global_.inverse).unsqueeze(-1) * global_.x
        return self.score_of(pooled)

    def alignments(
        self, images: EncodedImages, captions: EncodedCaptions, dtype: torch.dtype | None = None
    ) -> Alignments:
        """Alignments of B images with C captions, and their gates."""
        caption_index, n_captions = caption_index_of(captions.lengths), len(captions.lengths)
        weights = attend(images, captions, dtype)
        local = self.align(weights, images.region_emb, captions.word_emb, self.local_fc, dtype)
        global_ = self.global_alignment(weights, images, captions, dtype)
        logits = torch.cat([local.logits, global_.logits], dim=1)  # (B, W + C)
        itself = torch.arange(n_captions, device=logits.device)
        gates = self.gates(logits, torch.cat([caption_index, itself]), n_captions)
        local_gate, global_gate = gates.split([len(caption_index), n_captions], dim=1)
        return Alignments(weights, local, global_, local_gate, global_gate)

    def global_alignment(
        self,
        weights: Tensor,
        images: EncodedImages,
        captions: EncodedCaptions,
        dtype: torch.dtype | None,
    ) -> Aligned:
        """î with ĉ. î is the same for all captions, so it acts as one region with weight 1."""
        one = weights.new_ones(1, len(captions.lengths), 1).expand(len(weights), -1, -1)
        regions = images.image_global.unsqueeze(1)  # (B, 1, D)
        return self.align(one, regions, captions.caption_global, self.global_fc, dtype)

    def align(
        self,
        weights: Tensor,
        regions: Tensor,
        words: Tensor,
        fc: nn.Linear,
        dtype: torch.dtype | None,
    ) -> Aligned:
        """weights (B, N, R), regions (B, R, D), words (N, D) -> Aligned."""
        a, a0 = self.gate_fc.weight[0], self.gate_fc.bias
        x, length, product = Alignment.apply(weights, regions, words, fc.weight, fc.bias, a, dtype)
        inverse = inverse_length(length)
        return Aligned(x, inverse, product * inverse + a0)

    def gates(self, logits: Tensor, caption_index: Tensor, n_captions: int) -> Tensor:
        """e_l divided by their sum: logits (B, N), their captions (N,) -> gates (B, N)."""
        gates = self.gate_bn(logits, caption_index, n_captions).sigmoid()
        sums = segment_sum(gates, caption_index, n_captions, dim=1) + EPS  # (B, C)
        return gates / sums.index_select(1, caption_index)

    def score_of(self, pooled: Tensor) -> Tensor:
        """Σ_l e_l s_l (B, C, S) -> scores (B, C) in (0, 1)."""
        return torch.sigmoid(self.score_fc(l2norm(pooled)).squeeze(-1))


def attend(
    images: EncodedImages, captions: EncodedCaptions, dtype: torch.dtype | None = None
) -> Tensor:
    """cross_attention of all words over the regions of all images: weights (B, W, R)."""
    words, lengths = captions.word_emb, captions.lengths
    numel = len(words) * images.region_emb.shape[1]
    others = words, caption_index_of(lengths), len(lengths), dtype
    return in_chunks(cross_attention, numel, (images.region_emb,), *others)


# -- the whole model ------------------------------------------------------------------------------


class LHSC(nn.Module):
    """The whole model. Its arguments have the names of train.py's options.

    similarity: the class that computes the scores; baselines.py has the other ones.
    """

    def __init__(
        self,
        vocab_size: int,
        img_dim: int = 2048,
        num_regions: int = 36,
        embed_size: int = 1024,
        word_dim: int = 300,
        sim_dim: int = 256,
        num_layers: int = 1,
        bi_gru: bool = True,
        graph_layers: int = 4,
        text_layers: int = 4,
        drop_out: float = 0.0,
        embed_dropout: float = 0.4,
        pool_dropout: float = 0.4,
        no_imgnorm: bool = False,
        no_txtnorm: bool = False,
        padding: str = "masked",
        similarity: type[Similarity] = SimilarityEncoder,
    ) -> None:
        super().__init__()
        self.num_regions = num_regions
        self.image_encoder = ImageEncoder(img_dim, embed_size, graph_layers, no_imgnorm)
        self.text_encoder = TextEncoder(
            vocab_size, word_dim, embed_size, num_layers, bi_gru, text_layers,
            drop_out, embed_dropout, no_txtnorm, padding,
        )  # fmt: skip
        self.similarity = similarity(embed_size, sim_dim, num_regions, pool_dropout)

    def forward(
        self,
        images: Tensor,
        captions: Tensor,
        lengths: Tensor,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """images (B, R, img_dim), captions (C, L), lengths (C,) -> sims (B, C).

        dtype: used for the large matrix products (torch.bfloat16 in mixed precision); None keeps
        the weights' dtype. The encoders run under autocast; the similarity casts the factors of its
        products. Weights, sums and scores keep their dtype.
        """
        with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
            region_emb = self.image_encoder(images)
            word_emb = self.text_encoder(captions, lengths)
        return self.similarity(region_emb, word_emb, lengths, dtype)


# -- losses on sims (B, B), where image i belongs to caption i ------------------------------------


def triplet_loss(sims: Tensor, margin: float = 0.2, max_violation: bool = True) -> Tensor:
    """Hinge loss (VSE++), summed over the batch.

    For each image the negatives are the other captions (its row), for each caption the other images
    (its column). With `max_violation` only the hardest of each counts. Captions of the same image
    in a batch count as negatives too, as in the official code.
    """
    positive = sims.diagonal()
    matched = torch.eye(len(sims), dtype=torch.bool, device=sims.device)
    i2t = (margin + sims - positive.unsqueeze(1)).clamp_min(0).masked_fill(matched, 0)
    t2i = (margin + sims - positive.unsqueeze(0)).clamp_min(0).masked_fill(matched, 0)
    if max_violation:
        return i2t.max(dim=1).values.sum() + t2i.max(dim=0).values.sum()
    return i2t.sum() + t2i.sum()


def contrastive_loss(sims: Tensor, image_index: Tensor, temperature: float = 0.03) -> Tensor:
    """InfoNCE (as in CLIP): cross-entropy over each row and each column, summed over the batch.

    image_index (B,): the image of each row. Other captions of the same image are left out.
    """
    itself = torch.arange(len(sims), device=sims.device)
    same_image = image_index.unsqueeze(1) == image_index
    others = same_image & (itself.unsqueeze(1) != itself)
    logits = (sims / temperature).masked_fill(others, -torch.inf)
    i2t = F.cross_entropy(logits, itself, reduction="sum")
    return i2t + F.cross_entropy(logits.T, itself, reduction="sum")
