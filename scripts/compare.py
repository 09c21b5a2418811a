"""Is one run really better than another? Their scores on the same test set, resampled together.

    python scripts/compare.py A_sims.npy B_sims.npy --data_name f30k_precomp
    python scripts/compare.py A_sims.npy B_sims.npy --data_name coco_precomp --split testall --fold5

The scores are what `evaluation.py --save_sims` wrote. Printed are both rsums, B − A, and the 95 %
interval of the difference from a paired bootstrap over images: if 0 is outside, these two models
differ by more than the choice of test images would explain. (What another seed of training would
do, it does not know: on F30K that is about 2.7 rsum, one standard deviation, for VSE++.)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from visualize import load_sims

from data import find_files
from errors import InputError, one_line
from evaluation import N_FOLDS
from metrics import image_hits, paired_bootstrap, rsum_of
from train import at_least
from vocab import read_captions


def hits_of(path: Path, n_captions: int, n_folds: int) -> list[np.ndarray]:
    """What each image adds to the recalls, fold by fold."""
    sims = load_sims(path, n_captions)
    n_images = len(sims)
    if n_images % n_folds:
        raise InputError(f"{path}: {n_images} images do not make {n_folds} equal folds")
    size, per_image = n_images // n_folds, n_captions // n_images
    owner = np.arange(size * per_image) // per_image
    blocks = [
        np.asarray(sims[k * size : (k + 1) * size, k * len(owner) : (k + 1) * len(owner)])
        for k in range(n_folds)
    ]
    if not all(np.isfinite(block).all() for block in blocks):
        raise InputError(f"{path}: NaN or infinite scores")
    return [image_hits(block, owner) for block in blocks]


@one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("sims", nargs=2, type=Path, help="two files of evaluation.py --save_sims")
    add("--data_path", default="./data", help="folder of the data sets")
    add("--data_name", required=True, help="its folder in data_path")
    add("--split", default="test", help="the split the scores belong to")
    add("--fold5", default=False, action="store_true", help="mean over five folds")
    add("--samples", default=1000, type=at_least(1), help="bootstrap samples of the images")
    opt = parser.parse_args()
    _, caps, _ = find_files(opt.data_path, opt.data_name, opt.split)
    n_captions, n_folds = len(read_captions(caps)), N_FOLDS if opt.fold5 else 1
    a, b = (hits_of(path, n_captions, n_folds) for path in opt.sims)
    try:
        result = paired_bootstrap(a, b, opt.samples)
    except ValueError as error:
        raise InputError(f"{opt.sims[0]}, {opt.sims[1]}: {error}") from error
    for path, hits in zip(opt.sims, (a, b), strict=True):
        print(f"{path}: rsum {rsum_of(hits):.1f}")
    low, high = result["interval"]
    print(f"difference {result['difference']:+.1f}, 95 % interval {low:+.1f} … {high:+.1f}")


if __name__ == "__main__":
    main()
