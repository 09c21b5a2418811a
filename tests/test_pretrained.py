"""The model that is handed over loads, and scores as it did when it was made."""

import argparse

import torch
from conftest import ROOT

from data import pad
from evaluation import load

MODEL = ROOT / "pretrained/flickr8k/model.pth.tar"
SCORES = [[0.24313, 0.33448], [0.24249, 0.32834]]  # of the sentences with each image


def test_the_pretrained_model_loads_and_scores():
    """With fixed numbers for regions: photographs are not part of the repository."""
    model, settings, vocab = load(MODEL, argparse.Namespace())
    assert (settings["img_dim"], settings["num_regions"]) == (256, 36)
    images = torch.sin(torch.arange(2 * 36 * 256.0)).view(2, 36, 256)
    sentences = ["two dogs run in the snow", "a man with a camera"]
    captions, lengths = pad([torch.tensor(vocab.encode(sentence)) for sentence in sentences])
    with torch.inference_mode():
        sims = model(images, captions, lengths)
    torch.testing.assert_close(sims, torch.tensor(SCORES), rtol=0, atol=1e-4)
