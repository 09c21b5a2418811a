"""The region graph: from objects to their relations to higher levels of meaning.

Shape letters: B images, R regions, D joint size.
"""

from __future__ import annotations

from torch import Tensor, nn


class GraphLayer(nn.Module):
    """One graph convolution over the fully connected, learned graph of an image's regions.

    a = FC1 θ(V),  b = FC2 φ(V),  G = a bᵀ / R        affinity: no softmax, no box geometry
    V ← V + BN(w(G g(V)))

    θ and φ of the released code are four heads D → D/4 laid side by side again, which is one
    D → D linear layer. BN's scale *and* shift start at 0: each layer starts as the identity.
    """

    def __init__(self, embed_size: int) -> None:
        super().__init__()
        self.theta = nn.Linear(embed_size, embed_size)
        self.phi = nn.Linear(embed_size, embed_size)
        self.fc1 = nn.Linear(embed_size, embed_size)
        self.fc2 = nn.Linear(embed_size, embed_size)
        self.g = nn.Linear(embed_size, embed_size)
        self.w = nn.Linear(embed_size, embed_size)
        self.bn = nn.BatchNorm1d(embed_size)
        nn.init.zeros_(self.bn.weight)

    def affinity(self, regions: Tensor) -> Tensor:
        """regions (B, R, D) -> G (B, R, R): how much region r hears from each other region."""
        a = self.fc1(self.theta(regions))
        b = self.fc2(self.phi(regions))
        return a @ b.transpose(1, 2) / regions.shape[1]

    def forward(self, regions: Tensor) -> Tensor:
        """regions (B, R, D) -> (B, R, D)."""
        message = self.w(self.affinity(regions) @ self.g(regions))
        return regions + self.bn(message.flatten(0, 1)).view_as(regions)


class RegionGraph(nn.Module):
    """A stack of graph layers, one level of the hierarchy each.

    level 0   objects        the projected regions themselves, before any layer
    level 1   relations      each region has heard from every other: pairs of objects
    level 2…  higher levels  relations of relations: groups, and in the end the scene
    """

    def __init__(self, embed_size: int, num_layers: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GraphLayer(embed_size) for _ in range(num_layers))

    def forward(self, objects: Tensor) -> Tensor:
        """objects (B, R, D) -> regions of the highest level (B, R, D)."""
        regions = objects
        for layer in self.layers:
            regions = layer(regions)
        return regions
