"""Ranks and recalls: hand-checkable cases, ties, NaN, folds, the released numbers."""

import numpy as np
import pytest
from conftest import GOLDENS

from metrics import i2t_ranks, mean_metrics, retrieval_metrics, t2i_ranks

# Four images with two captions each: who is right stands on the diagonal of 1×2 blocks.
OWNERS = np.repeat(np.arange(4), 2)
PERFECT = np.kron(np.eye(4), np.ones((1, 2)))


def test_released_numbers():
    with np.load(GOLDENS / "metrics_a.npz", allow_pickle=False) as golden:
        metrics = retrieval_metrics(golden["sims"], np.repeat(np.arange(40), 5))
        for way in ("i2t", "t2i"):
            np.testing.assert_allclose(list(metrics[way].values()), golden[way], rtol=1e-12)
            assert list(metrics[way]) == ["r1", "r5", "r10", "medr", "meanr"]


def test_perfect_scores():
    metrics = retrieval_metrics(PERFECT, OWNERS)
    assert metrics["rsum"] == 600
    assert metrics["i2t"] == metrics["t2i"] == {
        "r1": 100, "r5": 100, "r10": 100, "medr": 1, "meanr": 1
    }  # fmt: skip


def test_one_wrong_answer_in_front():
    sims = PERFECT.copy()
    sims[0, 2] = 2  # caption 2 (of image 1) looks best to image 0, and prefers image 0
    np.testing.assert_array_equal(i2t_ranks(sims, OWNERS), [1, 0, 0, 0])
    np.testing.assert_array_equal(t2i_ranks(sims, OWNERS), [0, 0, 1, 0, 0, 0, 0, 0])


def test_the_best_of_an_images_captions_counts():
    sims = PERFECT.copy()
    sims[0, 0] = -1  # caption 1 still is right
    assert i2t_ranks(sims, OWNERS)[0] == 0
    assert t2i_ranks(sims, OWNERS)[0] == 3


def test_ties_count_against_the_model():
    metrics = retrieval_metrics(np.zeros((4, 8)), OWNERS)
    assert metrics["i2t"]["r1"] == metrics["t2i"]["r1"] == 0
    assert metrics["i2t"]["meanr"] == 7  # behind all six wrong captions
    assert metrics["t2i"]["meanr"] == 4


def test_rank_is_what_sorting_gives_without_ties():
    sims = np.random.default_rng(0).permutation(12 * 36).reshape(12, 36).astype(float)
    owners = np.repeat(np.arange(12), 3)
    order = np.argsort(-sims, axis=1)
    expected = [min(np.flatnonzero(owners[order[i]] == i)) for i in range(12)]
    np.testing.assert_array_equal(i2t_ranks(sims, owners), expected)
    order = np.argsort(-sims, axis=0)
    expected = [int(np.flatnonzero(order[:, c] == owners[c])[0]) for c in range(36)]
    np.testing.assert_array_equal(t2i_ranks(sims, owners), expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_no_numbers_are_refused(value):
    sims = PERFECT.copy()
    sims[1, 1] = value
    with pytest.raises(ValueError, match="1 of 32 scores"):
        retrieval_metrics(sims, OWNERS)


def test_counts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="8 columns"):
        retrieval_metrics(PERFECT, OWNERS[:-1])
    with pytest.raises(ValueError, match="images 0 … 3"):
        retrieval_metrics(PERFECT, np.zeros(8, int))


def test_mean_of_folds_keeps_each_name_with_its_numbers():
    rng = np.random.default_rng(1)
    folds = [retrieval_metrics(rng.normal(size=(4, 8)), OWNERS) for _ in range(5)]
    mean = mean_metrics(folds)
    assert mean["rsum"] == pytest.approx(np.mean([fold["rsum"] for fold in folds]))
    for way in ("i2t", "t2i"):
        for name in ("r1", "r5", "r10", "medr", "meanr"):
            assert mean[way][name] == pytest.approx(np.mean([fold[way][name] for fold in folds]))
    recalls = sum(mean[way][name] for way in ("i2t", "t2i") for name in ("r1", "r5", "r10"))
    assert mean["rsum"] == pytest.approx(recalls)
    assert (mean["n_images"], mean["n_captions"]) == (20, 40)
