"""LHSC: image encoder, text encoder, with a similarity (similarity.py) the whole model; the loss.

"Learning Hierarchical Semantic Correspondences for Cross-Modal Image-Text Retrieval", ICMR 2022.

Shape letters: B images, C captions, R regions, W words of all captions end to end, L longest
caption, D joint size (embed_size).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from attention import WordSelfAttention, init_xavier, l2norm
from graph_layers import RegionGraph
from similarity import AttendedCosine, MeanCosine, SimilarityEncoder


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
        region_emb = self.graph(self.fc(images).to(images.dtype))
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
        word_emb = hidden[mask[:, : hidden.shape[1]]].to(words.dtype)  # (W, D or 2 D)
        if self.gru.bidirectional:
            word_emb = torch.stack(word_emb.chunk(2, dim=-1)).mean(0)
        return word_emb if self.no_txtnorm else l2norm(word_emb)


# What some of LHSC's arguments may be; the first is the default.
CHOICES = {
    "padding": ("masked", "released"),
    "similarity": ("lhsc", "scan", "vse"),
    "global_image": ("regions", "attended"),
    "alignment": ("both", "local", "global"),
}


class LHSC(nn.Module):
    """The whole model; the arguments carry the names of train.py's options.

    The models it is compared with are variants of it: without layers (`graph_layers`,
    `text_layers` 0) it is SGRAF's SAF, with `similarity` "scan" or "vse" SCAN or VSE++ as well.

    Raises:
        ValueError: for an argument that is not among its CHOICES, or has no meaning with another.
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
        similarity: str = "lhsc",
        global_image: str = "regions",
        alignment: str = "both",
    ) -> None:
        super().__init__()
        given = {"padding": padding, "similarity": similarity, "global_image": global_image,
                 "alignment": alignment}  # fmt: skip
        for name, value in given.items():
            if value not in CHOICES[name]:
                raise ValueError(f"{name} must be one of {', '.join(CHOICES[name])}, not {value!r}")
        if similarity != "lhsc" and (alignment, global_image) != ("both", "regions"):
            raise ValueError(
                f"alignment and global_image are LHSC's, not similarity {similarity}'s"
            )
        if alignment == "local" and global_image != "regions":
            raise ValueError("with alignment local there is no global image vector")
        self.num_regions = num_regions
        self.image_encoder = ImageEncoder(img_dim, embed_size, graph_layers, no_imgnorm)
        self.text_encoder = TextEncoder(
            vocab_size, word_dim, embed_size, num_layers, bi_gru, text_layers,
            drop_out, embed_dropout, no_txtnorm, padding,
        )  # fmt: skip
        if similarity == "lhsc":
            self.similarity = SimilarityEncoder(
                embed_size, sim_dim, num_regions, pool_dropout, global_image, alignment
            )
        else:
            self.similarity = AttendedCosine() if similarity == "scan" else MeanCosine()

    def mixed_precision(self) -> LHSC:
        """In training, large matrix products are in bfloat16; weights, sums and scores in float32.

        The encoders run under autocast, the similarity casts what it multiplies.
        """
        self.similarity.mixed = True
        return self

    def forward(self, images: Tensor, captions: Tensor, lengths: Tensor) -> Tensor:
        """images (B, R, img_dim), captions (C, L), lengths (C,) -> sims (B, C)."""
        mixed = self.similarity.product_dtype is not None
        with torch.autocast(images.device.type, torch.bfloat16, enabled=mixed):
            region_emb = self.image_encoder(images)
            word_emb = self.text_encoder(captions, lengths)
        return self.similarity(region_emb, word_emb, lengths)


def triplet_loss(
    sims: Tensor,
    margin: float = 0.2,
    max_violation: bool = True,
    image_index: Tensor | None = None,
) -> Tensor:
    """Hinge loss of a batch in which image i belongs to caption i (VSE++), summed.

    sims (B, B) -> scalar. For each image the negatives are the other captions (its row), for each
    caption the other images (its column); with `max_violation` only the hardest of each counts.
    Two captions of one image in a batch are negatives of each other, as in the released code,
    unless `image_index` (B,) tells which image each row is.
    """
    positive = sims.diagonal()
    index = torch.arange(len(sims), device=sims.device) if image_index is None else image_index
    matched = index.unsqueeze(1) == index
    i2t = (margin + sims - positive.unsqueeze(1)).clamp_min(0).masked_fill(matched, 0)
    t2i = (margin + sims - positive.unsqueeze(0)).clamp_min(0).masked_fill(matched, 0)
    if max_violation:
        return i2t.max(dim=1).values.sum() + t2i.max(dim=0).values.sum()
    return i2t.sum() + t2i.sum()
