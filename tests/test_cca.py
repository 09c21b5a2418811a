"""The linear floor: canonical correlations, and what it finds."""

import json

import numpy as np
import pytest
import torch
from cca import CCA, Moments, counts, mean_regions, tf_idf
from conftest import write_split
from test_commands import refused, run

from data import PrecompDataset
from vocab import build_from_data


@pytest.fixture
def split(tiny):
    vocab = build_from_data(tiny / "data", "tiny")
    return PrecompDataset(tiny / "data", "tiny", "train", vocab), len(vocab)


def pairs(dataset, n_words, idf):
    x = mean_regions(dataset)[torch.from_numpy(dataset.image_of_caption)]
    return x, tf_idf(counts(dataset, torch.arange(len(dataset)), n_words), idf)


def test_words_are_counted_padding_is_not(split):
    dataset, n_words = split
    found = counts(dataset, torch.tensor([3, 0]), n_words)
    for row, caption in zip(found, (3, 0), strict=True):
        expected = np.bincount(dataset.words(caption), minlength=n_words)
        assert row.tolist() == expected.tolist()


def test_moments_do_not_depend_on_the_blocks(split, monkeypatch):
    dataset, n_words = split
    whole = Moments.of(dataset, n_words)
    monkeypatch.setattr("cca.BLOCK", 7)
    for one, other in zip(whole, Moments.of(dataset, n_words), strict=True):
        torch.testing.assert_close(one, other)
    x, y = pairs(dataset, n_words, whole.idf)
    covariance = torch.cov(torch.cat([x, y], 1).T, correction=0)
    torch.testing.assert_close(whole.xx, covariance[: x.shape[1], : x.shape[1]])
    torch.testing.assert_close(whole.xy, covariance[: x.shape[1], x.shape[1] :])
    torch.testing.assert_close(whole.yy, covariance[x.shape[1] :, x.shape[1] :])


def test_maps_are_uncorrelated_but_for_their_partner(split):
    dataset, n_words = split
    moments = Moments.of(dataset, n_words)
    cca = CCA.of(moments, 1e-9)
    x, y = pairs(dataset, n_words, moments.idf)
    found = torch.corrcoef(torch.cat([(x @ cca.x_map), (y @ cca.y_map)], 1).T)
    k = x.shape[1]
    torch.testing.assert_close(found[:k, :k], torch.eye(k).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(found[:k, k:], cca.correlations.diag(), rtol=0, atol=1e-4)
    assert 0.8 < cca.correlations[0] < 1 and (cca.correlations.diff() <= 0).all()


def test_from_the_command_line(tiny):
    done = run(tiny, "scripts/cca.py", "--data_name", "tiny", "--json", "cca.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tiny / "cca.json").read_text())
    tried = [
        float(line.rpartition(" ")[2]) for line in done.stdout.splitlines() if "shrink" in line
    ]
    assert found["dev_rsum"] == pytest.approx(max(tried), abs=0.05)
    assert found["bootstrap"]["rsum"][0] <= found["rsum"] <= found["bootstrap"]["rsum"][1]
    write_split(tiny / "data/tiny", "test", 10, img_dim=9)
    refused(run(tiny, "scripts/cca.py", "--data_name", "tiny"), "test_ims.npy", "9 numbers")
