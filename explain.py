"""What a score is made of: which regions each word attends to, and what counts how much.

model, _, vocab = evaluation.load("runs/LHSC/checkpoint/model_best.pth.tar", opt)
why = explain(model, vocab, regions, "two dogs in the snow")
why.attention[why.words.index("dogs")]        # (R,) sums to 1
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model import LHSC
from similarity import EncodedCaptions, EncodedImages, with_local_alignments
from vocab import Vocabulary, tokenize


class Explanation(NamedTuple):
    """Of one image and one caption of L words, with <start> and <end>."""

    words: list[str]  # L
    unknown: list[bool]  # L, those that are <unk> to the model
    attention: np.ndarray  # (L, R) a word's weights over the regions, each row sums to 1
    gates: np.ndarray  # (L,) the share of each word's local alignment in the pooled one …
    globl_gate: float  # … and that of the global alignment: together they sum to 1
    region_weights: np.ndarray  # (R,) of the global image vector, sum to 1 …
    word_weights: np.ndarray  # (L,) … and of the global caption vector; 0 if there are none
    score: float


@torch.inference_mode()
def explain(model: LHSC, vocab: Vocabulary, regions: Tensor, caption: str) -> Explanation:
    """regions (R, img_dim) of an image, and a caption, in a model in evaluation mode.

    Raises:
        InputError: for a model without local alignments.
    """
    return explain_embedded(model, vocab, model.image_encoder(regions.unsqueeze(0)), caption)


@torch.inference_mode()
def explain_embedded(
    model: LHSC, vocab: Vocabulary, region_emb: Tensor, caption: str
) -> Explanation:
    """As explain, of an image that is encoded already: region_emb (1, R, D)."""
    similarity, device = with_local_alignments(model.similarity), region_emb.device
    tokens, ids = tokenize(caption), vocab.encode(caption)
    lengths = torch.tensor([len(ids)], device=device)
    word_emb = model.text_encoder(torch.tensor([ids], device=device), lengths)  # (L, D)
    images = EncodedImages(region_emb, similarity.image_global(region_emb))
    caption_global = similarity.caption_global(word_emb, lengths)
    encoded = images, EncodedCaptions(word_emb, caption_global, lengths)
    aligned = similarity.alignments(*encoded)
    attention = aligned.weights[0] / aligned.weights[0].sum(-1, keepdim=True)  # (L, R)
    globl_gate, region_weights, word_weights = 0.0, np.zeros(model.num_regions), np.zeros(len(ids))
    if aligned.globl is not None:
        globl_gate = float(aligned.globl_gate[0, 0])
        word_weights = similarity.word_pooling.weights(word_emb, lengths).cpu().numpy()
        if similarity.region_pooling is not None:
            weights = similarity.region_pooling.weights(region_emb)[0]
        else:
            weights = similarity.global_regions(aligned.weights, *images, lengths)[0][0, 0]
            weights = weights / weights.sum()
        region_weights = weights.cpu().numpy()
    return Explanation(
        words=["<start>", *tokens, "<end>"],
        unknown=[id == vocab("<unk>") for id in ids],
        attention=attention.cpu().numpy(),
        gates=aligned.local_gate[0].cpu().numpy(),
        globl_gate=globl_gate,
        region_weights=region_weights,
        word_weights=word_weights,
        score=float(similarity.score(*encoded)[0, 0]),
    )
