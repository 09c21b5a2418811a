"""Retrieval metrics: pure functions of a score matrix and the image of each caption.

A query's rank is the number of wrong answers that score at least as high as its best correct one.
So ties count against the model, and a collapsed model cannot look good.
"""

from __future__ import annotations

import numpy as np


def i2t_ranks(sims: np.ndarray, image_of_caption: np.ndarray) -> np.ndarray:
    """Images as queries: the rank, from 0, of each image's best caption.

    sims (n_images, n_captions), image_of_caption (n_captions,) -> (n_images,).
    """
    right = np.arange(len(sims))[:, None] == image_of_caption
    best = np.where(right, sims, -np.inf).max(axis=1, keepdims=True)
    return ((sims >= best) & ~right).sum(axis=1)


def t2i_ranks(sims: np.ndarray, image_of_caption: np.ndarray) -> np.ndarray:
    """Captions as queries: the rank, from 0, of each caption's image.

    sims (n_images, n_captions), image_of_caption (n_captions,) -> (n_captions,).
    """
    right = sims[image_of_caption, np.arange(sims.shape[1])]
    return (sims >= right).sum(axis=0) - 1


def recalls(ranks: np.ndarray) -> dict[str, float]:
    """R@1, R@5, R@10 in percent; median (rounded down) and mean rank, counted from 1."""
    return {
        "r1": 100.0 * float((ranks < 1).mean()),
        "r5": 100.0 * float((ranks < 5).mean()),
        "r10": 100.0 * float((ranks < 10).mean()),
        "medr": float(np.floor(np.median(ranks)) + 1),
        "meanr": float(ranks.mean() + 1),
    }


def qb_norm(sims: np.ndarray, bank: np.ndarray, beta: float) -> np.ndarray:
    """Querybank normalisation: subtract from each score the hubness of its answer.

    Some answers score high for all queries. Queries of the training set (the bank) find them:

    hubness_g = log(Σ_b exp(β bank_bg)) / β,   sims_qg ← sims_qg − hubness_g

    This ranks like the inverted softmax. Scores change only for queries whose best answer is also
    the best answer of a bank query ("dynamic"). Bogolin et al., "Cross Modal Retrieval with
    Querybank Normalisation", CVPR 2022.

    sims (n_queries, n_answers), bank (n_bank_queries, n_answers) -> (n_queries, n_answers).
    """
    peak = bank.max(axis=0)
    hubness = peak + np.log(np.exp(beta * (bank - peak)).sum(axis=0)) / beta  # (n_answers,)
    changed = np.isin(sims.argmax(axis=1), bank.argmax(axis=1))  # (n_queries,)
    return sims - np.where(changed[:, None], hubness, 0)


def qb_norm_both_ways(
    sims: np.ndarray, of_images: np.ndarray, of_captions: np.ndarray, beta: float
) -> tuple[np.ndarray, np.ndarray]:
    """qb_norm of sims (n_images, n_captions) for image to text, and for text to image.

    of_images (n_bank_images, n_captions), of_captions (n_images, n_bank_captions): bank scores.
    """
    return qb_norm(sims, of_images, beta), qb_norm(sims.T, of_captions.T, beta).T


def retrieval_metrics(
    sims: np.ndarray, image_of_caption: np.ndarray, t2i_sims: np.ndarray | None = None
) -> dict:
    """The metrics of both directions, and rsum.

    sims (n_images, n_captions), image_of_caption (n_captions,) ->
    {"i2t": {r1, r5, r10, medr, meanr}, "t2i": {…}, "rsum", "n_images", "n_captions"}.
    t2i_sims: scores for text to image, if they differ (qb_norm).

    Raises ValueError for scores that are not finite, counts that do not match, or an image without
    a caption.
    """
    image_of_caption = np.asarray(image_of_caption)
    n_images, n_captions = sims.shape
    if image_of_caption.shape != (n_captions,):
        raise ValueError(f"{n_captions} columns of scores, {image_of_caption.shape} captions")
    if not np.array_equal(np.unique(image_of_caption), np.arange(n_images)):
        raise ValueError(f"the captions should belong to images 0 … {n_images - 1}, each to one")
    if not np.isfinite(sims).all():
        bad = int((~np.isfinite(sims)).sum())
        raise ValueError(f"{bad} of {sims.size} scores are NaN or infinite: nothing to rank")
    i2t = recalls(i2t_ranks(sims, image_of_caption))
    t2i = recalls(t2i_ranks(sims if t2i_sims is None else t2i_sims, image_of_caption))
    rsum = sum(direction[r] for direction in (i2t, t2i) for r in ("r1", "r5", "r10"))
    return {"i2t": i2t, "t2i": t2i, "rsum": rsum, "n_images": n_images, "n_captions": n_captions}


