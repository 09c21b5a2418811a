"""The released way of computing LHSC, literal and slow: what the model is tested against.

One caption at a time, one numbered layer after another, under the names of the released
checkpoints. It shares no code with the model, so that an error has to be made twice to hide.
Letters: B images, C captions, R regions, L longest caption, D joint size, S similarity size.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


def l2norm(x: Tensor, dim: int = -1) -> Tensor:
    """x / (length + 1e-8). vector_norm has gradient 0 at 0, where a written-out root gives NaN."""
    return x / (torch.linalg.vector_norm(x, dim=dim, keepdim=True) + 1e-8)


def init_uniform(linear: nn.Linear) -> None:
    """Weight uniform within ±sqrt(6 / (in + out)), which is Xavier's, and bias 0."""
    bound = math.sqrt(6.0 / (linear.in_features + linear.out_features))
    nn.init.uniform_(linear.weight, -bound, bound)
    nn.init.zeros_(linear.bias)


class ReleasedGraphLayer(nn.Module):
    """V + BatchNorm(w(G g(V))), with G = FC1(theta(V)) FC2(phi(V))ᵀ / R.  (B, D, R) -> (B, D, R)"""

    def __init__(self, embed_size: int) -> None:
        super().__init__()
        head = embed_size // 4
        self.g = nn.Conv1d(embed_size, embed_size, 1)
        self.W = nn.Sequential(nn.Conv1d(embed_size, embed_size, 1), nn.BatchNorm1d(embed_size))
        nn.init.zeros_(self.W[1].weight)  # scale and shift 0: the layer starts as the identity
        nn.init.zeros_(self.W[1].bias)
        self.theta = nn.Conv1d(embed_size, head, 1)
        self.theta1 = nn.Conv1d(embed_size, head, 1)
        self.theta2 = nn.Conv1d(embed_size, head, 1)
        self.theta3 = nn.Conv1d(embed_size, head, 1)
        self.phi = nn.Conv1d(embed_size, head, 1)
        self.phi1 = nn.Conv1d(embed_size, head, 1)
        self.phi2 = nn.Conv1d(embed_size, head, 1)
        self.phi3 = nn.Conv1d(embed_size, head, 1)
        self.fc1 = nn.Linear(embed_size, embed_size)
        self.fc2 = nn.Linear(embed_size, embed_size)

    def forward(self, v: Tensor) -> Tensor:
        # The heads are concatenated in their numbered order.
        theta = torch.cat([self.theta(v), self.theta1(v), self.theta2(v), self.theta3(v)], 1)
        phi = torch.cat([self.phi(v), self.phi1(v), self.phi2(v), self.phi3(v)], 1)  # (B, D, R)
        a = self.fc1(theta.transpose(1, 2))  # (B, R, D)
        b = self.fc2(phi.transpose(1, 2))
        graph = a @ b.transpose(1, 2) / v.shape[2]  # (B, R, R)
        y = graph @ self.g(v).transpose(1, 2)  # (B, R, D)
        return v + self.W(y.transpose(1, 2))


class ReleasedImageEncoder(nn.Module):
    """Region features to region embeddings.  (B, R, img_dim) -> (B, R, D)"""

    def __init__(self, img_dim: int, embed_size: int) -> None:
        super().__init__()
        self.fc = nn.Linear(img_dim, embed_size)
        init_uniform(self.fc)
        self.IM_GCN_1 = ReleasedGraphLayer(embed_size)
        self.IM_GCN_2 = ReleasedGraphLayer(embed_size)
        self.IM_GCN_3 = ReleasedGraphLayer(embed_size)
        self.IM_GCN_4 = ReleasedGraphLayer(embed_size)

    def forward(self, images: Tensor) -> Tensor:
        v = self.fc(images).transpose(1, 2)  # (B, D, R)
        v = self.IM_GCN_1(v)
        v = self.IM_GCN_2(v)
        v = self.IM_GCN_3(v)
        v = self.IM_GCN_4(v)
        return l2norm(v.transpose(1, 2))  # only here, not between the layers


