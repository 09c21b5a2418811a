"""LHSC: image encoder, text encoder, similarity of every image with every caption, loss.

"Learning Hierarchical Semantic Correspondences for Cross-Modal Image-Text Retrieval", ICMR 2022.

Shape letters: B images, C captions, R regions, W words of all captions end to end, L longest
caption, D joint size (embed_size), S similarity size (sim_dim).
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from alignment import Alignment, GatedSum, images_a_block
from attention import (
    EPS,
    RegionPooling,
    WordPooling,
    WordSelfAttention,
    cross_attention,
    init_xavier,
    inverse_length,
    l2norm,
    owner_of,
    safe_sqrt,
    segment_sum,
)
from distributed import gather, total
from graph_layers import RegionGraph


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

    def forward(self, images: Tensor) -> Tensor:
        """images (B, R, img_dim) -> region_emb (B, R, D)."""
        region_emb = self.graph(self.fc(images))
        return region_emb if self.no_imgnorm else l2norm(region_emb)

    def folded(self) -> ImageEncoder:
        """The same encoder for inference, its graph layers multiplied out."""
        encoder = copy.copy(self)
        encoder._modules = self._modules | {"graph": self.graph.folded()}
        return encoder


class TextEncoder(nn.Module):
    """Word ids to word embeddings: embedding, word self-attention, (Bi-)GRU.

    The self-attention layers mirror the region graph level by level: words, phrases (pairs of
    words), and higher. `padding` is "masked" (default: a caption's embedding depends on that
    caption alone) or "released" (pads attend and are attended to, see WordSelfAttention).
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
        words = self.dropout(self.embed(captions))  # (C, L, word_dim)
        for layer in self.self_attention:
            words = layer(words, mask if self.padding == "masked" else None)
        packed = pack_padded_sequence(words, lengths.cpu(), batch_first=True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True)
        word_emb = hidden[mask[:, : hidden.shape[1]]]  # (W, D or 2 D)
        if self.gru.bidirectional:
            word_emb = torch.stack(word_emb.chunk(2, dim=-1)).mean(0)
        return word_emb if self.no_txtnorm else l2norm(word_emb)


class CaptionBatchNorm(nn.BatchNorm1d):
    """BatchNorm1d(1) as the released loop calls it: once per caption, in caption order.

    The statistics are those of one caption's gates over all images of the batch (of all processes),
    n = B·(L+1) numbers; pooling them over captions would train another model. A step moves the
    running buffers C times, which has a closed form: (1−m)^C old + Σ_i m (1−m)^(C−1−i) statistic_i.
    """

    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, local: Tensor, globl: Tensor, lengths: Tensor, owner: Tensor):
        """local (B, W), globl (B, C), lengths (C,), owner (W,) -> the same two, normalised."""
        if self.training:
            n = total(lengths.new_tensor(len(local))) * (lengths + 1)  # (C,)
            n_captions = len(lengths)
            gates = segment_sum(local.sum(0), owner, n_captions, dim=0) + globl.sum(0)
            mean = total(gates) / n
            squares = (local - mean[owner]).square().sum(0)
            squares = segment_sum(squares, owner, n_captions, 0) + (globl - mean).square().sum(0)
            squares = total(squares)
            var = squares / n
            self._move_buffers(mean.detach(), (squares / (n - 1)).detach())
            scale = self.weight * (var + self.eps).rsqrt()
            shift = self.bias - mean * scale
            return local * scale[owner] + shift[owner], globl * scale + shift
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return local * scale + shift, globl * scale + shift

    @torch.no_grad()
    def _move_buffers(self, mean: Tensor, unbiased_var: Tensor) -> None:
        keep = 1 - self.momentum
        n_captions = len(mean)
        age = torch.arange(n_captions - 1, -1, -1, device=mean.device, dtype=mean.dtype)
        weight = self.momentum * keep**age  # (C,)
        for buffer, statistic in ((self.running_mean, mean), (self.running_var, unbiased_var)):
            buffer.mul_(keep**n_captions).add_(weight @ statistic)
        self.num_batches_tracked += n_captions


