"""The region graph: objects, their relations, and higher levels of meaning.

Shape letters: B images, R regions, D joint size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distributed import all_reduce_sum, world_size


class FusedWeights(NamedTuple):
    """A graph layer's weights, multiplied; the matrices are laid out for F.linear."""

    pair: Tensor  # (D, D) B Aᵀ
    pair_bias: Tensor  # (D,) B a₀
    own: Tensor  # (D,) A b₀
    own_bias: Tensor  # () a₀ · b₀
    message: Tensor  # (D, D) M
    message_bias: Tensor  # (D,) m


class GraphLayer(nn.Module):
    """One graph convolution over the fully connected, learned graph of an image's regions.

    a = FC1 θ(V),  b = FC2 φ(V),  G = a bᵀ / R        affinity: no softmax, no box geometry
    V ← V + BN(w(G g(V)))

    The scale *and* the shift of BN start at 0, so each layer starts as the identity. In the
    official code θ and φ have four heads D → D/4, concatenated: that is one D → D linear layer.

    There is no nonlinearity between FC1 and θ, FC2 and φ, w and g. So the weights of each pair are
    multiplied first, and the regions are multiplied by two matrices instead of six. With
    a = V A + a₀, b = V B + b₀ and w(g(v)) = v M + m + w₀:

    R · G = (V A Bᵀ + a₀ Bᵀ) Vᵀ + (V A b₀ + a₀ · b₀) 1ᵀ,   w(G g(V)) = G (V M + m) + w₀
    """

    def __init__(self, embed_size: int) -> None:
        super().__init__()
        self.theta = nn.Linear(embed_size, embed_size)
        self.phi = nn.Linear(embed_size, embed_size)
        self.fc1 = nn.Linear(embed_size, embed_size)
        self.fc2 = nn.Linear(embed_size, embed_size)
        self.g = nn.Linear(embed_size, embed_size)
        self.w = nn.Linear(embed_size, embed_size)
        self.bn = BatchNorm1d(embed_size)
        nn.init.zeros_(self.bn.weight)

    def fused_weights(self) -> FusedWeights:
        """The weights of each pair, multiplied."""
        A, a0 = self.theta.weight.T @ self.fc1.weight.T, self.fc1(self.theta.bias)
        B, b0 = self.phi.weight.T @ self.fc2.weight.T, self.fc2(self.phi.bias)
        M, m = self.w.weight @ self.g.weight, self.w.weight @ self.g.bias
        return FusedWeights(B @ A.T, B @ a0, A @ b0, a0 @ b0, M, m)

    def forward(self, regions: Tensor, fused: FusedWeights | None = None) -> Tensor:
        """regions (B, R, D) -> (B, R, D). fused: fused_weights(), if already computed."""
        pair, pair_bias, own, own_bias, M, m = fused or self.fused_weights()
        affinity = F.linear(regions, pair, pair_bias) @ regions.transpose(1, 2)  # (B, R, R)
        affinity = affinity + (regions @ own + own_bias).unsqueeze(2)
        affinity = affinity / regions.shape[1]  # G
        message = affinity @ F.linear(regions, M, m) + self.w.bias  # (B, R, D) w(G g(V))
        return regions + self.bn(message.flatten(0, 1)).view_as(regions)


class RegionGraph(nn.Module):
    """A stack of graph layers, one for each level of the hierarchy.

    level 0   objects        the projected regions, before any layer
    level 1   relations      each region has a message from every other: pairs of objects
    level 2…  higher levels  relations of relations: groups, and finally the scene
    """

    def __init__(self, embed_size: int, num_layers: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GraphLayer(embed_size) for _ in range(num_layers))

    def fused_weights(self) -> list[FusedWeights]:
        """Those of every layer; compute them once if many batches use the same weights."""
        return [layer.fused_weights() for layer in self.layers]

    def forward(self, objects: Tensor, fused: Sequence[FusedWeights] | None = None) -> Tensor:
        """objects (B, R, D) -> regions of the highest level (B, R, D)."""
        regions = objects
        for layer, weights in zip(self.layers, fused or [None] * len(self.layers), strict=True):
            regions = layer(regions, fused=weights)
        return regions


class BatchNorm1d(nn.BatchNorm1d):
    """BatchNorm over the global batch: PyTorch's own in a single process and for inference.

    Otherwise mean and variance are those of all ranks, and every rank updates its buffers alike.
    (PyTorch's SyncBatchNorm does this on GPUs only.)
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C) or (N, C, L); statistics of each channel over the other axes and all ranks."""
        if world_size() == 1 or not self.training:
            return super().forward(x)
        x = x.to(self.running_mean.dtype)  # from bfloat16, in mixed precision
        rest = [0, *range(2, x.dim())]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        n = all_reduce_sum(x.new_tensor(x.numel() / x.shape[1]))
        mean = all_reduce_sum(x.sum(rest)) / n
        centred = x - mean.view(shape)
        var = all_reduce_sum(centred.square().sum(rest)) / n
        with torch.no_grad():
            for buffer, now in ((self.running_mean, mean), (self.running_var, var * n / (n - 1))):
                buffer.lerp_(now, self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (var + self.eps).rsqrt()
        return centred * scale.view(shape) + self.bias.view(shape)