class ReleasedWordAttention(nn.Module):
    """x + (l gᵀ / L) u over all L words it is given, pads among them.  (C, L, E) -> (C, L, E)"""

    def __init__(self, word_dim: int, dropout: float) -> None:
        super().__init__()

        def branch() -> nn.Sequential:
            linear = nn.Linear(word_dim, word_dim)
            init_uniform(linear)
            return nn.Sequential(linear, nn.Tanh(), nn.Dropout(dropout))

        self.embedding_local = branch()
        self.embedding_global = branch()
        self.embedding_v = branch()

    def forward(self, x: Tensor) -> Tensor:
        local = self.embedding_local(x)
        other = self.embedding_global(x)
        affinity = local @ other.transpose(1, 2) / x.shape[1]  # (C, L, L)
        return x + affinity @ self.embedding_v(x)


class ReleasedTextEncoder(nn.Module):
    """Padded token ids and lengths to word embeddings, 0 at the pads.  (C, L) -> (C, L, D)

    masked=False pads as the released code does: pads attend and are attended to, and L divides.
    masked=True runs each caption alone and unpadded, so it sees nothing of its batch.
    """

    def __init__(
        self,
        vocab_size: int,
        word_dim: int,
        embed_size: int,
        num_layers: int = 1,
        embed_dropout: float = 0.4,
        word_dropout: float = 0.0,
        masked: bool = False,
    ) -> None:
        super().__init__()
        self.masked = masked
        self.embed = nn.Embedding(vocab_size, word_dim)  # no padding_idx: row 0 is trained
        nn.init.uniform_(self.embed.weight, -0.1, 0.1)
        self.dropout = nn.Dropout(embed_dropout)
        self.W_att1 = ReleasedWordAttention(word_dim, word_dropout)
        self.W_att2 = ReleasedWordAttention(word_dim, word_dropout)
        self.W_att3 = ReleasedWordAttention(word_dim, word_dropout)
        self.W_att4 = ReleasedWordAttention(word_dim, word_dropout)
        self.cap_rnn = nn.GRU(
            word_dim, embed_size, num_layers, batch_first=True, bidirectional=True
        )

    def forward(self, captions: Tensor, lengths: Sequence[int] | Tensor) -> Tensor:
        lengths = [int(n) for n in lengths]
        if not self.masked:
            return self.encode(captions, lengths)
        rows = []
        for caption, n in zip(captions, lengths, strict=True):
            words = self.encode(caption[None, :n], [n])[0]  # (n, D)
            rows.append(nn.functional.pad(words, (0, 0, 0, captions.shape[1] - n)))
        return torch.stack(rows)

    def encode(self, captions: Tensor, lengths: list[int]) -> Tensor:
        """Every word of the rows attends, whatever the lengths; the GRU minds the lengths."""
        x = self.dropout(self.embed(captions))  # (C, L, E)
        x = self.W_att1(x)
        x = self.W_att2(x)
        x = self.W_att3(x)
        x = self.W_att4(x)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        states, _ = self.cap_rnn(packed)
        states, _ = pad_packed_sequence(states, batch_first=True, total_length=x.shape[1])
        half = states.shape[2] // 2
        return l2norm((states[:, :, :half] + states[:, :, half:]) / 2)


class ReleasedImagePooling(nn.Module):
    """One vector of an image from its regions and their mean.  (B, R, D), (B, D) -> (B, D)"""

    def __init__(self, embed_size: int, num_regions: int, dropout: float) -> None:
        super().__init__()
        # BatchNorm1d takes dimension 1 as channels: for the regions that is their position.
        self.embedding_local = nn.Sequential(
            nn.Linear(embed_size, embed_size),
            nn.BatchNorm1d(num_regions),
            nn.Tanh(),
            nn.Dropout(dropout),
        )
        self.embedding_global = nn.Sequential(
            nn.Linear(embed_size, embed_size),
            nn.BatchNorm1d(embed_size),
            nn.Tanh(),
            nn.Dropout(dropout),
        )
        self.embedding_common = nn.Sequential(nn.Linear(embed_size, 1))
        init_uniform(self.embedding_local[0])
        init_uniform(self.embedding_global[0])
        init_uniform(self.embedding_common[0])

    def forward(self, regions: Tensor, mean: Tensor) -> Tensor:
        local = self.embedding_local(regions)  # (B, R, D)
        common = local * self.embedding_global(mean)[:, None, :]
        weights = self.embedding_common(common).squeeze(2).softmax(1)  # (B, R)
        return l2norm((weights[:, :, None] * regions).sum(1))


