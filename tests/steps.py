"""What several processes do together; run by test_distributed.py alone and under torchrun.

    python steps.py OUT [VICTIM]

in the folder of a trained model: OUT gets steps.pt, some training steps of each model, and the
metrics and scores of some evaluations. At the end rank VICTIM kills itself while the others wait.
"""

import os
import signal
import sys
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))
import distributed
import evaluation
from baselines import SIMILARITIES, build_model
from data import Batch, pad
from train import train_step
from utils import one_line

SIZES = (8, 7, 5)  # of the batches; 7 and 5 do not divide by 2 or 3
EVALUATIONS = {
    "test": [],
    "fold5": ["--fold5"],
    "dev": ["--split", "dev"],
    # With the official padding an embedding depends on its batch of 100: shares keep those.
    "official": ["--model_path", str(TESTS / "goldens/legacy_py2_a.pth.tar"), "--data_path", "data",
                 "--vocab_path", "vocab"],
}  # fmt: skip


def batch(size: int, dtype: torch.dtype) -> Batch:
    """A global batch, longest caption first."""
    generator = torch.Generator().manual_seed(size)
    lengths = torch.randint(2, 9, (size,), generator=generator).sort(descending=True).values
    captions, _ = pad([torch.randint(4, 30, (int(n),), generator=generator) for n in lengths])
    images = torch.randn(size, 6, 10, generator=generator).to(dtype)
    return Batch(images, captions, lengths, torch.arange(size) // 2, torch.arange(size))


def steps(similarity: str, dtype: torch.dtype, mixed: torch.dtype | None = None) -> dict:
    """Losses and gradients of three steps, each with another loss; the weights."""
    torch.manual_seed(0)
    model = build_model(
        similarity, vocab_size=30, img_dim=10, num_regions=6, embed_size=12, word_dim=8, sim_dim=6,
        graph_layers=2, text_layers=2, embed_dropout=0, pool_dropout=0,
    ).to(dtype).train()  # fmt: skip
    with torch.no_grad():  # the graph layers start as the identity: make them count
        for layer in model.image_encoder.graph.layers:
            layer.bn.weight.uniform_(0.5, 1)
    # A bias before a BatchNorm has a gradient of rounding alone, which Adam's usual eps would turn
    # into whole steps.
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-3)
    result = {"loss": [], "grad": []}
    for k, size in enumerate(SIZES):
        part = Batch(*(x[distributed.rank_slice(size)] for x in batch(size, dtype)))
        part = part._replace(captions=part.captions[:, : int(part.lengths.max())])
        options = {"max_violation": k > 0, "contrastive": k > 1, "dtype": mixed}
        loss = train_step(model, optimizer, part, **options)
        result["loss"].append(loss)
        result["grad"].append({n: p.grad.clone() for n, p in model.named_parameters()})
    return result | {"state": model.state_dict()}


@one_line
def main() -> None:
    out, *victim = sys.argv[1:]
    with distributed.process_group(torch.device("cpu")) as device:
        results = {name: steps(name, torch.float64) for name in SIMILARITIES}
        results["bf16"] = steps("lhsc", torch.float32, torch.bfloat16)
        if distributed.is_main_process():
            torch.save(results, f"{out}/steps.pt")
        for name, options in EVALUATIONS.items():
            files = ["--save_sims", f"{out}/{name}.npy", "--save_metrics", f"{out}/{name}.json"]
            evaluation.run(evaluation.options().parse_args([*options, *files]), device)
        if victim == [str(distributed.rank())]:
            os.kill(os.getpid(), signal.SIGKILL)
        if victim:
            distributed.all_gather_object(None)


if __name__ == "__main__":
    main()