class Alignments(NamedTuple):
    """Of every image with every caption's words, and with the caption as a whole."""

    weights: Tensor  # (B, W, R) of the regions a word attends to; their sum has length 1
    local: Tensor  # (B, W, S)
    globl: Tensor  # (B, C, S)
    local_gate: Tensor  # (B, W); with globl_gate they sum to 1 over a caption
    globl_gate: Tensor  # (B, C)


class SimilarityEncoder(nn.Module):
    """Local and global alignments of every image with every caption, gated into one score."""

    def __init__(
        self, embed_size: int, sim_dim: int, num_regions: int = 36, pool_dropout: float = 0.4
    ) -> None:
        super().__init__()
        self.region_pooling = RegionPooling(embed_size, num_regions, pool_dropout)
        self.word_pooling = WordPooling(embed_size, pool_dropout)
        self.local_fc = nn.Linear(embed_size, sim_dim)  # P, p
        self.globl_fc = nn.Linear(embed_size, sim_dim)  # P', p'
        self.gate_fc = nn.Linear(sim_dim, 1)  # a, a₀
        self.gate_bn = CaptionBatchNorm()
        self.score_fc = nn.Linear(sim_dim, 1)  # w, w₀
        init_xavier(self)

    def forward(self, region_emb: Tensor, word_emb: Tensor, lengths: Tensor) -> Tensor:
        """region_emb (B, R, D), word_emb (W, D), lengths (C,) -> sims (B, C).

        In a training of several processes C are the captions of all of them.
        """
        image_global = self.region_pooling(region_emb)  # (B, D)
        caption_global = self.word_pooling(word_emb, lengths)  # (C, D)
        if self.training:
            word_emb, caption_global = gather(word_emb), gather(caption_global)
            lengths = gather(lengths)
        return self.score(region_emb, image_global, word_emb, caption_global, lengths)

    def score(
        self,
        region_emb: Tensor,
        image_global: Tensor,
        word_emb: Tensor,
        caption_global: Tensor,
        lengths: Tensor,
    ) -> Tensor:
        """(B, R, D), (B, D), (W, D), (C, D), lengths (C,) -> sims (B, C) in (0, 1)."""
        aligned = self.alignments(region_emb, image_global, word_emb, caption_global, lengths)
        pooled = GatedSum.apply(aligned.local_gate, aligned.local, owner_of(lengths), len(lengths))
        sim = l2norm(pooled + aligned.globl_gate.unsqueeze(-1) * aligned.globl)  # (B, C, S)
        return torch.sigmoid(self.score_fc(sim).squeeze(-1))

    def alignments(
        self,
        region_emb: Tensor,
        image_global: Tensor,
        word_emb: Tensor,
        caption_global: Tensor,
        lengths: Tensor,
    ) -> Alignments:
        """All that a score is made of: (B, R, D), (B, D), (W, D), (C, D), lengths (C,)."""
        owner, n_captions = owner_of(lengths), len(lengths)
        weights = self.attention_weights(region_emb, word_emb, owner, n_captions)  # (B, W, R)
        local, local_logits = self.align(weights, region_emb, word_emb, self.local_fc)
        # î − ĉ is one more difference: the image's only region, attended to with weight 1.
        one, image_global = image_global.new_ones(1, n_captions, 1), image_global.unsqueeze(1)
        one = one.expand(len(image_global), -1, -1)
        globl, globl_logits = self.align(one, image_global, caption_global, self.globl_fc)
        local_gate, globl_gate = self.gates(local_logits, globl_logits, lengths, owner)
        return Alignments(weights, local, globl, local_gate, globl_gate)

    def attention_weights(
        self, region_emb: Tensor, word_emb: Tensor, owner: Tensor, n_captions: int
    ) -> Tensor:
        """Weights whose m_l = Σ_r weight_lr v_r has length 1, computed again in the backward pass.

        region_emb (B, R, D), word_emb (W, D) -> (B, W, R).
        """
        size = images_a_block(len(word_emb) * region_emb.shape[1], word_emb.device.type)
        weights = [
            checkpoint(
                unit_attention, some, word_emb, owner, n_captions,
                use_reentrant=False, preserve_rng_state=False,
            )
            for some in region_emb.split(size)
        ]  # fmt: skip
        return torch.cat(weights)

    def align(
        self, weights: Tensor, regions: Tensor, words: Tensor, fc: nn.Linear
    ) -> tuple[Tensor, Tensor]:
        """s_l = l2norm(P (m_l − q_l)² + p) with m_l = Σ_r weight_lr v_r, and a · s_l + a₀.

        weights (B, W, R), regions (B, R, D), words (W, D) -> (B, W, S), (B, W).
        """
        a, a0 = self.gate_fc.weight[0], self.gate_fc.bias
        return Alignment.apply(weights, regions, words, fc.weight, fc.bias, a, a0, EPS)

    def gates(self, local: Tensor, globl: Tensor, lengths: Tensor, owner: Tensor):
        """e_l = sigmoid(BN(a · s_l + a₀)), l = 0…L, divided by their sum over the caption.

        The logits a · s_l + a₀, local (B, W) and globl (B, C) -> gates (B, W) and (B, C).
        """
        local_gate, globl_gate = self.gate_bn(local, globl, lengths, owner)
        local_gate, globl_gate = local_gate.sigmoid(), globl_gate.sigmoid()
        total = segment_sum(local_gate, owner, len(lengths), dim=1) + globl_gate + EPS  # (B, C)
        return local_gate / total.index_select(1, owner), globl_gate / total


