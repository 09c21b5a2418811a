"""Is one run better than another? A paired bootstrap of their scores on the same test set.

    python scripts/compare.py A_sims.npy B_sims.npy            # of evaluation.py --save_sims
    python scripts/compare.py A_sims.npy B_sims.npy --fold5    # COCO 1K, from scores of testall

Prints both rsums, B − A, and a 95 % interval of the difference from a paired bootstrap over images.
If 0 lies outside the interval, the choice of test images does not explain the difference. Another
training seed still may: on F30K the standard deviation over seeds is about 2.7 rsum for VSE++.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import open_array
from evaluation import fold_slices
from metrics import image_hits, paired_bootstrap, rsum_of
from utils import InputError, one_line


def load_sims(path: Path) -> np.ndarray:
    """Finite scores (n_images, n_captions) of evaluation.py. Raises InputError for others."""
    sims = open_array(path)
    if sims.ndim != 2 or not sims.size or sims.shape[1] % sims.shape[0]:
        raise InputError(f"{path}: {sims.shape} are not the scores of images × their captions")
    if sims.dtype.kind not in "fiu" or not np.isfinite(sims).all():
        raise InputError(f"{path}: expected finite numbers, found {sims.dtype} or NaN")
    return sims


@one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("sims", nargs=2, type=Path, help="files of evaluation.py --save_sims")
    parser.add_argument("--fold5", action="store_true", help="mean over five folds")
    opt = parser.parse_args()
    a, b = map(load_sims, opt.sims)
    if a.shape != b.shape:
        raise InputError(f"scores {a.shape} and {b.shape}: expected the same")
    folds = fold_slices(*a.shape) if opt.fold5 else [(slice(None), slice(None))]
    image_of_caption = np.arange(a.shape[1])[folds[0][1]] // (a.shape[1] // len(a))
    hits = [[image_hits(sims[i, c], image_of_caption) for i, c in folds] for sims in (a, b)]
    for path, of_images in zip(opt.sims, hits, strict=True):
        print(f"{path}: rsum {rsum_of(of_images):.1f}")
    result = paired_bootstrap(*hits)
    low, high = result["interval"]
    print(f"difference {result['difference']:+.1f}, 95 % interval {low:+.1f} … {high:+.1f}")


if __name__ == "__main__":
    main()
