"""The region graph: from objects to their relations to higher levels of meaning.

Shape letters: B images, R regions, D joint size.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distributed import BatchNorm1d


class GraphLayer(nn.Module):
    """One graph convolution over the fully connected, learned graph of an image's regions.

    a = FC1 θ(V),  b = FC2 φ(V),  G = a bᵀ / R        affinity: no softmax, no box geometry
    V ← V + BN(w(G g(V)))

    θ and φ of the released code are four heads D → D/4 laid side by side again, which is one
    D → D linear layer. BN's scale *and* shift start at 0: each layer starts as the identity.

    No nonlinearity stands between FC1 and θ, FC2 and φ, w and g, so the matrices of each chain are
    multiplied with each other first and regions, of which a batch has many more than D, meet two
    matrices instead of six: with a = V A + a₀ and b = V B + b₀

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

    def products(self) -> Products:
        """The chains of linear layers, multiplied out."""
        A, a0 = self.theta.weight.T @ self.fc1.weight.T, self.fc1(self.theta.bias)
        B, b0 = self.phi.weight.T @ self.fc2.weight.T, self.fc2(self.phi.bias)
        M, m = self.w.weight @ self.g.weight, self.w.weight @ self.g.bias
        return Products(B @ A.T, B @ a0, A @ b0, a0 @ b0, M, m)

    def forward(self, regions: Tensor) -> Tensor:
        """regions (B, R, D) -> (B, R, D)."""
        message = heard(regions, self.products()) + self.w.bias
        return regions + self.bn(message.flatten(0, 1)).view_as(regions)

    @torch.no_grad()
    def folded(self) -> FoldedGraphLayer:
        """The same layer for inference; the products are taken in double precision."""
        layer = copy.deepcopy(self).double()
        products, bn = layer.products(), layer.bn
        scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
        shift = scale * (layer.w.bias - bn.running_mean) + bn.bias
        M, m = products.message, products.message_bias
        products = products._replace(message=scale.unsqueeze(1) * M, message_bias=scale * m)
        dtype = self.w.weight.dtype
        return FoldedGraphLayer(Products(*(x.to(dtype) for x in products)), shift.to(dtype))


class Products(NamedTuple):
    """What a graph layer's linear layers come to, as F.linear takes them."""

    pair: Tensor  # (D, D) B Aᵀ
    pair_bias: Tensor  # (D,) B a₀
    own: Tensor  # (D,) A b₀
    own_bias: Tensor  # () a₀ · b₀
    message: Tensor  # (D, D) M
    message_bias: Tensor  # (D,) m


def heard(regions: Tensor, products: Products) -> Tensor:
    """G (V M + m): what each region hears from the others. (B, R, D) -> (B, R, D)."""
    affinity = F.linear(regions, products.pair, products.pair_bias) @ regions.transpose(1, 2)
    affinity = affinity + (regions @ products.own + products.own_bias).unsqueeze(2)  # (B, R, R)
    message = F.linear(regions, products.message, products.message_bias)
    return affinity / regions.shape[1] @ message


class FoldedGraphLayer(nn.Module):
    """A trained GraphLayer for inference: the products kept, BatchNorm folded into them."""

    def __init__(self, products: Products, shift: Tensor) -> None:
        super().__init__()
        self.products, self.shift = products, shift

    def forward(self, regions: Tensor) -> Tensor:
        """regions (B, R, D) -> (B, R, D)."""
        return regions + heard(regions, self.products) + self.shift


class RegionGraph(nn.Module):
    """A stack of graph layers, one level of the hierarchy each.

    level 0   objects        the projected regions themselves, before any layer
    level 1   relations      each region has heard from every other: pairs of objects
    level 2…  higher levels  relations of relations: groups, and in the end the scene
    """

    def __init__(self, embed_size: int, num_layers: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GraphLayer(embed_size) for _ in range(num_layers))

    def folded(self) -> nn.Sequential:
        """The same stack for inference, a third of the work."""
        return nn.Sequential(*(layer.folded() for layer in self.layers))

    def forward(self, objects: Tensor) -> Tensor:
        """objects (B, R, D) -> regions of the highest level (B, R, D)."""
        regions = objects
        for layer in self.layers:
            regions = layer(regions)
        return regions
