"""What may run on a GPU gives the CPU's numbers there: TEST_DEVICE=cuda pytest -m device."""

import copy
import os

import pytest
import torch
from conftest import load_split, write_split

from baselines import SIMILARITIES, build_model
from data import Batch, pad
from evaluation import evaluate
from train import train_step

DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cpu"))
pytestmark = pytest.mark.device


@pytest.fixture
def batch():
    captions, lengths = pad([torch.randint(4, 40, (n,)) for n in (9, 7, 7, 4, 3, 2)])
    return Batch(torch.randn(6, 36, 20), captions, lengths, torch.arange(6), torch.arange(6))


def small_model(similarity="lhsc", vocab_size=40):
    sizes = {"img_dim": 20, "embed_size": 32, "word_dim": 12, "sim_dim": 16}
    model = build_model(similarity, vocab_size=vocab_size, embed_dropout=0, pool_dropout=0, **sizes)
    for layer in model.image_encoder.graph.layers:  # they start as the identity: make them count
        torch.nn.init.uniform_(layer.bn.weight, 0.5, 1)
    return model.train()


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_scores_and_gradients_are_those_of_double_precision(similarity, batch):
    exact = small_model(similarity).double()
    model = copy.deepcopy(exact).float().to(DEVICE)
    moved = batch.to(DEVICE)
    sims = model(moved.images, moved.captions, moved.lengths)
    expected = exact(batch.images.double(), batch.captions, batch.lengths)
    torch.testing.assert_close(sims.double().cpu(), expected, rtol=0, atol=1e-4)
    sims.square().sum().backward()
    expected.square().sum().backward()
    scale = max(p.grad.abs().max() for p in exact.parameters())
    for found, wanted in zip(model.parameters(), exact.parameters(), strict=True):
        assert (found.grad.cpu() - wanted.grad).abs().max() < 2e-3 * scale


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_training_lowers_the_loss(batch, dtype):
    model = small_model().to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    losses = [
        train_step(model, optimizer, batch.to(DEVICE), max_violation=False, dtype=dtype)
        for _ in range(30)
    ]
    assert losses[-1] < 0.8 * losses[0]


def test_evaluation_gives_the_metrics_of_the_cpu(tmp_path):
    for split in ("train", "dev", "test"):
        write_split(tmp_path / "data/tiny", split, 20, num_regions=36, img_dim=20)
    data, vocab = load_split(tmp_path, "test")
    model = small_model(vocab_size=len(vocab)).eval()
    _, expected = evaluate([model], data, torch.device("cpu"))
    metrics, sims = evaluate([model.to(DEVICE)], data, DEVICE)
    assert abs(sims - expected).max() < 1e-5
    assert metrics["n_images"] == 20
