"""Is one run better than another? Their scores on the same test set, resampled together.

    python scripts/compare.py A_sims.npy B_sims.npy --data_name f30k_precomp
    python scripts/compare.py A_sims.npy B_sims.npy --data_name coco_precomp --split testall --fold5

Reads what `evaluation.py --save_sims` wrote. Prints both rsums, B − A, and a 95 % interval of the
difference from a paired bootstrap over images. If 0 lies outside the interval, the choice of test
images does not explain the difference. Another training seed still may: on F30K the standard
deviation over seeds is about 2.7 rsum for VSE++.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import find_files, open_array
from evaluation import N_FOLDS
from metrics import image_hits, paired_bootstrap, rsum_of
from utils import InputError, at_least, one_line
from vocab import read_captions


def load_sims(path: Path, n_captions: int) -> np.ndarray:
    """Scores (n_images, n_captions) of `evaluation.py --save_sims`.

    Raises:
        InputError: if they are no numbers, not finite, or not of this many captions.
    """
    sims = open_array(path)
    if sims.ndim != 2 or not sims.size or sims.shape[1] != n_captions or n_captions % len(sims):
        raise InputError(f"{path}: scores {sims.shape} do not fit {n_captions} captions")
    if sims.dtype.kind not in "fiu" or not np.isfinite(sims).all():
        raise InputError(f"{path}: expected finite numbers, found {sims.dtype} or NaN")
    return sims


def fold_hits(path: Path, n_captions: int, n_folds: int) -> list[np.ndarray]:
    """What each image adds to the recalls, fold by fold (metrics.image_hits)."""
    sims = load_sims(path, n_captions)
    if len(sims) % n_folds:
        raise InputError(f"{path}: {len(sims)} images do not make {n_folds} equal folds")
    rows, columns = len(sims) // n_folds, n_captions // n_folds
    image_of_caption = np.arange(columns) // (columns // rows)
    return [
        image_hits(sims[k * rows :][:rows, k * columns :][:, :columns], image_of_caption)
        for k in range(n_folds)
    ]


@one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("sims", nargs=2, type=Path, help="two files of evaluation.py --save_sims")
    add("--data_path", default="./data", help="folder of the data sets")
    add("--data_name", required=True, help="its folder in data_path")
    add("--split", default="test", help="the split the scores belong to")
    add("--fold5", action="store_true", help="mean over five folds")
    add("--samples", default=1000, type=at_least(1), help="bootstrap samples of the images")
    opt = parser.parse_args()
    _, caps, _ = find_files(opt.data_path, opt.data_name, opt.split)
    n_captions, n_folds = len(read_captions(caps)), N_FOLDS if opt.fold5 else 1
    a, b = (fold_hits(path, n_captions, n_folds) for path in opt.sims)
    try:
        result = paired_bootstrap(a, b, opt.samples)
    except ValueError as error:  # of different numbers of images
        raise InputError(f"{opt.sims[0]}, {opt.sims[1]}: {error}") from error
    for path, hits in zip(opt.sims, (a, b), strict=True):
        print(f"{path}: rsum {rsum_of(hits):.1f}")
    low, high = result["interval"]
    print(f"difference {result['difference']:+.1f}, 95 % interval {low:+.1f} … {high:+.1f}")


if __name__ == "__main__":
    main()
