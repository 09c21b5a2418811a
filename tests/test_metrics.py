"""Ranks, recalls and their intervals: by hand, against plain loops, and the official numbers."""

import numpy as np
import pytest
from conftest import GOLDENS

from metrics import (
    RECALLS,
    bootstrap_intervals,
    i2t_ranks,
    image_hits,
    mean_metrics,
    paired_bootstrap,
    qb_norm,
    recalls_of,
    resampled,
    retrieval_metrics,
    rsum_of,
    t2i_ranks,
)

# Four images with two captions each: who is right stands on the diagonal of 1×2 blocks.
OWNERS = np.repeat(np.arange(4), 2)
PERFECT = np.kron(np.eye(4), np.ones((1, 2)))
NAMES = ["r1", "r5", "r10", "medr", "meanr"]


def test_official_numbers():
    with np.load(GOLDENS / "metrics_a.npz", allow_pickle=False) as golden:
        metrics = retrieval_metrics(golden["sims"], np.repeat(np.arange(40), 5))
        for way in ("i2t", "t2i"):
            np.testing.assert_allclose(list(metrics[way].values()), golden[way], rtol=1e-12)
            assert list(metrics[way]) == NAMES


def test_perfect_and_collapsed_scores():
    metrics = retrieval_metrics(PERFECT, OWNERS)
    assert metrics["rsum"] == 600
    assert metrics["i2t"] == metrics["t2i"] == dict(zip(NAMES, (100, 100, 100, 1, 1), strict=True))
    collapsed = retrieval_metrics(np.zeros((4, 8)), OWNERS)  # ties count against the model
    assert collapsed["i2t"]["r1"] == collapsed["t2i"]["r1"] == 0
    assert collapsed["i2t"]["meanr"] == 7  # behind all six wrong captions
    assert collapsed["t2i"]["meanr"] == 4


@pytest.mark.parametrize("seed", range(5))
def test_ranks_are_the_wrong_answers_that_score_at_least_as_high(seed):
    """Counted one by one; coarse scores make many ties, images have different numbers."""
    rng = np.random.default_rng(seed)
    owner = rng.permutation(np.concatenate([np.arange(12), rng.integers(12, size=20)]))
    sims = rng.integers(6, size=(12, 32)).astype(float)
    i2t = []
    for i in range(12):
        best = max(sims[i, owner == i])
        i2t.append(sum(sims[i, c] >= best for c in range(32) if owner[c] != i))
    t2i = [sum(sims[i, c] >= sims[owner[c], c] for i in range(12) if i != owner[c])
           for c in range(32)]  # fmt: skip
    np.testing.assert_array_equal(i2t_ranks(sims, owner), i2t)
    np.testing.assert_array_equal(t2i_ranks(sims, owner), t2i)
    metrics = retrieval_metrics(sims, owner)
    for way, ranks in (("i2t", i2t), ("t2i", t2i)):
        recalls = [100 * sum(rank < k for rank in ranks) / len(ranks) for k in (1, 5, 10)]
        others = [np.floor(np.median(ranks)) + 1, sum(ranks) / len(ranks) + 1]
        assert list(metrics[way].values()) == pytest.approx(recalls + others)
    assert metrics["rsum"] == pytest.approx(sum(metrics[way][name] for way, name in RECALLS))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_no_numbers_are_refused(value):
    sims = PERFECT.copy()
    sims[1, 1] = value
    with pytest.raises(ValueError, match="1 of 32 scores"):
        retrieval_metrics(sims, OWNERS)


def test_counts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="8 columns"):
        retrieval_metrics(PERFECT, OWNERS[:-1])
    for owners in (np.zeros(8, int), OWNERS + 1):
        with pytest.raises(ValueError, match="images 0 … 3"):
            retrieval_metrics(PERFECT, owners)


def test_mean_of_folds_keeps_each_name_with_its_numbers():
    rng = np.random.default_rng(1)
    folds = [retrieval_metrics(rng.normal(size=(4, 8)), OWNERS) for _ in range(5)]
    mean = mean_metrics(folds)
    assert mean["rsum"] == pytest.approx(np.mean([fold["rsum"] for fold in folds]))
    for way in ("i2t", "t2i"):
        for name in NAMES:
            assert mean[way][name] == pytest.approx(np.mean([fold[way][name] for fold in folds]))
    assert mean["rsum"] == pytest.approx(sum(mean[way][name] for way, name in RECALLS))
    assert (mean["n_images"], mean["n_captions"], mean["folds"]) == (20, 40, folds)


# -- bootstrap ------------------------------------------------------------------------------------