class ReleasedTextPooling(nn.Module):
    """One vector of a caption from its words and their mean.  (1, n, D), (1, D) -> (1, D)"""

    def __init__(self, embed_size: int, dropout: float) -> None:
        super().__init__()
        self.embedding_local = nn.Sequential(
            nn.Linear(embed_size, embed_size), nn.Tanh(), nn.Dropout(dropout)
        )
        self.embedding_global = nn.Sequential(
            nn.Linear(embed_size, embed_size), nn.Tanh(), nn.Dropout(dropout)
        )
        self.embedding_common = nn.Sequential(nn.Linear(embed_size, 1))
        init_uniform(self.embedding_local[0])
        init_uniform(self.embedding_global[0])
        init_uniform(self.embedding_common[0])

    def forward(self, words: Tensor, mean: Tensor) -> Tensor:
        local = self.embedding_local(words)  # (1, n, D)
        common = local * self.embedding_global(mean)[:, None, :]
        weights = self.embedding_common(common).squeeze(2).softmax(1)  # (1, n)
        return l2norm((weights[:, :, None] * words).sum(1))


class ReleasedGate(nn.Module):
    """Alignments weighed by their gates and summed.  (B, 1 + n, S) -> (B, S)"""

    def __init__(self, sim_dim: int) -> None:
        super().__init__()
        self.attn_sim_w = nn.Linear(sim_dim, 1)
        self.bn = nn.BatchNorm1d(1)
        init_uniform(self.attn_sim_w)

    def forward(self, alignments: Tensor) -> Tensor:
        gates = self.attn_sim_w(alignments).transpose(1, 2)  # (B, 1, 1 + n)
        gates = self.bn(gates).sigmoid().transpose(1, 2)  # statistics over B * (1 + n) gates
        gates = gates / (gates.sum(1, keepdim=True) + 1e-8)  # they are positive: no length needed
        return l2norm((gates * alignments).sum(1))


def cross_attention(words: Tensor, regions: Tensor) -> Tensor:
    """The regions as each word sees them.  (B, n, D), (B, R, D) -> (B, n, D)"""
    affinity = words @ regions.transpose(1, 2)  # (B, n, R)
    affinity = nn.functional.leaky_relu(affinity, 0.1)
    affinity = l2norm(affinity, dim=1)  # each region's column, over this caption's words
    weights = (9.0 * affinity).softmax(2)
    return l2norm(weights @ regions)


class ReleasedSimilarity(nn.Module):
    """Scores of images and captions, caption by caption.  (B, R, D), (C, L, D) -> (B, C)"""

    def __init__(
        self,
        embed_size: int,
        sim_dim: int,
        num_regions: int = 36,
        pooling_dropout: float = 0.4,
    ) -> None:
        super().__init__()
        self.v_global_w = ReleasedImagePooling(embed_size, num_regions, pooling_dropout)
        self.t_global_w = ReleasedTextPooling(embed_size, pooling_dropout)
        self.sim_tranloc_w = nn.Linear(embed_size, sim_dim)
        self.sim_tranglo_w = nn.Linear(embed_size, sim_dim)
        self.sim_eval_w = nn.Linear(sim_dim, 1)
        self.cal_sim_base_atten = ReleasedGate(sim_dim)
        init_uniform(self.sim_tranloc_w)
        init_uniform(self.sim_tranglo_w)
        init_uniform(self.sim_eval_w)

    def forward(
        self, region_emb: Tensor, word_emb: Tensor, lengths: Sequence[int] | Tensor
    ) -> Tensor:
        image_global = self.v_global_w(region_emb, region_emb.mean(1))  # once a batch: (B, D)
        columns = []
        for words, n in zip(word_emb, lengths, strict=True):
            words = words[None, : int(n)]  # (1, n, D)
            columns.append(self.score_caption(region_emb, image_global, words))
        return torch.cat(columns, 1)

    def score_caption(self, region_emb: Tensor, image_global: Tensor, words: Tensor) -> Tensor:
        """All images against one caption.  (B, R, D), (B, D), (1, n, D) -> (B, 1)"""
        caption_global = self.t_global_w(words, words.mean(1))  # (1, D)
        expanded = words.expand(len(region_emb), -1, -1)  # (B, n, D)
        attended = cross_attention(expanded, region_emb)
        local = l2norm(self.sim_tranloc_w((attended - expanded) ** 2))  # (B, n, S)
        whole = l2norm(self.sim_tranglo_w((image_global - caption_global) ** 2))  # (B, S)
        alignments = torch.cat([whole[:, None, :], local], 1)  # (B, 1 + n, S)
        return self.sim_eval_w(self.cal_sim_base_atten(alignments)).sigmoid()


