"""Parity with the official code: numbers it produced on a small random model.

The model has to give them, and so has the official loop of tests/reference.py, against which the
other tests hold the model.
"""

import json

import numpy as np
import pytest
import torch
from conftest import GOLDENS
from helpers import PARTS, WITHOUT_GRADIENT, grads_of
from reference import OfficialLHSC, hinge_loss

from checkpoint import rename_official
from data import Batch
from model import LHSC, triplet_loss
from train import train_step
from utils import choose_matmul

SIZES = ("vocab_size", "img_dim", "embed_size", "word_dim", "sim_dim")
LOSSES = {LHSC: triplet_loss, OfficialLHSC: hinge_loss}
both = pytest.mark.parametrize("kind", LOSSES)


def states(golden, prefix):
    """golden[prefix/part/name] as three state dicts."""
    return [
        {
            name.removeprefix(f"{prefix}/{part}/"): torch.from_numpy(np.array(value))
            for name, value in golden.items()
            if name.startswith(f"{prefix}/{part}/")
        }
        for part in PARTS
    ]


def renamed(golden, prefix):
    """golden[prefix/part/name] under our names."""
    return rename_official(*states(golden, prefix))


def build(kind, golden):
    """The golden weights without dropout, in our model or in the official loop."""
    opt = json.loads(str(golden["opt"]))
    sizes = {name: opt[name] for name in SIZES}
    if kind is OfficialLHSC:
        model = OfficialLHSC(**sizes, embed_dropout=0.0, pooling_dropout=0.0)
        for part, state in zip(PARTS, states(golden, "init"), strict=True):
            getattr(model, part).load_state_dict(state)
    else:
        model = LHSC(**sizes, padding="official", embed_dropout=0.0, pool_dropout=0.0)
        model.load_state_dict(renamed(golden, "init"))
    return model


@pytest.fixture(params=["default", "onednn"])
def matmul(request, switch):
    """Both libraries that may multiply float32 matrices on a CPU."""
    if choose_matmul(torch.device("cpu"), request.param) != request.param:
        pytest.skip("oneDNN rounds to bfloat16 on this processor")


@pytest.fixture
def batch(golden):
    return tuple(torch.from_numpy(golden[f"in/{n}"]) for n in ("images", "captions", "lengths"))


@pytest.mark.usefixtures("matmul")
@both
def test_eval_embeddings_and_sims(kind, golden, batch):
    images, captions, lengths = batch
    model = build(kind, golden).eval()
    is_word = torch.arange(captions.shape[1]) < lengths[:, None]  # (C, L)
    with torch.no_grad():
        if kind is LHSC:
            region_emb, word_emb = model.image_encoder(images), model.text_encoder(*batch[1:])
        else:
            region_emb, word_emb = model.img_enc(images), model.txt_enc(*batch[1:])[is_word]
        sims = model(images, captions, lengths)
    cap_emb = golden["eval/cap_emb"][is_word]
    # 1e-5 would pass a normalised mean of words in the global pooling (8.6e-6 here).
    np.testing.assert_allclose(region_emb, golden["eval/img_emb"], rtol=0, atol=2e-6)
    np.testing.assert_allclose(word_emb, cap_emb, rtol=0, atol=2e-6)
    np.testing.assert_allclose(sims, golden["eval/sims"], rtol=0, atol=2e-6)


# Adam turns the rounding of WITHOUT_GRADIENT into steps of ±lr; the running mean of a BatchNorm
# moves along.
MOVED_ALONG = ("bn.running_mean",)


@pytest.mark.usefixtures("matmul")
@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_loss_and_every_gradient_of_a_step(kind, golden, batch, dtype):
    """In double precision what is left is the rounding of the official run itself."""
    images, captions, lengths = batch
    model = build(kind, golden).train().to(dtype)
    sims = model(images.to(dtype), captions, lengths)
    loss = LOSSES[kind](sims, margin=0.2)
    loss.backward()
    grads, expected = grads_of(model), renamed(golden, "train1/grad")
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
    close = np.testing.assert_allclose
    close(sims.detach(), golden["train1/sims"], rtol=0, atol=1e-5)
    close(loss.item(), golden["train1/loss"], rtol=1e-5)
    close(norm, golden["train1/grad_norm"], rtol=2e-4)
    assert set(expected) == set(grads)
    tolerance, zero = (1e-3, 2e-3) if dtype == torch.float32 else (3e-4, 1e-11)
    for name, grad in grads.items():
        if name.endswith(WITHOUT_GRADIENT):
            assert grad.abs().max() < zero, name  # the norm of all gradients is 52.8
        else:
            error = (grad - expected[name]).abs().max()
            assert error < tolerance * expected[name].abs().max(), name


def test_training_follows_the_official_code_for_60_steps():
    """Each loss and the last weights, up to rounding; all negatives, then the hardest; lr falls."""
    with np.load(GOLDENS / "trajectory_a.npz", allow_pickle=False) as file:
        golden = dict(file)
    opt = json.loads(str(golden["opt"]))
    model = build(LHSC, golden).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=opt["lr"])
    images, captions, lengths = (
        torch.from_numpy(golden[name]) for name in ("images", "captions", "lengths")
    )
    losses = []
    for step, order in enumerate(torch.from_numpy(golden["order"])):
        if step == opt["lr_times_0_1_from_step"]:
            optimizer.param_groups[0]["lr"] *= 0.1
        image_index = order // opt["captions_per_image"]
        longest = int(lengths[order].max())
        words = captions[order, :longest]
        batch = Batch(images[image_index], words, lengths[order], image_index, order)
        hardest = step >= opt["all_negatives_steps"]
        losses.append(train_step(model.train(), optimizer, batch, opt["margin"], hardest))
    np.testing.assert_allclose(losses, golden["losses"], rtol=1e-7)
    state = model.state_dict()
    for name, expected in renamed(golden, "final").items():
        if not name.endswith(WITHOUT_GRADIENT):
            atol = 3e-2 if name.endswith(MOVED_ALONG) else 1e-7
            np.testing.assert_allclose(state[name], expected, rtol=0, atol=atol, err_msg=name)