def random_scores(n_images, per_image=5):
    """Scores in which the right answer is likely to be high, and the owner of each caption."""
    rng = np.random.default_rng(0)
    owner = np.arange(n_images * per_image) // per_image
    sims = rng.normal(size=(n_images, n_images * per_image))
    sims[owner, np.arange(len(owner))] += rng.random(len(owner)) * 4
    return sims, owner


def test_what_images_add_is_the_recalls():
    sims, owner = random_scores(40)
    other = sims + np.random.default_rng(1).normal(size=sims.shape)  # for text to image
    metrics, hits = retrieval_metrics(sims, owner, other), image_hits(sims, owner, other)
    assert metrics["i2t"] == retrieval_metrics(sims, owner)["i2t"]
    assert metrics["t2i"] == retrieval_metrics(other, owner)["t2i"]
    assert recalls_of(hits.sum(0), 40) == pytest.approx([metrics[w][n] for w, n in RECALLS])
    assert rsum_of([hits]) == pytest.approx(metrics["rsum"])
    # Captions count one each where images have different numbers of them.
    sims, owner = np.array([[3, 2, 1, 0.0], [0, 5, 9, 1]]), np.array([0, 0, 0, 1])
    hits = image_hits(sims, owner)
    assert hits[:, 3].tolist() == [1, 1] and hits[:, 6].tolist() == [3, 1]
    assert recalls_of(hits.sum(0), 2)[3] == retrieval_metrics(sims, owner)["t2i"]["r1"] == 50


def test_the_bootstrap_is_a_loop_over_drawn_images():
    sims, owner = random_scores(12)
    samples = resampled([image_hits(sims, owner)], 50, seed=3)
    rng = np.random.default_rng(3)
    for sample in samples:
        drawn = rng.integers(12, size=12)
        i2t, t2i = i2t_ranks(sims, owner)[drawn], t2i_ranks(sims, owner).reshape(12, 5)[drawn]
        expected = [100 * (ranks < k).mean() for ranks in (i2t, t2i) for k in (1, 5, 10)]
        assert sample == pytest.approx(expected)


def test_intervals_hold_the_estimate_and_are_repeatable():
    sims, owner = random_scores(60)
    metrics, hits = retrieval_metrics(sims, owner), [image_hits(sims, owner)]
    found = bootstrap_intervals(hits, 500)
    for way, name in RECALLS:
        low, high = found[way][name]
        assert low <= metrics[way][name] <= high
    assert found["rsum"][0] < metrics["rsum"] < found["rsum"][1]
    assert bootstrap_intervals(hits, 500) == found != bootstrap_intervals(hits, 500, seed=1)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng, covered = np.random.default_rng(0), 0
    for trial in range(200):
        hits = np.repeat(1.0 * (rng.random(150) < 0.3)[:, None], 7, axis=1)
        hits[:, 6] = 1
        low, high = bootstrap_intervals([hits], 300, seed=trial)["i2t"]["r1"]
        covered += low <= 30 <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_two_models_are_compared_on_the_same_images():
    sims, owner = random_scores(150)
    better = sims.copy()
    better[owner, np.arange(len(owner))] += 0.3
    a, b = ([image_hits(s, owner)] for s in (sims, better))
    found = paired_bootstrap(a, b, 500)
    expected = retrieval_metrics(better, owner)["rsum"] - retrieval_metrics(sims, owner)["rsum"]
    assert found["difference"] == pytest.approx(expected)
    assert 0 < found["interval"][0] < expected < found["interval"][1]
    low, high = bootstrap_intervals(a, 500)["rsum"]
    assert found["interval"][1] - found["interval"][0] < high - low
    assert paired_bootstrap(a, a)["interval"] == [0, 0]


# -- querybank normalisation ----------------------------------------------------------------------


def test_qb_norm_ranks_as_the_inverted_softmax_and_leaves_other_queries_alone():
    """Bogolin et al.: S exp(β s) / Σ_b exp(β bank), where the best answer is a bank query's too."""
    rng = np.random.default_rng(0)
    sims, bank, beta = rng.normal(size=(30, 40)), rng.normal(size=(20, 40)), 3.0
    softmax = np.exp(beta * sims) / np.exp(beta * bank).sum(axis=0)
    best_of_bank = set(bank.argmax(axis=1))
    found = qb_norm(sims, bank, beta)
    changed = [k for k in range(30) if sims[k].argmax() in best_of_bank]
    assert 5 < len(changed) < 25
    for k in range(30):
        expected = softmax[k] if k in changed else sims[k]
        np.testing.assert_array_equal(found[k].argsort(), expected.argsort())
    large = qb_norm(sims + 5000, bank + 5000, beta)  # no overflow
    np.testing.assert_array_equal(large.argsort(), found.argsort())