def mean_metrics(folds: list[dict]) -> dict:
    """The mean over folds, under the same names, and the folds themselves."""
    mean = {
        way: {name: float(np.mean([fold[way][name] for fold in folds])) for name in folds[0][way]}
        for way in ("i2t", "t2i")
    }
    return mean | {
        "rsum": float(np.mean([fold["rsum"] for fold in folds])),
        "n_images": sum(fold["n_images"] for fold in folds),
        "n_captions": sum(fold["n_captions"] for fold in folds),
        "folds": folds,
    }


# -- confidence intervals -------------------------------------------------------------------------

RECALLS = [(way, name) for way in ("i2t", "t2i") for name in ("r1", "r5", "r10")]


def image_hits(
    sims: np.ndarray, image_of_caption: np.ndarray, t2i_sims: np.ndarray | None = None
) -> np.ndarray:
    """What each image adds to the six recalls: (n_images, 7). Arguments as in retrieval_metrics.

    In the order of RECALLS: whether the image finds one of its captions, and how many of its
    captions find it. The last column is the number of its captions.
    """
    i2t = i2t_ranks(sims, image_of_caption)
    t2i = t2i_ranks(sims if t2i_sims is None else t2i_sims, image_of_caption)
    columns = [i2t < k for k in (1, 5, 10)]
    columns += [np.bincount(image_of_caption, t2i < k, len(sims)) for k in (1, 5, 10)]
    columns.append(np.bincount(image_of_caption, minlength=len(sims)))
    return np.stack(columns, axis=1).astype(float)


def recalls_of(sums: np.ndarray, n: int) -> np.ndarray:
    """image_hits, summed over n images (7,) -> the six recalls in percent."""
    return 100.0 * np.concatenate([sums[:3] / n, sums[3:6] / sums[6]])


def resampled(folds: list[np.ndarray], n_samples: int, seed: int) -> np.ndarray:
    """The six recalls of bootstrap samples: (n_samples, 6), the mean over folds.

    folds: the image_hits of each fold (of one, if there are no folds). A sample draws n of the n
    images with replacement, each with its captions. The gallery is not resampled, so ranks do not
    change, and both directions share the draw. So these numbers do not show how much another
    gallery, or another training seed, would change the recalls.
    """
    rng = np.random.default_rng(seed)
    means = np.zeros((n_samples, len(RECALLS)))
    for hits in folds:
        n = len(hits)
        for sample in range(n_samples):
            counts = np.bincount(rng.integers(n, size=n), minlength=n)
            means[sample] += recalls_of(counts @ hits, n)
    return means / len(folds)


def interval(samples: np.ndarray) -> list[float]:
    """The middle 95 % of some numbers."""
    return np.percentile(samples, (2.5, 97.5)).tolist()


def bootstrap_intervals(folds: list[np.ndarray], n_samples: int = 1000, seed: int = 0) -> dict:
    """95 % percentile intervals of recalls and rsum: {"i2t": {"r1": [low, high], …}, …, "rsum"}.

    folds: as in `resampled`. Time: n_samples × n_images.
    """
    samples = resampled(folds, n_samples, seed)
    result: dict = {"samples": n_samples, "i2t": {}, "t2i": {}}
    for column, (way, name) in enumerate(RECALLS):
        result[way][name] = interval(samples[:, column])
    return result | {"rsum": interval(samples.sum(axis=1))}


def paired_bootstrap(
    a: list[np.ndarray], b: list[np.ndarray], n_samples: int = 1000, seed: int = 0
) -> dict:
    """How much higher b's rsum is than a's: {"samples", "difference", "interval"}.

    a, b: folds as in `resampled`, of two models on the same test set, in the same order. Each
    sample draws the same images for both.
    """
    samples = (resampled(b, n_samples, seed) - resampled(a, n_samples, seed)).sum(axis=1)
    rsum_a, rsum_b = (rsum_of(folds) for folds in (a, b))
    return {"samples": n_samples, "difference": rsum_b - rsum_a, "interval": interval(samples)}


def rsum_of(folds: list[np.ndarray]) -> float:
    """The rsum from the image_hits of each fold: the mean over folds."""
    return float(np.mean([recalls_of(hits.sum(axis=0), len(hits)).sum() for hits in folds]))
