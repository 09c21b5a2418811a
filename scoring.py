"""Scores of a whole test set: the similarity of a trained model, for inference.

The same equations as similarity.SimilarityEncoder (the tests hold the two together), arranged so
that nearly all the time is spent in matrix products:

- some words of some images at a time, so that the D-wide differences stay in the cache (on a GPU:
  fill it, and no more), and memory does not depend on the size of the test set;
- the gate's BatchNorm is folded into its vector, and s_l is never divided by its length: gates and
  scores need the lengths only;
- sums over a caption's words are products with a 0/1 matrix (C, W), which also makes them bitwise
  repeatable on a GPU;
- with `dtype=torch.bfloat16` the matrix products run in bfloat16, all reductions in float32.

Variants of the model, and what it is compared with, are scored by their own equations
(PlainScorer), in the same blocks.

Cost: (4 R D + 2 D S) operations for a word and an image, 0.67 million at full size, and 2 D S
for a caption and an image.

Shape letters: B images, C captions, R regions, W words end to end, D joint size, S similarity
size; a block has b images and w words of c captions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from alignment import linear
from attention import EPS, SHARPNESS, inverse_length, owner_of
from errors import InputError
from similarity import EncodedCaptions, EncodedImages, Similarity, SimilarityEncoder


class BlockSize(NamedTuple):
    """What is handled at once."""

    words: int  # a longer caption stands alone
    images: int  # of the attention
    numel: int  # numbers of the D-wide difference, as many images × words × D


BLOCK_SIZE = {"cpu": BlockSize(512, 16, 2**20), "cuda": BlockSize(1024, 128, 2**27)}


def caption_chunks(lengths: Tensor, n_words: int) -> list[slice]:
    """Consecutive captions of at most `n_words` words together (a longer one stands alone)."""
    chunks, start, words = [], 0, 0
    for caption, length in enumerate(lengths.tolist()):
        if words and words + length > n_words:
            chunks.append(slice(start, caption))
            start, words = caption, 0
        words += length
    return [*chunks, slice(start, len(lengths))]


class PlainScorer:
    """Scores images × captions by a similarity's own `score`, some of each at a time.

    similarity: any, in evaluation mode.
    """

    def __init__(
        self, similarity: Similarity, device_type: str, block: BlockSize | None = None
    ) -> None:
        self.similarity, self.block = similarity, block or BLOCK_SIZE[device_type]

    @torch.inference_mode()
    def tiles(
        self, images: EncodedImages, captions: EncodedCaptions
    ) -> Iterator[tuple[slice, Tensor]]:
        """Scores of all images with some captions at a time: (captions, sims (B, c) float32)."""
        for chunk in self.chunks(captions):
            part = captions.rows(chunk)
            sims = [
                self._score(images.rows(rows), part)
                for rows in _slices(len(images.image_global), self.block.images)
            ]
            yield chunk, torch.cat(sims)

    def chunks(self, captions: EncodedCaptions) -> list[slice]:
        """The captions of each tile."""
        return caption_chunks(captions.lengths, self.block.words)

    def _score(self, images: EncodedImages, captions: EncodedCaptions) -> Tensor:
        """b images, c captions -> sims (b, c)."""
        return self.similarity.score(images, captions)


class Scorer(PlainScorer):
    """Scores images × captions for one trained similarity encoder.

    similarity: a SimilarityEncoder in evaluation mode, with local and global alignments, and a
        global image vector of the regions; its weights are copied.
    dtype: of the matrix products: torch.float32 (scores within 1e-5 of the released loop) or
        torch.bfloat16.
    """

    @torch.inference_mode()
    def __init__(
        self,
        similarity: SimilarityEncoder,
        dtype: torch.dtype = torch.float32,
        block: BlockSize | None = None,
    ) -> None:
        super().__init__(similarity, similarity.score_fc.weight.device.type, block)
        self.dtype = dtype
        self.P, self.p = (x.to(dtype) for x in similarity.local_fc.parameters())  # (S, D), (S,)
        self.globl_P, self.globl_p = (x.to(dtype) for x in similarity.globl_fc.parameters())
        # sigmoid(BN(a · s + a₀)) in evaluation is sigmoid(a' · s + a'₀).
        bn = similarity.gate_bn
        scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
        self.a = scale * similarity.gate_fc.weight[0]  # (S,)
        self.a0 = scale * (similarity.gate_fc.bias - bn.running_mean) + bn.bias
        self.w, self.w0 = similarity.score_fc.weight[0], similarity.score_fc.bias  # (S,), (1,)

    def tiles(
        self, images: EncodedImages, captions: EncodedCaptions
    ) -> Iterator[tuple[slice, Tensor]]:
        return super().tiles(images._replace(region_emb=images.region_emb.to(self.dtype)), captions)

    def _score(self, images: EncodedImages, captions: EncodedCaptions) -> Tensor:
        """b images, regions in self.dtype, and c captions of w words -> sims (b, c)."""
        (regions, image_global), words = images, captions.word_emb.to(self.dtype)
        owner = owner_of(captions.lengths)  # (w,)
        ones = F.one_hot(owner, len(captions.lengths)).T.to(torch.float32).contiguous()  # (c, w)
        weights = self._attention(regions, words, owner, ones)  # (b, w, R)
        pooled, total = self._global(image_global, captions.caption_global)  # (b, c, S), (b, c)
        for rows in _slices(len(regions), max(1, self.block.numel // words.numel())):
            aligned = self._align(weights[rows], regions[rows], words)  # (b', w, S)
            inverse = inverse_length(torch.linalg.vector_norm(aligned, dim=-1))  # (b', w)
            gates = torch.sigmoid(aligned @ self.a * inverse + self.a0)
            total[rows] += gates @ ones.T
            pooled[rows].baddbmm_(ones * (gates * inverse).unsqueeze(1), aligned)
        # With s = pooled / total, w · l2norm(s) = w · pooled / (‖pooled‖ + eps total).
        length = torch.linalg.vector_norm(pooled, dim=-1)
        return torch.sigmoid(pooled @ self.w / (length + EPS * (total + EPS)) + self.w0)

    def _attention(self, regions: Tensor, words: Tensor, owner: Tensor, ones: Tensor) -> Tensor:
        """attention.cross_attention, divided by the length of what is attended to: (b, w, R)."""
        n_images, n_regions, _ = regions.shape
        affinity = linear(words, regions.flatten(0, 1))  # (w, b R)
        affinity = F.leaky_relu(affinity.float(), 0.1)
        scale = SHARPNESS * inverse_length((ones @ affinity.square()).sqrt_())  # (c, b R)
        affinity *= scale.index_select(0, owner)
        weights = affinity.view(-1, n_images, n_regions).softmax(dim=-1)
        weights = weights.transpose(0, 1).contiguous()  # (b, w, R)
        gram = (regions @ regions.transpose(1, 2)).float()  # (b, R, R)
        squared = ((weights @ gram) * weights).sum(-1, keepdim=True).clamp_min_(0)
        return (weights * inverse_length(squared.sqrt_())).to(self.dtype)

    def _align(self, weights: Tensor, regions: Tensor, words: Tensor) -> Tensor:
        """P (attended − word)² + p: (b, w, R), (b, R, D), (w, D) -> (b, w, S) float32."""
        attended = weights @ regions  # (b, w, D)
        words = words.expand_as(attended)
        squared = torch.ops.aten.mse_loss.out(attended, words, 0, out=attended)
        return linear(squared, self.P, self.p).float()

    def _global(self, image_global: Tensor, caption_global: Tensor) -> tuple[Tensor, Tensor]:
        """The global alignment times its gate, and the gate: (b, c, S), (b, c)."""
        difference = (image_global.unsqueeze(1) - caption_global).to(self.dtype)  # (b, c, D)
        aligned = linear(difference.square_(), self.globl_P, self.globl_p).float()
        inverse = inverse_length(torch.linalg.vector_norm(aligned, dim=-1))  # (b, c)
        gate = torch.sigmoid(aligned @ self.a * inverse + self.a0)
        return aligned * (gate * inverse).unsqueeze(-1), gate


def scorer(similarity: Similarity, device: torch.device, dtype: torch.dtype) -> PlainScorer:
    """The scorer that fits a similarity.

    Raises:
        InputError: for a dtype that only LHSC's own scoring has.
    """
    whole = isinstance(similarity, SimilarityEncoder) and (
        similarity.local_fc is not None and similarity.region_pooling is not None
    )
    if whole:
        return Scorer(similarity, dtype)
    if dtype != torch.float32:
        raise InputError(
            "--precision: other than fp32 only for LHSC with local and global alignments, and "
            "--global_image regions"
        )
    return PlainScorer(similarity, device.type)


def _slices(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))
