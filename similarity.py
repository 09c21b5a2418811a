"""How well every image fits every caption: LHSC's similarity, and those it is compared with.

    lhsc    local and global alignments, gated (SimilarityEncoder)
    scan    words against the regions they attend to: SCAN, text to image, average (AttendedCosine)
    vse     mean region against mean word: VSE++ (MeanCosine)

Each takes what the encoders make, and has the same three parts: a vector for the image, one for
the caption, and scores of all pairs.

Shape letters: B images, C captions, R regions, W words of all captions end to end, D joint size
(embed_size), S similarity size (sim_dim).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alignment import Alignment, GatedSum, images_a_block
from attention import (
    EPS,
    AttendedPooling,
    RegionPooling,
    WordPooling,
    cross_attention,
    init_xavier,
    l2norm,
    owner_of,
    product,
    segment_sum,
    unit_weights,
    word_mean,
)
from distributed import gather, total
from errors import InputError


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
    """What all of them share; `score` is each one's own.

    mixed: whether a training multiplies large matrices in bfloat16.
    """

    mixed = False

    @property
    def product_dtype(self) -> torch.dtype | None:
        """Of the large matrix products; None for that of the embeddings, as in evaluation."""
        return torch.bfloat16 if self.mixed and self.training else None

    def image_global(self, region_emb: Tensor) -> Tensor:
        """One vector an image: (B, R, D) -> (B, D); the mean region, unless it is learned."""
        return l2norm(region_emb.mean(1))

    def caption_global(self, word_emb: Tensor, lengths: Tensor) -> Tensor:
        """One vector a caption: (W, D), (C,) -> (C, D); the mean word, unless it is learned."""
        return l2norm(word_mean(word_emb, lengths))

    def forward(self, region_emb: Tensor, word_emb: Tensor, lengths: Tensor) -> Tensor:
        """region_emb (B, R, D), word_emb (W, D), lengths (C,) -> sims (B, C).

        In a training of several processes C are the captions of all of them.
        """
        images = EncodedImages(region_emb, self.image_global(region_emb))
        captions = EncodedCaptions(word_emb, self.caption_global(word_emb, lengths), lengths)
        if self.training:
            captions = EncodedCaptions(*map(gather, captions))
        return self.score(images, captions)

    def score(self, images: EncodedImages, captions: EncodedCaptions) -> Tensor:
        """The scores of B images with C captions: (B, C)."""
        raise NotImplementedError


# -- LHSC -----------------------------------------------------------------------------------------


class CaptionBatchNorm(nn.BatchNorm1d):
    """BatchNorm1d(1) as the released loop calls it: once per caption, in caption order.

    The statistics are those of one caption's gates over all images of the batch (of all processes),
    n = B·(L+1) numbers; pooling them over captions would train another model. A step moves the
    running buffers C times, which has a closed form: (1−m)^C old + Σ_i m (1−m)^(C−1−i) statistic_i.
    """

    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, gates: Tensor, owner: Tensor, n_captions: int) -> Tensor:
        """gates (B, N), and the caption of each, owner (N,) -> (B, N)."""
        if not self.training:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            return gates * scale + (self.bias - self.running_mean * scale)
        n = total(owner.new_tensor(len(gates))) * owner.bincount(minlength=n_captions)  # (C,)
        mean = total(segment_sum(gates.sum(0), owner, n_captions, dim=0)) / n
        squares = (gates - mean[owner]).square().sum(0)
        squares = total(segment_sum(squares, owner, n_captions, dim=0))
        self._move_buffers(mean.detach(), (squares / (n - 1)).detach())
        scale = self.weight * (squares / n + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return gates * scale[owner] + shift[owner]

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
    """Of every image with every caption's words, and with the caption as a whole.

    A model without local, or without global, alignments has None in their place.
    """

    weights: Tensor | None  # (B, W, R) of the regions a word attends to; their sum has length 1
    local: Tensor | None  # (B, W, S)
    globl: Tensor | None  # (B, C, S)
    local_gate: Tensor | None  # (B, W); with globl_gate they sum to 1 over a caption
    globl_gate: Tensor | None  # (B, C)


class SimilarityEncoder(Similarity):
    """Local and global alignments of every image with every caption, gated into one score.

    alignment: "both", or only "local" or "global" ones.
    global_image: "regions", the global image vector is pooled from the regions alone (released
        code); "attended", from the regions that a caption's words attend to (the paper's figure),
        so that each caption has an image vector of its own.
    """

    def __init__(
        self,
        embed_size: int,
        sim_dim: int,
        num_regions: int = 36,
        pool_dropout: float = 0.4,
        global_image: str = "regions",
        alignment: str = "both",
    ) -> None:
        super().__init__()
        self.region_pooling = self.attended_pooling = self.word_pooling = None
        self.local_fc = self.globl_fc = None
        if alignment != "local":
            if global_image == "regions":
                self.region_pooling = RegionPooling(embed_size, num_regions, pool_dropout)
            else:
                self.attended_pooling = AttendedPooling(embed_size, pool_dropout)
            self.word_pooling = WordPooling(embed_size, pool_dropout)
        if alignment != "global":
            self.local_fc = nn.Linear(embed_size, sim_dim)  # P, p
        if alignment != "local":
            self.globl_fc = nn.Linear(embed_size, sim_dim)  # P', p'
        self.gate_fc = nn.Linear(sim_dim, 1)  # a, a₀
        self.gate_bn = CaptionBatchNorm()
        self.score_fc = nn.Linear(sim_dim, 1)  # w, w₀
        init_xavier(self)

    def image_global(self, region_emb: Tensor) -> Tensor:
        if self.region_pooling is None:
            return super().image_global(region_emb)
        return self.region_pooling(region_emb)

    def caption_global(self, word_emb: Tensor, lengths: Tensor) -> Tensor:
        if self.word_pooling is None:
            return super().caption_global(word_emb, lengths)
        return self.word_pooling(word_emb, lengths)

    def score(self, images: EncodedImages, captions: EncodedCaptions) -> Tensor:
        """The scores of B images with C captions: (B, C) in (0, 1)."""
        aligned, sim = self.alignments(images, captions), 0
        if aligned.local is not None:
            gate, owner = aligned.local_gate, owner_of(captions.lengths)
            sim = GatedSum.apply(gate, aligned.local, owner, len(captions.lengths))
        if aligned.globl is not None:
            sim = sim + aligned.globl_gate.unsqueeze(-1) * aligned.globl
        return torch.sigmoid(self.score_fc(l2norm(sim)).squeeze(-1))  # l2norm of (B, C, S)

    def alignments(self, images: EncodedImages, captions: EncodedCaptions) -> Alignments:
        """All that a score is made of."""
        region_emb, image_global = images
        word_emb, caption_global, lengths = captions
        owner, n_captions = owner_of(lengths), len(lengths)
        weights = local = globl = None
        logits, owners = [], []
        if self.local_fc is not None or self.attended_pooling is not None:
            weights = self.attention_weights(region_emb, word_emb, owner, n_captions)  # (B, W, R)
        if self.local_fc is not None:
            local, local_logits = self.align(weights, region_emb, word_emb, self.local_fc)
            logits, owners = [local_logits], [owner]
        if self.globl_fc is not None:
            attended = self.global_regions(weights, region_emb, image_global, lengths)
            globl, globl_logits = self.align(*attended, caption_global, self.globl_fc)
            itself = torch.arange(n_captions, device=owner.device)
            logits, owners = [*logits, globl_logits], [*owners, itself]
        gates = list(self.gates(logits, owners, n_captions))
        local_gate = gates.pop(0) if local is not None else None
        return Alignments(weights, local, globl, local_gate, gates.pop() if gates else None)

    def attention_weights(
        self, region_emb: Tensor, word_emb: Tensor, owner: Tensor, n_captions: int
    ) -> Tensor:
        """Weights whose m_l = Σ_r weight_lr v_r has length 1, computed again in the backward pass.

        region_emb (B, R, D), word_emb (W, D) -> (B, W, R).
        """
        numbers = len(word_emb) * region_emb.shape[1]
        return by_images(
            unit_attention, numbers, (region_emb,), word_emb, owner, n_captions, self.product_dtype
        )

    def global_regions(
        self, weights: Tensor | None, region_emb: Tensor, image_global: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """î as a sum of regions, Σ_r weight_r v_r: the weights (B, C, R) and the regions (B, R, D).

        An image_global that no caption changes is the image's only region, with weight 1.
        """
        if self.attended_pooling is None:
            one = image_global.new_ones(1, len(lengths), 1).expand(len(image_global), -1, -1)
            return one, image_global.unsqueeze(1)
        numbers = weights.shape[1] * region_emb.shape[2]
        pooled = by_images(
            self.attended_pooling, numbers, (weights, region_emb), lengths, self.product_dtype
        )
        return pooled, region_emb

    def align(
        self, weights: Tensor, regions: Tensor, words: Tensor, fc: nn.Linear
    ) -> tuple[Tensor, Tensor]:
        """s_l = l2norm(P (m_l − q_l)² + p) with m_l = Σ_r weight_lr v_r, and a · s_l + a₀.

        weights (B, W, R), regions (B, R, D), words (W, D) -> (B, W, S), (B, W).
        """
        a, a0 = self.gate_fc.weight[0], self.gate_fc.bias
        parameters = fc.weight, fc.bias, a, a0
        return Alignment.apply(weights, regions, words, *parameters, EPS, self.product_dtype)

    def gates(
        self, logits: list[Tensor], owners: list[Tensor], n_captions: int
    ) -> tuple[Tensor, ...]:
        """e_l = sigmoid(BN(a · s_l + a₀)), l = 0…L, divided by their sum over the caption.

        The logits a · s_l + a₀, (B, W) of the words and (B, C) of the captions as wholes, and
        the caption of each, (W,) and (C,) -> their gates.
        """
        owner = torch.cat(owners)
        gates = self.gate_bn(torch.cat(logits, dim=1), owner, n_captions).sigmoid()
        sums = segment_sum(gates, owner, n_captions, dim=1) + EPS  # (B, C)
        gates = gates / sums.index_select(1, owner)
        return gates.split([part.shape[1] for part in logits], dim=1)


def with_local_alignments(similarity: Similarity) -> SimilarityEncoder:
    """The same, if it is one that aligns words with regions.

    Raises:
        InputError: if it is not.
    """
    if isinstance(similarity, SimilarityEncoder) and similarity.local_fc is not None:
        return similarity
    raise InputError(
        "this needs LHSC's local alignments; the model was trained with another --similarity, or "
        "with --alignment global"
    )


def unit_attention(
    region_emb: Tensor,
    word_emb: Tensor,
    owner: Tensor,
    n_captions: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """cross_attention, divided by the length of what it attends to: (B, W, R)."""
    weights = cross_attention(region_emb, word_emb, owner, n_captions, dtype)
    return unit_weights(weights, region_emb)


def by_images(
    function: Callable[..., Tensor], numbers: int, of_images: tuple[Tensor, ...], *others: object
) -> Tensor:
    """`function` of some images at a time, computed again in the backward pass.

    of_images: its first arguments, (B, …); numbers: about how many it holds for an image.
    """
    size = images_a_block(numbers, of_images[0].device.type)
    parts = zip(*(x.split(size) for x in of_images), strict=True)
    # Dropout, if there is any, has to draw the same numbers again.
    random = isinstance(function, nn.Module) and function.training
    return torch.cat([
        checkpoint(function, *part, *others, use_reentrant=False, preserve_rng_state=random)
        for part in parts
    ])  # fmt: skip


# -- what it is compared with ---------------------------------------------------------------------


class AttendedCosine(Similarity):
    """SCAN, text to image: the mean over words of their cosine with what they attend to."""

    def score(self, images: EncodedImages, captions: EncodedCaptions) -> Tensor:
        (region_emb, _), (word_emb, _, lengths) = images, captions
        owner, n_captions = owner_of(lengths), len(lengths)
        numbers = len(word_emb) * region_emb.shape[1]
        cosines = by_images(
            attended_cosine, numbers, (region_emb,), word_emb, owner, n_captions, self.product_dtype
        )
        return segment_sum(cosines, owner, n_captions, dim=1) / lengths


def attended_cosine(
    region_emb: Tensor,
    word_emb: Tensor,
    owner: Tensor,
    n_captions: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """cos(q_l, m_l) = Σ_r weight_lr (q_l · v_r) / ‖q_l‖, as m_l has length 1: (B, W)."""
    weights = unit_attention(region_emb, word_emb, owner, n_captions, dtype)  # (B, W, R)
    products = product(l2norm(word_emb), region_emb.transpose(1, 2), dtype)  # (B, W, R)
    return (weights * products).sum(-1)


class MeanCosine(Similarity):
    """VSE++'s cosine of one vector each, here of the mean region and the mean word.

    VSE++ itself has a CNN's vector of the whole picture, and the GRU's last state.
    """

    def score(self, images: EncodedImages, captions: EncodedCaptions) -> Tensor:
        return images.image_global @ captions.caption_global.T
