"""Evaluate on COCO's test set with additional correct matches: ECCV Caption and CxC.

    pip install -r requirements-extra.txt
    python evaluation.py --model_path CKPT --data_name coco_precomp --split testall \\
        --save_sims sims.npy
    python scripts/eval_eccv.py sims.npy --annotations captions_val2014.json --json eccv.json

In COCO a caption is correct for one image only, though it may fit others as well. The package
`eccv_caption` (Chun et al., ECCV 2022) holds matches judged by human annotators. The script prints
mAP@R, R-Precision and R@1 on ECCV Caption (1,261 image, 1,332 caption queries), and R@1, R@5, R@10
on CxC. i2t mAP@R is at most 99.99: two of its correct captions are not among COCO's 25,000.

The package needs COCO's ids. The image ids are in DATA_PATH/DATA_NAME/testall_ids.txt, in the order
of the scores' rows. The caption ids are found by comparing testall_caps.txt with the texts in
--annotations: COCO's captions_val2014.json or Karpathy's dataset_coco.json.

Ties count against the model, as in metrics.py. Time: 10 s. Memory: 1.5 GB.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from compare import load_sims
from prepare_captions import PER_IMAGE, image_key, read_id_list

from utils import InputError, check_targets, import_extra, one_line, write_json
from vocab import read_captions

Matches = Mapping[int, list[int]]  # the correct answers to each query, by COCO's ids


def load_benchmarks() -> Any:
    """The package's `Metrics`, which holds the correct answers: coco_gts, eccv_gts, cxc_gts."""
    warnings.filterwarnings("ignore", message="failed to import `ujson`")
    return import_extra("eccv_caption").Metrics()


def read_image_ids(path: Path, known: Matches) -> list[int]:
    """COCO's ids of the images. Raises InputError if they are not those in `known`."""
    ids = [int(key) for key in map(image_key, read_id_list(path)) if key.isdecimal()]
    if {*ids} != {*known}:
        n = len({*ids} & {*known})
        raise InputError(f"{path}: has {n:,} of the {len(known):,} images of Karpathy's test split")
    return ids


def read_texts(path: Path) -> dict[int, str]:
    """The text of each caption id. Raises InputError if it is not COCO's or Karpathy's JSON."""
    try:
        content = json.loads(path.read_bytes())
        if "annotations" in content:
            return {entry["id"]: entry["caption"] for entry in content["annotations"]}
        return {s["sentid"]: s["raw"] for image in content["images"] for s in image["sentences"]}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: not COCO's or Karpathy's captions: {type(error).__name__}: {error}"
        ) from error


def letters(caption: str) -> str:
    """The letters and digits of a caption: case, spaces and punctuation differ between files."""
    return "".join(re.findall(r"[^\W_]", caption.lower()))


def match_captions(
    caps: Path, texts: dict[int, str], images: list[int], known: Matches
) -> list[int]:
    """COCO's ids of the captions in `caps`, five per image, image by image.

    Raises InputError for a caption that does not belong to its image.
    """
    captions, ids, left = read_captions(caps), [], defaultdict(list)
    if len(captions) != PER_IMAGE * len(images):
        raise InputError(f"{caps}: {len(captions):,} captions of {len(images):,} images, not five")
    for image in images:
        for id_ in known[image]:
            left[image, letters(texts.get(id_, ""))].append(id_)
    for k, caption in enumerate(captions):
        image = images[k // PER_IMAGE]
        if not left[image, letters(caption)]:
            raise InputError(
                f"{caps}, line {k + 1}: {caption[:60]!r} is no caption of image {image} in the "
                "annotations; do captions and image ids have the same order?"
            )
        ids.append(left[image, letters(caption)].pop(0))
    return ids


def rank(
    sims: np.ndarray, queries: list[int], items: list[int], right: Matches
) -> dict[int, list[int]]:
    """The top items for each query in `right`, best first: as many as are correct, at least 10.

    sims (n_queries, n_items). Among equal scores, wrong answers come first.
    """
    column = {item: k for k, item in enumerate(items)}
    ranked = {}
    for row, query in enumerate(queries):
        if query in right:
            scores = sims[row].astype(np.float64)
            own = [column[item] for item in right[query] if item in column]
            # Just below all equal scores, above the next one: float32 has no number in between.
            scores[own] = np.nextafter(scores[own], -np.inf)
            depth = min(max(10, len(right[query])), len(items))
            # numpy's argpartition is slow where most scores are equal.
            best = torch.from_numpy(scores).topk(depth).indices
            ranked[query] = [items[k] for k in best.tolist()]
    return ranked


def evaluate(sims: np.ndarray, images: list[int], captions: list[int], benchmarks: Any) -> dict:
    """{"eccv_map_at_r": {"i2t", "t2i"}, "eccv_rprecision", "eccv_r1", "cxc_r1", …} in percent.

    sims (n_images, n_captions); images, captions: COCO's ids of its rows and columns.
    """

    def both_ways(right: Mapping[str, Matches]) -> dict[str, dict[int, list[int]]]:
        i2t = rank(sims, images, captions, right["i2t"])
        return {"i2t": i2t, "t2i": rank(sims.T, captions, images, right["t2i"])}

    with contextlib.redirect_stderr(io.StringIO()):  # the package always draws a progress bar
        shares = benchmarks.eccv_metrics(both_ways(benchmarks.eccv_gts), "all")
    ranked = both_ways(benchmarks.cxc_gts)
    shares |= {f"cxc_r{k}": benchmarks.cxc_recalls(ranked, "all", K=k) for k in (1, 5, 10)}
    return {
        name: {way: 100.0 * float(share) for way, share in ways.items()}
        for name, ways in shares.items()
    }


@one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("sims", type=Path, help="scores of evaluation.py --split testall --save_sims")
    add("--annotations", required=True, type=Path, help="COCO's or Karpathy's JSON of captions")
    add("--data_path", default="./data", help="folder of the data sets")
    add("--data_name", default="coco_precomp", help="its folder in data_path (coco_precomp)")
    add("--json", type=Path, help="write the numbers to this file")
    opt = parser.parse_args()
    check_targets(opt.json)
    benchmarks = load_benchmarks()
    known = benchmarks.coco_gts["i2t"]
    folder = Path(opt.data_path) / opt.data_name
    images = read_image_ids(folder / "testall_ids.txt", known)
    texts = read_texts(opt.annotations)
    captions = match_captions(folder / "testall_caps.txt", texts, images, known)
    sims = load_sims(opt.sims)
    if sims.shape != (len(images), len(captions)):
        raise InputError(f"{opt.sims}: {sims.shape}, expected {(len(images), len(captions))}")
    result = evaluate(sims, images, captions, benchmarks)
    print(f"{'':16}{'i2t':>7}{'t2i':>7}")
    for name, ways in result.items():
        print(f"{name:16}{ways['i2t']:7.1f}{ways['t2i']:7.1f}")
    if opt.json:
        write_json(opt.json, result)


if __name__ == "__main__":
    main()
