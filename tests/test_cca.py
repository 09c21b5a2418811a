"""The linear baseline: its moments, its canonical correlations, and what it finds."""

import json

import cca
import numpy as np
import pytest
import torch
from conftest import write_split
from test_commands import refused
from test_visualize import call

from data import PrecompDataset
from vocab import build_from_data


@pytest.fixture
def split(tiny):
    vocab = build_from_data(tiny / "data", "tiny")
    return PrecompDataset(tiny / "data", "tiny", "train", vocab), len(vocab)


def pairs(dataset, n_words, idf):
    """Every caption with its image: x (C, img_dim), y (C, V)."""
    x = cca.mean_regions(dataset)[torch.from_numpy(dataset.image_of_caption)]
    return x, cca.tf_idf(cca.word_counts(dataset, n_words), idf).to_dense()


def test_words_are_counted(split):
    dataset, n_words = split
    counts = cca.word_counts(dataset, n_words).to_dense()
    for k in range(len(dataset)):
        assert counts[k].tolist() == np.bincount(dataset.words(k), minlength=n_words).tolist()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_moments_are_those_of_the_pairs(split):
    dataset, n_words = split
    moments = cca.Moments.of(dataset, n_words)
    x, y = pairs(dataset, n_words, moments.idf)
    torch.testing.assert_close(y.norm(dim=1), torch.ones(len(y)).double())
    covariance, n = torch.cov(torch.cat([x, y], 1).T, correction=0), x.shape[1]
    torch.testing.assert_close(moments.xx, covariance[:n, :n])
    torch.testing.assert_close(moments.xy, covariance[:n, n:])
    torch.testing.assert_close(moments.yy, covariance[n:, n:])


def test_projections_are_uncorrelated_but_for_their_partner(split):
    dataset, n_words = split
    moments = cca.Moments.of(dataset, n_words)
    fitted = cca.CCA.of(moments, 1e-9)
    x, y = pairs(dataset, n_words, moments.idf)
    found = torch.corrcoef(torch.cat([x @ fitted.x_map, y @ fitted.y_map], 1).T)
    k = x.shape[1]
    torch.testing.assert_close(found[:k, :k], torch.eye(k).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(found[:k, k:], fitted.correlations.diag(), rtol=0, atol=1e-4)
    assert 0.8 < fitted.correlations[0] < 1 and (fitted.correlations.diff() <= 0).all()


def test_the_command_tests_what_is_best_on_dev(tiny, monkeypatch):
    monkeypatch.chdir(tiny)
    done = call(cca.main, "--data_name", "tiny", "--json", "cca.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tiny / "cca.json").read_text())
    lines = [line for line in done.stdout.splitlines() if "shrink" in line]
    tried = [float(line.rpartition(" ")[2]) for line in lines]
    assert found["dev_rsum"] == pytest.approx(max(tried), abs=0.05)
    low, high = found["bootstrap"]["rsum"]
    assert 100 < low <= found["rsum"] <= high
    refused(call(cca.main, "--data_name", "tiny", "--json", "none/cca.json"), "none/cca.json")
    write_split(tiny / "data/tiny", "test", 10, img_dim=9)
    refused(call(cca.main, "--data_name", "tiny"), "test_ims.npy", "img_dim is 9")
