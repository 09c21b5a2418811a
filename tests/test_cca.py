"""The linear baseline: its covariances, its canonical correlations, and what it finds."""

import json

import cca
import pytest
import torch
from conftest import call, succeeded

from data import PrecompDataset
from vocab import build_from_data


@pytest.fixture
def fitted(tiny, monkeypatch):
    """A CCA, and the pairs it is of: x (C, img_dim), y (C, V)."""
    monkeypatch.setattr(cca, "BLOCK", 7)  # several, the last a smaller one
    vocab = build_from_data(tiny / "data", "tiny")
    dataset = PrecompDataset(tiny / "data", "tiny", "train", vocab)
    fitted = cca.CCA(dataset, len(vocab))
    x = torch.stack([dataset[k][0].mean(0).double() for k in range(len(dataset))])
    counts = [dataset.words(k).bincount(minlength=len(vocab)) for k in range(len(dataset))]
    y = torch.stack(counts).double().log1p() * fitted.idf
    return fitted, x, y / y.norm(dim=1, keepdim=True)


def test_covariances_are_those_of_the_pairs(fitted):
    fitted, x, y = fitted
    covariance, n = torch.cov(torch.cat([x, y], 1).T, correction=0), x.shape[1]
    torch.testing.assert_close(fitted.xx, covariance[:n, :n], rtol=0, atol=1e-7)
    torch.testing.assert_close(fitted.xy, covariance[:n, n:], rtol=0, atol=1e-7)
    torch.testing.assert_close(fitted.yy, covariance[n:, n:], rtol=0, atol=1e-7)


def test_projections_are_uncorrelated_but_for_their_partner(fitted):
    fitted, x, y = fitted
    x_map, y_map = fitted.maps(1e-9)
    found, k = torch.corrcoef(torch.cat([x @ x_map, y @ y_map], 1).T), x.shape[1]
    torch.testing.assert_close(found[:k, :k], torch.eye(k).double(), rtol=0, atol=1e-4)
    correlations = found[:k, k:].diagonal()
    torch.testing.assert_close(found[:k, k:], correlations.diag(), rtol=0, atol=1e-4)
    assert 0.8 < correlations[0] < 1 and (correlations.diff() <= 0).all()


def test_the_command_tests_what_is_best_on_dev(tiny):
    lines = succeeded(call(tiny, cca.main, "--data_name", "tiny", "--json", "cca.json"))
    found = json.loads((tiny / "cca.json").read_text())
    tried = [float(line.split()[-1]) for line in lines.splitlines() if "shrink" in line]
    assert found["dev_rsum"] == pytest.approx(max(tried), abs=0.05)
    low, high = found["bootstrap"]["rsum"]
    assert 100 < low <= found["rsum"] <= high
