"""Retrieval metrics: pure functions of a score matrix and the image of each caption.

A query's rank counts the wrong answers that score at least as high as its best right one, so ties
count against the model and a collapsed one cannot look good.
"""

from __future__ import annotations

import numpy as np


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
    t2i = recalls(t2i_ranks(sims, image_of_caption))
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
