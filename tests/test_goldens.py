"""Parity with the released code: numbers it produced on a small random model."""

import json

import numpy as np
import pytest
import torch
from conftest import GOLDENS

from checkpoint import load_checkpoint, model_from, rename_released
from model import LHSC, triplet_loss

PARTS = ("img_enc", "txt_enc", "sim_enc")


def renamed(golden, prefix):
    """golden[prefix/part/name] under our names."""
    states = []
    for part in PARTS:
        start = f"{prefix}/{part}/"
        found = {k.removeprefix(start): v for k, v in golden.items() if k.startswith(start)}
        states.append({k: torch.from_numpy(np.array(v)) for k, v in found.items()})
    return rename_released(*states)


def build(golden, **dropouts):
    opt = json.loads(str(golden["opt"]))
    names = ("vocab_size", "img_dim", "embed_size", "word_dim", "sim_dim", "num_layers", "bi_gru")
    sizes = {name: opt[name] for name in names}
    model = LHSC(**sizes, padding="released", **dropouts)
    model.load_state_dict(renamed(golden, "init"))
    return model


@pytest.fixture
def batch(golden):
    return tuple(torch.from_numpy(golden[f"in/{n}"]) for n in ("images", "captions", "lengths"))


def train(golden, batch, dtype, n_steps):
    """Adam steps as the released loop takes them; the model after them and what each step gave."""
    images, captions, lengths = batch
    model = build(golden, embed_dropout=0.0, pool_dropout=0.0).train().to(dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
    steps = []
    for _ in range(n_steps):
        sims = model(images.to(dtype), captions, lengths)
        loss = triplet_loss(sims, margin=0.2)
        optimizer.zero_grad()
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        steps.append({"sims": sims.detach(), "loss": loss.item(), "norm": norm, "grads": grads})
    return model, steps


def test_eval_embeddings_and_sims(golden, batch):
    images, captions, lengths = batch
    model = build(golden).eval()
    with torch.no_grad():
        region_emb = model.image_encoder(images)
        word_emb = model.text_encoder(captions, lengths)
        sims = model(images, captions, lengths)
    expected = np.concatenate([e[:n] for e, n in zip(golden["eval/cap_emb"], lengths, strict=True)])
    np.testing.assert_allclose(region_emb, golden["eval/img_emb"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(word_emb, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(sims, golden["eval/sims"], rtol=0, atol=1e-5)


# Biases in front of a BatchNorm (their mean is subtracted again) or of a softmax: no gradient but
# rounding, which Adam turns into steps of ±lr, which move the BatchNorm's running mean along.
WITHOUT_GRADIENT = (".w.bias", "gate_fc.bias", "common.bias", "region_pooling.globl.bias")
MOVED_ALONG = ("bn.running_mean",)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_loss_and_every_gradient_of_a_step(golden, batch, dtype):
    """In double precision what is left is the rounding of the released run itself."""
    model, (step,) = train(golden, batch, dtype, n_steps=1)
    np.testing.assert_allclose(step["sims"], golden["train1/sims"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(step["loss"], golden["train1/loss"], rtol=1e-5)
    np.testing.assert_allclose(step["norm"], golden["train1/grad_norm"], rtol=2e-4)
    expected = renamed(golden, "train1/grad")
    assert set(expected) == {name for name, _ in model.named_parameters()}
    tolerance, zero = (1e-3, 2e-3) if dtype == torch.float32 else (3e-4, 1e-11)
    for name, grad in step["grads"].items():
        if name.endswith(WITHOUT_GRADIENT):
            assert grad.abs().max() < zero, name  # the norm of all gradients is 52.8
        else:
            error = (grad - expected[name]).abs().max()
            assert error < tolerance * expected[name].abs().max(), name


def test_two_adam_steps(golden, batch):
    """Second step, then all parameters and buffers.

    In double precision: Adam's first step is lr times the gradient's sign, so an element whose
    gradient is near zero may by single precision's rounding go the other way.
    """
    model, steps = train(golden, batch, torch.float64, n_steps=2)
    np.testing.assert_allclose(steps[1]["sims"], golden["train2/sims"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(steps[1]["loss"], golden["train2/loss"], rtol=1e-5)
    np.testing.assert_allclose(steps[1]["norm"], golden["train2/grad_norm"], rtol=2e-4)
    expected = renamed(golden, "after")
    state = model.state_dict()
    assert set(expected) == set(state)
    for name, tensor in state.items():
        error = (tensor - expected[name]).abs().double()
        if name.endswith(WITHOUT_GRADIENT):
            assert error.max() <= 4.1 * 2e-4, name  # two steps of ±lr each way
        elif name.endswith(MOVED_ALONG):
            assert error.max() <= 1e-4, name
        else:
            scale = expected[name].abs().max().clamp_min(1)
            assert error.max() <= 1e-4 * scale, name
            assert error.square().mean().sqrt() <= 1e-5 * scale, name


def test_released_checkpoint_gives_the_released_scores(golden, batch):
    checkpoint = load_checkpoint(GOLDENS / "legacy_py2_a.pth.tar")
    model = model_from(checkpoint)
    assert checkpoint["released"]
    assert model.text_encoder.padding == "released"
    with torch.no_grad():
        sims = model(*batch)
    np.testing.assert_allclose(sims, golden["eval/sims"], rtol=0, atol=1e-5)