def score_loop(
    similarity: ReleasedSimilarity,
    region_emb: Tensor,
    word_emb: Tensor,
    lengths: Sequence[int] | Tensor,
) -> Tensor:
    """Score given embeddings, one caption at a time.  (B, R, D), (C, L, D) -> (B, C)

    In train mode each caption moves the gate's running statistics once, in caption order; in
    eval mode nothing moves. Gradients are kept unless the caller says no_grad.
    """
    return similarity(region_emb, word_emb, lengths)


class ReleasedLHSC(nn.Module):
    """The three released modules together; a fresh one has the released initial values."""

    def __init__(
        self,
        img_dim: int,
        embed_size: int,
        sim_dim: int,
        word_dim: int,
        vocab_size: int,
        num_regions: int = 36,
        num_layers: int = 1,
        embed_dropout: float = 0.4,
        word_dropout: float = 0.0,
        pooling_dropout: float = 0.4,
        masked: bool = False,
    ) -> None:
        super().__init__()
        self.img_enc = ReleasedImageEncoder(img_dim, embed_size)
        self.txt_enc = ReleasedTextEncoder(
            vocab_size, word_dim, embed_size, num_layers, embed_dropout, word_dropout, masked
        )
        self.sim_enc = ReleasedSimilarity(embed_size, sim_dim, num_regions, pooling_dropout)

    def forward(self, images: Tensor, captions: Tensor, lengths: Sequence[int] | Tensor) -> Tensor:
        """(B, R, img_dim), (C, L), (C,) -> sims (B, C)"""
        return score_loop(
            self.sim_enc, self.img_enc(images), self.txt_enc(captions, lengths), lengths
        )

    def load_golden(self, npz: Mapping[str, np.ndarray], prefix: str = "init") -> None:
        """Load `prefix/{img_enc,txt_enc,sim_enc}/name` into the three modules, strictly."""
        for module in ("img_enc", "txt_enc", "sim_enc"):
            start = f"{prefix}/{module}/"
            state = {k[len(start) :]: torch.tensor(npz[k]) for k in npz if k.startswith(start)}
            getattr(self, module).load_state_dict(state, strict=True)


def hardest_negative_loss(sims: Tensor, margin: float = 0.2) -> Tensor:
    """Hinge on the hardest wrong caption of each image and image of each caption, summed."""
    loss = sims.new_zeros(())
    for i in range(len(sims)):
        wrong = [j for j in range(len(sims)) if j != i]
        if wrong:
            loss = loss + (margin + sims[i, wrong].max() - sims[i, i]).clamp(min=0)
            loss = loss + (margin + sims[wrong, i].max() - sims[i, i]).clamp(min=0)
    return loss


def recalls(ranks: list[int]) -> dict[str, float]:
    """Named figures of ranks counted from 0. medr and meanr count from 1; r are per cent."""
    n = len(ranks)
    return {
        "r1": 100.0 * sum(rank < 1 for rank in ranks) / n,
        "r5": 100.0 * sum(rank < 5 for rank in ranks) / n,
        "r10": 100.0 * sum(rank < 10 for rank in ranks) / n,
        "medr": float(math.floor(np.median(ranks)) + 1),
        "meanr": sum(ranks) / n + 1,
    }


def evaluate_ranks(sims: np.ndarray, per: int = 5) -> dict[str, dict[str, float] | float]:
    """Ranks by counting, (n, n * per) scores; caption j belongs to image j // per.

    A rank is how many wrong items score at least as high as the right one (the image's best
    caption, in i2t): ties count against the model.
    """
    n_image, n_caption = sims.shape
    i2t = []
    for i in range(n_image):
        best = max(sims[i, j] for j in range(n_caption) if j // per == i)
        i2t.append(sum(1 for j in range(n_caption) if j // per != i and sims[i, j] >= best))
    t2i = []
    for j in range(n_caption):
        right = sims[j // per, j]
        t2i.append(sum(1 for i in range(n_image) if i != j // per and sims[i, j] >= right))
    report = {"i2t": recalls(i2t), "t2i": recalls(t2i)}
    report["rsum"] = sum(report[way][r] for way in ("i2t", "t2i") for r in ("r1", "r5", "r10"))
    return report
