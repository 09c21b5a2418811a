"""The official code's way of computing LHSC, literal and slow: what the model is tested against.

One caption at a time, one numbered layer after another, under the names of the official
checkpoints. It shares no code with the model, so that an error has to be made twice to hide.

Shape letters: B images, C captions, R regions, L longest caption, n words of one caption,
E word_dim, D joint size, S similarity size.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence


def l2norm(x: Tensor, dim: int = -1) -> Tensor:
    """x / (length + 1e-8). vector_norm has gradient 0 at 0, where a written-out root gives NaN."""
    return x / (torch.linalg.vector_norm(x, dim=dim, keepdim=True) + 1e-8)


def linear(n_in: int, n_out: int) -> nn.Linear:
    """With Xavier's initial weights, uniform within ±sqrt(6 / (in + out)), and bias 0."""
    layer = nn.Linear(n_in, n_out)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class OfficialGraphLayer(nn.Module):
    """V + BatchNorm(w(G g(V))), with G = FC1(theta(V)) FC2(phi(V))ᵀ / R.  (B, D, R) -> (B, D, R)"""

    def __init__(self, D: int) -> None:
        super().__init__()
        heads = [nn.Conv1d(D, D // 4, 1) for _ in range(8)]
        self.theta, self.theta1, self.theta2, self.theta3 = heads[:4]
        self.phi, self.phi1, self.phi2, self.phi3 = heads[4:]
        self.fc1, self.fc2 = nn.Linear(D, D), nn.Linear(D, D)
        self.g = nn.Conv1d(D, D, 1)
        self.W = nn.Sequential(nn.Conv1d(D, D, 1), nn.BatchNorm1d(D))
        nn.init.zeros_(self.W[1].weight)  # scale and shift 0: the layer starts as the identity
        nn.init.zeros_(self.W[1].bias)

    def forward(self, v: Tensor) -> Tensor:
        theta = torch.cat([self.theta(v), self.theta1(v), self.theta2(v), self.theta3(v)], 1)
        phi = torch.cat([self.phi(v), self.phi1(v), self.phi2(v), self.phi3(v)], 1)  # (B, D, R)
        a = self.fc1(theta.transpose(1, 2))  # (B, R, D)
        b = self.fc2(phi.transpose(1, 2))
        graph = a @ b.transpose(1, 2) / v.shape[2]  # (B, R, R)
        y = graph @ self.g(v).transpose(1, 2)  # (B, R, D)
        return v + self.W(y.transpose(1, 2))


class OfficialImageEncoder(nn.Module):
    """Region features to region embeddings.  (B, R, img_dim) -> (B, R, D)"""

    def __init__(self, img_dim: int, embed_size: int) -> None:
        super().__init__()
        self.fc = linear(img_dim, embed_size)
        self.IM_GCN_1, self.IM_GCN_2, self.IM_GCN_3, self.IM_GCN_4 = (
            OfficialGraphLayer(embed_size) for _ in range(4)
        )

    def forward(self, images: Tensor) -> Tensor:
        v = self.fc(images).transpose(1, 2)  # (B, D, R)
        v = self.IM_GCN_4(self.IM_GCN_3(self.IM_GCN_2(self.IM_GCN_1(v))))
        return l2norm(v.transpose(1, 2))  # only here, not between the layers


class OfficialWordAttention(nn.Module):
    """x + (l gᵀ / L) u over all L words it is given, pads among them.  (C, L, E) -> (C, L, E)"""

    def __init__(self, word_dim: int) -> None:
        super().__init__()
        self.embedding_local, self.embedding_global, self.embedding_v = (
            nn.Sequential(linear(word_dim, word_dim), nn.Tanh(), nn.Dropout(0.0)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        local = self.embedding_local(x)
        other = self.embedding_global(x)
        affinity = local @ other.transpose(1, 2) / x.shape[1]  # (C, L, L)
        return x + affinity @ self.embedding_v(x)


class OfficialTextEncoder(nn.Module):
    """Padded token ids and lengths to word embeddings, 0 at the pads.  (C, L) -> (C, L, D)

    masked=False pads as the official code does: pads attend and are attended to, and L divides.
    masked=True runs each caption alone and unpadded, so it sees nothing of its batch.
    """

    def __init__(self, vocab_size, word_dim, embed_size, embed_dropout, masked) -> None:
        super().__init__()
        self.masked = masked
        self.embed = nn.Embedding(vocab_size, word_dim)  # no padding_idx: row 0 is trained
        nn.init.uniform_(self.embed.weight, -0.1, 0.1)
        self.dropout = nn.Dropout(embed_dropout)
        self.W_att1, self.W_att2, self.W_att3, self.W_att4 = (
            OfficialWordAttention(word_dim) for _ in range(4)
        )
        self.cap_rnn = nn.GRU(word_dim, embed_size, batch_first=True, bidirectional=True)

    def forward(self, captions: Tensor, lengths: Tensor) -> Tensor:
        if not self.masked:
            return self.encode(captions, lengths)
        rows = [
            self.encode(caption[None, :n], n[None])[0]  # (n, D)
            for caption, n in zip(captions, lengths, strict=True)
        ]
        return pad_sequence(rows, batch_first=True)

    def encode(self, captions: Tensor, lengths: Tensor) -> Tensor:
        """Every word of the rows attends, whatever the lengths; the GRU minds the lengths."""
        x = self.dropout(self.embed(captions))  # (C, L, E)
        x = self.W_att4(self.W_att3(self.W_att2(self.W_att1(x))))
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        states, _ = self.cap_rnn(packed)
        states, _ = pad_packed_sequence(states, batch_first=True, total_length=x.shape[1])
        half = states.shape[2] // 2
        return l2norm((states[:, :, :half] + states[:, :, half:]) / 2)


class OfficialPooling(nn.Module):
    """One vector of some vectors and their mean.  (B, n, D), (B, D) -> (B, D)

    num_regions: of an image, whose branches have BatchNorm; None for captions.
    """

    def __init__(self, D: int, dropout: float, num_regions: int | None = None) -> None:
        super().__init__()
        # BatchNorm1d takes dimension 1 as channels: for the regions that is their position.
        norms = [[nn.BatchNorm1d(n)] if num_regions else [] for n in (num_regions, D)]
        self.embedding_local, self.embedding_global = (
            nn.Sequential(linear(D, D), *norm, nn.Tanh(), nn.Dropout(dropout)) for norm in norms
        )
        self.embedding_common = nn.Sequential(linear(D, 1))

    def forward(self, vectors: Tensor, mean: Tensor) -> Tensor:
        local = self.embedding_local(vectors)  # (B, n, D)
        common = local * self.embedding_global(mean)[:, None, :]
        weights = self.embedding_common(common).squeeze(2).softmax(1)  # (B, n)
        return l2norm((weights[:, :, None] * vectors).sum(1))


class OfficialGate(nn.Module):
    """Alignments weighed by their gates and summed.  (B, 1 + n, S) -> (B, S)"""

    def __init__(self, sim_dim: int) -> None:
        super().__init__()
        self.attn_sim_w = linear(sim_dim, 1)
        self.bn = nn.BatchNorm1d(1)

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


class OfficialSimilarity(nn.Module):
    """Scores of images with one caption; score_loop goes through the captions.

    ablation: none of the official code: only "local" alignments, only the "global" one, or
    "attended", the image pooled from what the words of the caption attend to.
    """

    def __init__(self, embed_size, sim_dim, num_regions, dropout, ablation="lhsc") -> None:
        super().__init__()
        self.ablation = ablation
        has_norm = num_regions if ablation != "attended" else None
        self.v_global_w = OfficialPooling(embed_size, dropout, has_norm)
        self.t_global_w = OfficialPooling(embed_size, dropout)
        self.sim_tranloc_w = linear(embed_size, sim_dim)
        self.sim_tranglo_w = linear(embed_size, sim_dim)
        self.sim_eval_w = linear(sim_dim, 1)
        self.cal_sim_base_atten = OfficialGate(sim_dim)

    def forward(self, region_emb: Tensor, image_global: Tensor, words: Tensor) -> Tensor:
        """(B, R, D), (B, D), (1, n, D) -> (B, 1)"""
        caption_global = self.t_global_w(words, words.mean(1))  # (1, D)
        words = words.expand(len(region_emb), -1, -1)  # (B, n, D)
        attended = cross_attention(words, region_emb)
        if self.ablation == "attended":
            image_global = self.v_global_w(attended, attended.mean(1))
        local = l2norm(self.sim_tranloc_w((attended - words) ** 2))  # (B, n, S)
        whole = l2norm(self.sim_tranglo_w((image_global - caption_global) ** 2))  # (B, S)
        whole = whole[:, None, :]  # (B, 1, S)
        alignments = {"local": local, "global": whole}.get(
            self.ablation, torch.cat([whole, local], 1)  # (B, 1 + n, S)
        )  # fmt: skip
        return self.sim_eval_w(self.cal_sim_base_atten(alignments)).sigmoid()


def score_loop(similarity, region_emb: Tensor, word_emb: Tensor, lengths: Tensor) -> Tensor:
    """Scores of given embeddings, one caption at a time.  (B, R, D), (C, L, D), (C,) -> (B, C)

    In train mode each caption moves the gate's running statistics once, in caption order.
    """
    image_global = similarity.v_global_w(region_emb, region_emb.mean(1))  # once a batch: (B, D)
    columns = [
        similarity(region_emb, image_global, words[None, :n])
        for words, n in zip(word_emb, lengths, strict=True)
    ]
    return torch.cat(columns, 1)


class OfficialLHSC(nn.Module):
    """The three official modules together; a fresh one has the official initial values."""

    def __init__(
        self, img_dim, embed_size, sim_dim, word_dim, vocab_size, num_regions=36,
        embed_dropout=0.4, pooling_dropout=0.4, masked=False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.img_enc = OfficialImageEncoder(img_dim, embed_size)
        self.txt_enc = OfficialTextEncoder(vocab_size, word_dim, embed_size, embed_dropout, masked)
        self.sim_enc = OfficialSimilarity(embed_size, sim_dim, num_regions, pooling_dropout)

    def forward(self, images: Tensor, captions: Tensor, lengths: Tensor) -> Tensor:
        """(B, R, img_dim), (C, L), (C,) -> sims (B, C)"""
        word_emb = self.txt_enc(captions, lengths)
        return score_loop(self.sim_enc, self.img_enc(images), word_emb, lengths)


def hinge_loss(sims: Tensor, margin=0.2, max_violation=True) -> Tensor:
    """Hinge on each image's wrong captions and back, summed; max_violation: only the hardest."""
    loss = sims.new_zeros(())
    for i in range(len(sims)):
        wrong = [j for j in range(len(sims)) if j != i]
        for scores in (sims[i, wrong], sims[wrong, i]):
            costs = (margin + scores - sims[i, i]).clamp(min=0)
            loss = loss + (costs.max() if max_violation else costs.sum())
    return loss
