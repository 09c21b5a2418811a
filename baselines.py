"""Baselines for LHSC: its similarity with parts removed or changed, SCAN's, and VSE++'s.

Encoders, loss and evaluation are LHSC's. Without graph and word layers (`--graph_layers 0
--text_layers 0`) LHSC itself is SGRAF's SAF.

Shape letters: B images, C captions, R regions, W words of all captions end to end, D joint size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention import (
    GatedSum,
    WordPooling,
    caption_index_of,
    in_chunks,
    l2norm,
    matmul,
    segment_softmax,
    segment_sum,
    unit_weights,
)
from model import (
    LHSC,
    Aligned,
    Alignments,
    EncodedCaptions,
    EncodedImages,
    Similarity,
    SimilarityEncoder,
    attend,
)
from utils import InputError


class LocalSimilarity(SimilarityEncoder):
    """Local alignments only."""

    image_global, caption_global = Similarity.image_global, Similarity.caption_global

    def __init__(self, *sizes: float) -> None:
        super().__init__(*sizes)
        del self.region_pooling, self.word_pooling, self.global_fc

    def alignments(
        self, images: EncodedImages, captions: EncodedCaptions, dtype: torch.dtype | None = None
    ) -> Alignments:
        weights = attend(images, captions, dtype)
        local = self.align(weights, images.region_emb, captions.word_emb, self.local_fc, dtype)
        lengths = captions.lengths
        gates = self.gates(local.logits, caption_index_of(lengths), len(lengths))
        return Alignments(weights, local, None, gates, None)

    def score(
        self, images: EncodedImages, captions: EncodedCaptions, dtype: torch.dtype | None = None
    ) -> Tensor:
        _, local, _, gate, _ = self.alignments(images, captions, dtype)
        return self.score_of(GatedSum.apply(gate * local.inverse, local.x, captions.lengths))


class GlobalSimilarity(SimilarityEncoder):
    """The global alignment only; its gate is e / (e + eps)."""

    def __init__(self, *sizes: float) -> None:
        super().__init__(*sizes)
        del self.local_fc

    def score(
        self, images: EncodedImages, captions: EncodedCaptions, dtype: torch.dtype | None = None
    ) -> Tensor:
        n_captions = len(captions.lengths)
        itself = torch.arange(n_captions, device=captions.lengths.device)
        global_ = self.global_alignment(images.image_global, images, captions, dtype)
        gate = self.gates(global_.logits, itself, n_captions)
        return self.score_of((gate * global_.inverse).unsqueeze(-1) * global_.x)


class AttendedSimilarity(SimilarityEncoder):
    """The global image vector is pooled from the regions that a caption's words attend to.

    So an image has a different vector for each caption. The paper's figure shows this; the
    official code pools the image vector from the regions alone.
    """

    image_global = Similarity.image_global

    def __init__(
        self, embed_size: int, sim_dim: int, num_regions: int = 36, pool_dropout: float = 0.4
    ) -> None:
        super().__init__(embed_size, sim_dim, num_regions, pool_dropout)
        self.region_pooling = AttendedPooling(embed_size, pool_dropout)

    def global_alignment(
        self,
        weights: Tensor,
        images: EncodedImages,
        captions: EncodedCaptions,
        dtype: torch.dtype | None,
    ) -> Aligned:
        regions = images.region_emb
        numel = weights.shape[1] * regions.shape[2]
        pooled = in_chunks(self.region_pooling, numel, (weights, regions), captions.lengths, dtype)
        return self.align(pooled, regions, captions.caption_global, self.global_fc, dtype)


class AttendedPooling(WordPooling):
    """WordPooling of the regions m_l = Σ_r weight_lr v_r that the words attend to.

    h_l = dropout(tanh(W m_l + b)),  k = dropout(tanh(W' mean_l m_l + b'))
    î   = l2norm(Σ_l softmax_l(c · (h_l ∘ k) + c₀) m_l)
    """

    def forward(
        self,
        weights: Tensor,
        region_emb: Tensor,
        lengths: Tensor,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """weights (B, W, R), region_emb (B, R, D), lengths (C,) -> weights of î (B, C, R)."""
        caption_index, n_captions = caption_index_of(lengths), len(lengths)
        mean = segment_sum(weights, caption_index, n_captions, dim=1)
        mean = mean / lengths.view(-1, 1)  # (B, C, R)
        local, global_ = (  # W multiplies the R regions of an image, not the words of all captions
            matmul(part, matmul(region_emb, fc.weight.T, dtype), dtype) + fc.bias
            for part, fc in ((weights, self.local), (mean, self.global_))
        )  # (B, W, D), (B, C, D)
        local, global_ = self.dropout(torch.tanh(local)), self.dropout(torch.tanh(global_))
        logits = self.common(local * global_.index_select(1, caption_index)).squeeze(-1)  # (B, W)
        pooling = segment_softmax(logits, caption_index, n_captions).unsqueeze(-1)
        pooled = segment_sum(pooling * weights, caption_index, n_captions, dim=1)  # (B, C, R)
        return unit_weights(pooled, region_emb)


class SCANSimilarity(Similarity):
    """SCAN, text to image: the mean over words of cos(q_l, m_l)."""

    def __init__(self, *sizes: float) -> None:
        super().__init__()

    def score(
        self, images: EncodedImages, captions: EncodedCaptions, dtype: torch.dtype | None = None
    ) -> Tensor:
        weights = attend(images, captions, dtype)  # (B, W, R), m_l has norm 1
        words, lengths = l2norm(captions.word_emb), captions.lengths
        products = matmul(words, images.region_emb.transpose(1, 2), dtype)  # (B, W, R)
        cosines = (weights * products).sum(-1)  # (B, W) Σ_r weight_lr (q_l · v_r) / ‖q_l‖
        return segment_sum(cosines, caption_index_of(lengths), len(lengths), dim=1) / lengths


class VSESimilarity(Similarity):
    """VSE++'s cosine of an image vector and a caption vector: the mean region, the mean word.

    VSE++ itself uses a CNN's vector of the whole image, and the last state of the GRU.
    """

    def __init__(self, *sizes: float) -> None:
        super().__init__()

    def score(
        self, images: EncodedImages, captions: EncodedCaptions, dtype: torch.dtype | None = None
    ) -> Tensor:
        return images.image_global @ captions.caption_global.T


SIMILARITIES = {
    "lhsc": SimilarityEncoder,
    "local": LocalSimilarity,
    "global": GlobalSimilarity,
    "attended": AttendedSimilarity,
    "scan": SCANSimilarity,
    "vse": VSESimilarity,
}


def build_model(similarity: str = "lhsc", **sizes: object) -> LHSC:
    """LHSC or a baseline, from a name in SIMILARITIES and LHSC's other arguments."""
    return LHSC(similarity=SIMILARITIES[similarity], **sizes)


def with_local_alignments(similarity: Similarity) -> SimilarityEncoder:
    """The same similarity, if it aligns words with regions.

    Raises InputError if it does not.
    """
    if hasattr(similarity, "local_fc"):
        return similarity
    raise InputError("this needs local alignments: a model of --similarity lhsc, local or attended")