def unit_attention(region_emb: Tensor, word_emb: Tensor, owner: Tensor, n_captions: int) -> Tensor:
    """cross_attention, divided by the length of what it attends to.

    ‖Σ_r w_r v_r‖² = wᵀ (V Vᵀ) w: the R weights are scaled instead of the D-wide sum.
    """
    weights = cross_attention(region_emb, word_emb, owner, n_captions)  # (B, W, R)
    gram = region_emb @ region_emb.transpose(1, 2)  # (B, R, R)
    squared = ((weights @ gram) * weights).sum(-1, keepdim=True)  # (B, W, 1)
    return weights * inverse_length(safe_sqrt(squared.clamp_min(0)))


class LHSC(nn.Module):
    """The whole model; the arguments carry the names of train.py's options.

    Raises:
        ValueError: for an unknown `padding`.
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
    ) -> None:
        super().__init__()
        if padding not in ("masked", "released"):
            raise ValueError(f"padding must be 'masked' or 'released', not {padding!r}")
        self.image_encoder = ImageEncoder(img_dim, embed_size, graph_layers, no_imgnorm)
        self.text_encoder = TextEncoder(
            vocab_size, word_dim, embed_size, num_layers, bi_gru, text_layers,
            drop_out, embed_dropout, no_txtnorm, padding,
        )  # fmt: skip
        self.similarity = SimilarityEncoder(embed_size, sim_dim, num_regions, pool_dropout)

    def forward(self, images: Tensor, captions: Tensor, lengths: Tensor) -> Tensor:
        """images (B, R, img_dim), captions (C, L), lengths (C,) -> sims (B, C)."""
        region_emb = self.image_encoder(images)
        word_emb = self.text_encoder(captions, lengths)
        return self.similarity(region_emb, word_emb, lengths)


def triplet_loss(sims: Tensor, margin: float = 0.2, max_violation: bool = True) -> Tensor:
    """Hinge loss of a batch in which image i belongs to caption i (VSE++), summed.

    sims (B, B) -> scalar. For each image the negatives are the other captions (its row), for each
    caption the other images (its column); with `max_violation` only the hardest of each counts.
    Two captions of one image in a batch are negatives of each other, as in the released code.
    """
    positive = sims.diagonal()
    matched = torch.eye(len(sims), dtype=torch.bool, device=sims.device)
    i2t = (margin + sims - positive.unsqueeze(1)).clamp_min(0).masked_fill(matched, 0)
    t2i = (margin + sims - positive.unsqueeze(0)).clamp_min(0).masked_fill(matched, 0)
    if max_violation:
        return i2t.max(dim=1).values.sum() + t2i.max(dim=0).values.sum()
    return i2t.sum() + t2i.sum()
