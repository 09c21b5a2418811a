"""Retrieval metrics: pure functions of a score matrix and the image of each caption.

A query's rank counts the wrong answers that score at least as high as its best right one, so ties
count against the model and a collapsed one cannot look good.

Intervals come from a bootstrap over images. Every query is ranked once, against the whole gallery;
then images are drawn with replacement, as many as there are, and the captions of an image are drawn
with it. One draw makes all recalls of both directions, and so rsum: an image's captions share what
is hard about it, and what is hard for its captions often is for the image. The gallery stays whole:
a drawn image that stood in it twice would be its own wrong answer. So an interval says how far a
number may move with other queries of the same kind, asked of this gallery; it does not say what
another gallery, another size of gallery or another training seed would do.
"""

from __future__ import annotations

import numpy as np

RECALLS = {"r1": 1, "r5": 5, "r10": 10}
LEVEL = 95  # percent of the bootstrap samples that lie in an interval
AT_ONCE = 2**21  # images drawn at once, of all samples: bounds the memory of a bootstrap


def i2t_ranks(sims: np.ndarray, image_of_caption: np.ndarray) -> np.ndarray:
    """Images as queries: the rank, from 0, of the best of each image's captions.

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


def retrieval_metrics(sims: np.ndarray, image_of_caption: np.ndarray) -> dict:
    """Both directions and their sum.

    sims (n_images, n_captions), image_of_caption (n_captions,) ->
    {"i2t": {r1, r5, r10, medr, meanr}, "t2i": {…}, "rsum", "n_images", "n_captions"}.

    Raises:
        ValueError: for scores that are not finite, counts that do not fit, or an image that has
            no caption.
    """
    image_of_caption = _checked(sims, image_of_caption)
    i2t = recalls(i2t_ranks(sims, image_of_caption))
    t2i = recalls(t2i_ranks(sims, image_of_caption))
    rsum = sum(direction[r] for direction in (i2t, t2i) for r in RECALLS)
    n_images, n_captions = sims.shape
    return {"i2t": i2t, "t2i": t2i, "rsum": rsum, "n_images": n_images, "n_captions": n_captions}


def _checked(sims: np.ndarray, image_of_caption: np.ndarray) -> np.ndarray:
    image_of_caption = np.asarray(image_of_caption)
    n_images, n_captions = sims.shape
    if image_of_caption.shape != (n_captions,):
        raise ValueError(f"{n_captions} columns of scores, {image_of_caption.shape} captions")
    if not np.array_equal(np.unique(image_of_caption), np.arange(n_images)):
        raise ValueError(f"the captions should belong to images 0 … {n_images - 1}, each to one")
    if not np.isfinite(sims).all():
        bad = int((~np.isfinite(sims)).sum())
        raise ValueError(f"{bad} of {sims.size} scores are NaN or infinite: nothing to rank")
    return image_of_caption


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


# -- how sure a number is -------------------------------------------------------------------------

RECALLS = [(way, name) for way in ("i2t", "t2i") for name in ("r1", "r5", "r10")]


def image_hits(sims: np.ndarray, image_of_caption: np.ndarray) -> np.ndarray:
    """What each image adds to the six recalls, in percent: (n_images, 6) in the order of RECALLS.

    Its own hits for image to text, the share of its captions' for text to image.
    """
    i2t, t2i = i2t_ranks(sims, image_of_caption), t2i_ranks(sims, image_of_caption)
    captions = np.bincount(image_of_caption, minlength=len(sims))
    columns = [i2t < k for k in (1, 5, 10)]
    columns += [np.bincount(image_of_caption, t2i < k, len(sims)) / captions for k in (1, 5, 10)]
    return 100.0 * np.stack(columns, axis=1)


def resampled(folds: list[np.ndarray], n_samples: int, seed: int) -> np.ndarray:
    """The six recalls of bootstrap samples: (n_samples, 6), the mean over folds.

    folds: image_hits of each (one, if there are no folds). A sample draws as many images as there
    are, with replacement, each with its captions; the gallery stays whole, so ranks stay as they
    are and both directions share the draw.

    Raises:
        ValueError: for no samples at all.
    """
    if n_samples < 1:
        raise ValueError(f"{n_samples} bootstrap samples: should be 1 or more")
    rng = np.random.default_rng(seed)
    means = np.zeros((n_samples, len(RECALLS)))
    for hits in folds:
        n = len(hits)
        for sample in range(n_samples):
            counts = np.bincount(rng.integers(n, size=n), minlength=n)
            means[sample] += counts @ hits / n
    return means / len(folds)


def interval(samples: np.ndarray) -> list[float]:
    """The middle 95 % of some numbers."""
    return [float(x) for x in np.percentile(samples, (2.5, 97.5))]


def bootstrap_intervals(folds: list[np.ndarray], n_samples: int = 1000, seed: int = 0) -> dict:
    """95 % percentile intervals of recalls and rsum: {"i2t": {"r1": [low, high], …}, …, "rsum"}.

    folds: as in `resampled`. Time and memory: n_samples × n_images.
    """
    samples = resampled(folds, n_samples, seed)
    result: dict = {"samples": n_samples, "i2t": {}, "t2i": {}}
    for column, (way, name) in enumerate(RECALLS):
        result[way][name] = interval(samples[:, column])
    return result | {"rsum": interval(samples.sum(axis=1))}


def paired_bootstrap(
    a: list[np.ndarray], b: list[np.ndarray], n_samples: int = 1000, seed: int = 0
) -> dict:
    """How much higher b's rsum is than a's on the same images: {"difference", "interval"}.

    a, b: as in `resampled`, of two models; each sample draws the same images for both.

    Raises:
        ValueError: if they are not of as many images.
    """
    if [len(x) for x in a] != [len(x) for x in b]:
        raise ValueError(f"{[len(x) for x in a]} images and {[len(x) for x in b]}: not the same")
    differences = [y - x for x, y in zip(a, b, strict=True)]
    samples = resampled(differences, n_samples, seed).sum(axis=1)
    difference = float(np.mean([x.mean(axis=0).sum() for x in differences]))
    return {"samples": n_samples, "difference": difference, "interval": interval(samples)}


def hits(sims: np.ndarray, image_of_caption: np.ndarray) -> np.ndarray:
    """What each image adds to the recalls, all that a bootstrap needs to know: (n_images, 7).

    Columns: whether the image finds a caption of its own among the first 1, 5, 10; how many of its
    captions find it among the first 1, 5, 10; how many captions it has.

    Raises:
        ValueError: as `retrieval_metrics`.
    """
    image_of_caption = _checked(sims, image_of_caption)
    K = list(RECALLS.values())
    of_images = i2t_ranks(sims, image_of_caption)[:, None] < K  # (n_images, 3)
    of_captions = t2i_ranks(sims, image_of_caption)[:, None] < [*K, np.inf]  # (n_captions, 4)
    summed = np.zeros((len(sims), 4))
    np.add.at(summed, image_of_caption, of_captions)
    return np.concatenate([of_images, summed], axis=1)


def bootstrap(folds: list[np.ndarray], n_samples: int = 1000, seed: int = 0) -> dict:
    """95 % percentile intervals of the recalls and of rsum, by resampling images.

    folds: `hits` of each fold, (n_images, 7); one for a plain test. With several, images are drawn
    within each fold, and the interval is that of the mean over folds ->
    {"i2t": {"r1": [low, high], r5, r10}, "t2i": {…}, "rsum": [low, high], "level", "n_samples",
    "seed"}.

    Raises:
        ValueError: for fewer than two images in a fold, fewer than 100 samples, or what no `hits`
            can be.
    """
    samples = _samples(folds, n_samples, seed)
    return _intervals(samples) | {"level": LEVEL, "n_samples": n_samples, "seed": seed}


def paired_bootstrap(
    a: list[np.ndarray], b: list[np.ndarray], n_samples: int = 1000, seed: int = 0
) -> dict:
    """The same for the differences A − B of two runs on the same queries: each draw is of both.

    Because both answer the same draw, what is hard for both cancels: the interval is narrower than
    those of A and B would suggest.

    Raises:
        ValueError: as `bootstrap`, and if A and B are not of the same images and captions.
    """
    same = len(a) == len(b) and all(
        np.shape(x) == np.shape(y) and np.array_equal(x[:, 6], y[:, 6])
        for x, y in zip(a, b, strict=True)
    )
    if not same:
        raise ValueError("a paired bootstrap needs two runs on the same images and captions")
    samples = _samples(a, n_samples, seed) - _samples(b, n_samples, seed)
    return _intervals(samples) | {"level": LEVEL, "n_samples": n_samples, "seed": seed}


def _samples(folds: list[np.ndarray], n_samples: int, seed: int) -> np.ndarray:
    """The recalls of each bootstrap sample in percent, and rsum: (n_samples, 7)."""
    if n_samples < 100:
        raise ValueError(f"{n_samples} bootstrap samples: {LEVEL} % of them need 100 or more")
    if not folds:
        raise ValueError("nothing to resample: no folds")
    generator = np.random.default_rng(seed)
    total = np.zeros((n_samples, 6))
    for fold in folds:
        fold = np.asarray(fold, dtype=float)
        if fold.ndim != 2 or fold.shape[1] != 7 or len(fold) < 2:
            raise ValueError(f"expected hits (2 images or more, 7), found {fold.shape}")
        own, captions = fold[:, :6], fold[:, 6:]
        most = np.concatenate([np.ones_like(fold[:, :3]), captions.repeat(3, axis=1)], axis=1)
        if not (((own >= 0) & (own <= most)).all() and (captions >= 1).all()):
            raise ValueError("hits below 0, NaN or above what there is, or an image with no caption")
        n = len(fold)
        step = max(1, AT_ONCE // n)
        for start in range(0, n_samples, step):
            size = min(step, n_samples - start)
            drawn = generator.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
            times = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)
            sums = times.astype(float) @ fold  # (size, 7)
            total[start : start + size, :3] += sums[:, :3] / n
            total[start : start + size, 3:] += sums[:, 3:6] / sums[:, 6:]
    samples = 100 * total / len(folds)
    return np.concatenate([samples, samples.sum(axis=1, keepdims=True)], axis=1)


def _intervals(samples: np.ndarray) -> dict:
    """(n_samples, 7) -> {"i2t": {name: [low, high]}, "t2i": {…}, "rsum": [low, high]}."""
    tail = (100 - LEVEL) / 2
    both = np.percentile(samples, [tail, 100 - tail], axis=0).T.tolist()  # 7 × [low, high]
    return {
        "i2t": dict(zip(RECALLS, both[:3], strict=True)),
        "t2i": dict(zip(RECALLS, both[3:6], strict=True)),
        "rsum": both[6],
    }
