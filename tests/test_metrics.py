"""Ranks and recalls: hand-checkable cases, ties, NaN, folds, the released numbers."""

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
    recalls_of,
    resampled,
    retrieval_metrics,
    rsum_of,
    t2i_ranks,
)

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


# -- bootstrap ------------------------------------------------------------------------------------


def random_scores(n_images, seed=0, per_image=5, strength=1.0):
    """Scores in which the right answer is likely to be high, and the owner of each caption."""
    rng = np.random.default_rng(seed)
    owner = np.arange(n_images * per_image) // per_image
    sims = rng.normal(size=(n_images, n_images * per_image))
    sims[owner, np.arange(len(owner))] += strength * rng.random(len(owner)) * 4
    return sims, owner


def test_what_images_add_is_the_recalls():
    sims, owner = random_scores(40)
    metrics = retrieval_metrics(sims, owner)
    hits = image_hits(sims, owner)
    assert recalls_of(hits.sum(0), 40) == pytest.approx([metrics[w][n] for w, n in RECALLS])
    assert rsum_of([hits]) == pytest.approx(metrics["rsum"])


def test_captions_count_one_each_where_images_have_different_numbers():
    sims = np.array([[3, 2, 1, 0.0], [0, 5, 9, 1]])
    owner = np.array([0, 0, 0, 1])
    hits = image_hits(sims, owner)
    assert hits[:, 3].tolist() == [1, 1] and hits[:, 6].tolist() == [3, 1]
    assert recalls_of(hits.sum(0), 2)[3] == retrieval_metrics(sims, owner)["t2i"]["r1"] == 50


def test_the_bootstrap_is_a_loop_over_drawn_images():
    sims, owner = random_scores(12)
    hits = image_hits(sims, owner)
    samples = resampled([hits], 50, seed=3)
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
    assert bootstrap_intervals(hits, 500) == found
    assert bootstrap_intervals(hits, 500, seed=1) != found


def test_a_perfect_model_has_no_doubt():
    owner = np.arange(50) // 5
    hits = image_hits((np.arange(10)[:, None] == owner).astype(float), owner)
    assert bootstrap_intervals([hits], 100)["rsum"] == [600, 600]


def test_four_times_the_images_halve_the_interval():
    widths = []
    for n in (100, 400):
        sims, owner = random_scores(n)
        hits = image_hits(sims, owner)
        hits[:, 0] = np.arange(n) % 2  # the same recall at both sizes
        low, high = bootstrap_intervals([hits], 2000)["i2t"]["r1"]
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.1)


def test_captions_of_an_image_move_together():
    """Five captions that always hit or miss together say no more than one."""
    hit = np.random.default_rng(0).random(200) < 0.4
    widths = []
    for per_image in (1, 5):
        owner = np.arange(200 * per_image) // per_image
        right = np.where(hit[owner], 1.0, -1.0)
        sims = np.zeros((200, len(owner)))
        sims[owner, np.arange(len(owner))] = right
        low, high = bootstrap_intervals([image_hits(sims, owner)], 1000)["t2i"]["r1"]
        widths.append(high - low)
    assert widths[0] == pytest.approx(widths[1])


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
    alone = [bootstrap_intervals(x, 500)["rsum"] for x in (a, b)]
    assert found["interval"][1] - found["interval"][0] < alone[0][1] - alone[0][0]
    assert paired_bootstrap(a, a)["interval"] == [0, 0]
    with pytest.raises(ValueError, match="not the same"):
        paired_bootstrap(a, [b[0][:100]])


@pytest.mark.parametrize(
    "folds, n",
    [([np.ones((3, 7))], 0), ([], 9), ([np.ones((1, 7))], 9), ([np.full((3, 7), np.nan)], 9)],
)
def test_nonsense_is_refused(folds, n):
    with pytest.raises(ValueError):
        resampled(folds, n, 0)
