"""Run by test_distributed.py, alone or under torchrun: some training steps on the same data.

python steps.py OUT.pt float64
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import distributed
from data import Batch
from model import LHSC
from train import train_step

SIZES = (8, 7, 5)  # of the batches; 7 and 5 do not divide by 2 or 3
VARIANTS = {
    "lhsc": {},
    "attended": {"global_image": "attended"},
    "local": {"alignment": "local"},
    "scan": {"similarity": "scan"},
    "vse": {"similarity": "vse"},
}


def batch(size: int, dtype: torch.dtype) -> Batch:
    """A global batch, longest caption first."""
    generator = torch.Generator().manual_seed(size)
    lengths = torch.randint(2, 9, (size,), generator=generator).sort(descending=True).values
    captions = torch.zeros(size, int(lengths.max()), dtype=torch.long)
    for row, length in enumerate(lengths):
        captions[row, :length] = torch.randint(4, 30, (int(length),), generator=generator)
    images = torch.randn(size, 6, 10, generator=generator).to(dtype)
    # The second batch has images that stand in it twice.
    image_index = torch.arange(size) // (2 if size == 7 else 1)
    return Batch(images, captions, lengths, image_index, torch.arange(size))


def main(out: str, dtype: torch.dtype) -> None:
    distributed.start(torch.device("cpu"))
    results = {name: steps(dtype, **variant) for name, variant in VARIANTS.items()}
    if dtype == torch.float32:
        results["bf16"] = steps(dtype, mixed=True)
    if distributed.is_first():
        torch.save(results, out)


def steps(dtype: torch.dtype, mixed: bool = False, **variant: str) -> dict:
    torch.manual_seed(0)
    model = LHSC(
        30, 10, 6, embed_size=12, word_dim=8, sim_dim=6, graph_layers=2, text_layers=2,
        embed_dropout=0, pool_dropout=0, **variant,
    ).to(dtype)  # fmt: skip
    if mixed:
        model.mixed_precision()
    with torch.no_grad():  # the graph layers start as the identity: make them count
        for layer in model.image_encoder.graph.layers:
            layer.bn.weight.uniform_(0.5, 1)
    # A bias before a BatchNorm has a gradient of rounding alone, which Adam's usual eps would turn
    # into whole steps.
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-3)
    result = {"loss": [], "grad": []}
    model.train()
    for k, size in enumerate(SIZES):
        whole = batch(size, dtype)
        mine = distributed.share(size)
        part = Batch(*(x[mine] for x in whole))
        longest = int(part.lengths.max())
        part = part._replace(captions=part.captions[:, :longest])
        same_image = "ignored" if k == 1 else "negative"
        loss = train_step(model, optimizer, part, max_violation=k > 0, same_image=same_image)
        result["loss"].append(loss)
        result["grad"].append({n: p.grad.clone() for n, p in model.named_parameters()})
    return result | {"state": model.state_dict()}


if __name__ == "__main__":
    with distributed.together():
        main(sys.argv[1], getattr(torch, sys.argv[2]))
