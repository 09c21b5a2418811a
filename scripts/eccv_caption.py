"""COCO's test set with the right answers it does not know of: ECCV Caption, CxC and PMRP.

    pip install -r requirements-extra.txt
    python evaluation.py --model_path CKPT --data_name coco_precomp --split testall \\
        --save_sims sims.npy
    python scripts/eccv_caption.py sims.npy --annotations captions_val2014.json --json eccv.json

COCO calls a caption right for one image only, though it fits others as well. The PyPI package
`eccv_caption` (Chun et al., ECCV 2022) holds what people said fits. Printed are its mAP@R,
R-Precision (R-P) and R@1 on ECCV Caption (1,261 image and 1,332 caption queries), R@1, R@5 and R@10
on CxC, and on COCO 5K and 1K (five folds), the last two beside those of metrics.py. Two captions of
ECCV Caption are not among the 25,000, so that the best mAP@R and R-P of image to text are 99.99.

The scores are of the 5,000 images of Karpathy's test split, five captions each; the package has to
be told which image and which caption is which:

    images     DATA_PATH/DATA_NAME/{split}_ids.txt, or --ids FILE: COCO's ids in the order of
               the scores' rows, one a line (391895, or COCO_val2014_000000391895.jpg)
    captions   --annotations FILE: {split}_caps.txt is compared with the texts in COCO's
               captions_val2014.json or Karpathy's dataset_coco.json; case, blanks and punctuation
               do not count
               --caption_ids FILE: COCO's ids of the captions (annotations), one a line
               neither: each image's captions are taken to be in the order of their ids, as the
               package lists them. Nothing checks that; COCO's recalls do not depend on it, the
               others do

PMRP, the R-Precision of plausible matches (PM R-P), needs two files that are not in the package,
140 MB, to be downloaded by hand from where its page (github.com/naver-ai/eccv-caption) says: --pm
FOLDER names the folder of pm_image_to_caption.json and pm_caption_to_image.json.

As in metrics.py ties count against the model: of equal scores wrong answers come first, where wrong
is what the benchmark at hand calls so. A ranking goes as far as its metric looks: to the number of
right answers (up to 48), at least to 10. Time: about 10 seconds. Memory: 0.5 GB and the 0.5 GB of
scores, which are mapped; --annotations and --pm take ten times the size of their JSON beyond that.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from prepare_captions import few, image_key, listed, new_files, on_one_line, read_id_list, read_json

from data import open_array
from errors import InputError, one_line
from evaluation import N_FOLDS, progress
from metrics import i2t_ranks, mean_metrics, recalls, retrieval_metrics, t2i_ranks
from vocab import read_captions

PER_IMAGE = 5
KS = (1, 5, 10)
AT_ONCE = 2**22  # scores ranked at once
SOURCES = "COCO's captions_*.json or Karpathy's dataset_coco.json"

Matches = Mapping[int, list[int]]  # the right answers of each query, or its ranking, by COCO's ids


# -- the package ----------------------------------------------------------------------------------


def package() -> ModuleType:
    """The installed package, not this file: Python would look for the name here first.

    It is loaded under a name of its own, so that `import eccv_caption` stays what it is elsewhere.

    Raises:
        InputError: if it is not installed.
    """
    name = "eccv_caption_package"
    if name in sys.modules:
        return sys.modules[name]
    elsewhere = [folder for folder in sys.path if Path(folder).resolve() != HERE]
    found = PathFinder.find_spec("eccv_caption", elsewhere)
    if found is None or found.origin is None:
        raise InputError(
            "the package eccv_caption is not installed: pip install -r requirements-extra.txt"
        )
    spec = importlib.util.spec_from_file_location(
        name, found.origin, submodule_search_locations=found.submodule_search_locations
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it would like ujson, and does without
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def ground_truth(pm: Path | None = None) -> Any:
    """The package's `Metrics`, with the plausible matches of a folder if there is one.

    Raises:
        InputError: if the package is missing, or the folder's files are not what they should be.
    """
    metrics = package().Metrics()
    if pm is not None:
        files = [pm / f"pm_{way}.json" for way in ("image_to_caption", "caption_to_image")]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise InputError(
                f"{pm}: {' and '.join(missing)} not found; download them from where "
                f"github.com/naver-ai/eccv-caption says, or leave out --pm"
            )
        try:
            metrics.set_pm_gts(*map(str, files))
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{pm}: not the package's lists of ids: {error}") from error
        for file, way in zip(files, ("i2t", "t2i"), strict=True):
            matches, known = metrics.pm_gts[way], metrics.coco_gts[way]
            if not matches or not all(q in known and len(r) > 0 for q, r in matches.items()):
                raise InputError(f"{file}: expected the plausible matches of COCO's test queries")
    return metrics


# -- which image, which caption -------------------------------------------------------------------


def read_image_ids(path: Path, known: Matches) -> list[int]:
    """COCO's ids of the images, in the order of the scores' rows.

    Raises:
        InputError: if they are not those of the benchmark.
    """
    if not path.is_file():
        raise InputError(
            f"{path}: not found; it should hold COCO's ids of the images, one a line: name it with "
            f"--ids, or write it with scripts/prepare_captions.py dataset_coco.json"
        )
    by_key = {str(image): image for image in known}
    names = read_id_list(path)
    unknown = [name for name in names if image_key(name) not in by_key]
    if unknown or len(names) != len(known):
        others = f", {len(unknown):,} of them others ({few(unknown)})" if unknown else ""
        raise InputError(
            f"{path}: {len(names):,} ids{others}; expected COCO's ids of the {len(known):,} images "
            f"of Karpathy's test split (testall)"
        )
    return [by_key[image_key(name)] for name in names]


def read_annotations(path: Path) -> dict[int, list[tuple[int, str]]]:
    """The ids and texts of each image's captions, from COCO's or Karpathy's JSON.

    Raises:
        InputError: if it is neither.
    """
    content = read_json(path)
    name = "annotations" if "annotations" in content else "images"
    found: dict[int, list[tuple[int, str]]] = {}
    for number, entry in enumerate(listed(content, name, path, SOURCES)):
        try:
            if name == "annotations":
                captions = [(entry["image_id"], entry["id"], entry["caption"])]
            else:
                captions = [(entry["cocoid"], s["sentid"], s["raw"]) for s in entry["sentences"]]
            for image, caption, text in captions:
                if not (isinstance(image, int) and isinstance(caption, int)):
                    raise TypeError("ids are whole numbers")
                found.setdefault(image, []).append((caption, on_one_line(text)))
        except (KeyError, TypeError) as error:
            missing = "no " if isinstance(error, KeyError) else ""
            raise InputError(
                f"{path}: {name}[{number}] is not as in {SOURCES}: {missing}{error}"
            ) from error
    return found


def letters(caption: str) -> str:
    """What is left of a caption in any file: its letters and digits."""
    return "".join(re.findall(r"[^\W_]", caption.lower()))


def match_texts(caps: Path, annotations: Path, images: list[int], known: Matches) -> list[int]:
    """COCO's ids of the captions in a `{split}_caps.txt`, by their texts.

    Of texts that differ in punctuation only, the one that is the same wins.

    Raises:
        InputError: for a caption that is none of its image's.
    """
    texts = read_captions(caps)
    if len(texts) != PER_IMAGE * len(images):
        raise InputError(
            f"{caps}: {len(texts):,} captions, expected {PER_IMAGE} of each of {len(images):,} "
            f"images"
        )
    annotated, ids = read_annotations(annotations), []
    for row, image in enumerate(images):
        own = texts[PER_IMAGE * row : PER_IMAGE * (row + 1)]
        left = {id_: text for id_, text in annotated.get(image, ()) if id_ in known[image]}
        found: dict[int, int] = {}
        for form in (on_one_line, letters):
            for place, text in enumerate(own):
                same = (id_ for id_ in left if form(left[id_]) == form(text))
                if place not in found and (id_ := next(same, None)) is not None:
                    found[place] = id_
                    del left[id_]
        for place, text in enumerate(own):
            if place not in found:
                raise InputError(
                    f"{caps}, line {PER_IMAGE * row + place + 1}: {text[:60]!r} is none of the "
                    f"{PER_IMAGE} captions of image {image} in {annotations}; are the ids of the "
                    f"images in the order of the captions?"
                )
            ids.append(found[place])
    return ids


def read_caption_ids(path: Path, images: list[int], known: Matches) -> list[int]:
    """COCO's ids of the captions, in the order of the scores' columns.

    Raises:
        InputError: if they are not the five of each image.
    """
    lines = read_captions(path)
    if len(lines) != PER_IMAGE * len(images):
        raise InputError(
            f"{path}: {len(lines):,} lines, expected the ids of {PER_IMAGE} captions of each of "
            f"{len(images):,} images"
        )
    ids = []
    for row, image in enumerate(images):
        left = {str(id_): id_ for id_ in known[image]}
        for number in range(PER_IMAGE * row, PER_IMAGE * (row + 1)):
            id_ = left.pop(lines[number], None)
            if id_ is None:
                raise InputError(
                    f"{path}, line {number + 1}: {lines[number][:40]!r} is none of the captions of "
                    f"image {image}, or stands there twice"
                )
            ids.append(id_)
    return ids


# -- scores and rankings --------------------------------------------------------------------------


def load_scores(path: Path, n_images: int) -> np.ndarray:
    """The scores, memory-mapped: (n_images, 5 n_images).

    Raises:
        InputError: if the file holds anything else.
    """
    sims = open_array(path)
    if sims.shape != (n_images, PER_IMAGE * n_images) or sims.dtype not in (np.float32, np.float16):
        raise InputError(
            f"{path}: found {sims.dtype} {sims.shape}, expected float32 scores of {n_images:,} "
            f"images × {PER_IMAGE * n_images:,} captions (evaluation.py --data_name coco_precomp "
            f"--split testall --save_sims)"
        )
    return sims


def rankings(
    sims: np.ndarray, queries: list[int], items: list[int], right: Matches, what: str
) -> dict[int, list[int]]:
    """The best items of each query that `right` has, best first, by COCO's ids.

    sims (n_queries, n_items) float32 or less. A ranking is as long as its query has right answers,
    and at least 10. Of equal scores wrong answers come first.

    Raises:
        ValueError: for scores that are not finite.
    """
    column = {id_: place for place, id_ in enumerate(items)}
    rows = np.array([row for row, id_ in enumerate(queries) if id_ in right])
    size = max(1, AT_ONCE // len(items))
    ranked = {}
    for start in progress(range(0, len(rows), size), -(-len(rows) // size), what):
        block = rows[start : start + size]
        scores = sims[block].astype(np.float64)
        if not np.isfinite(scores).all():
            raise ValueError("NaN or infinite scores: nothing to rank")
        depths = []
        for row, own in zip(block, scores, strict=True):
            matches = right[queries[row]]
            places = [column[id_] for id_ in matches if id_ in column]
            # Behind all equal ones and before the next: float32 has no number in between.
            own[places] = np.nextafter(own[places], -np.inf)
            depths.append(min(max(*KS, len(matches)), len(items)))
        # numpy's argpartition takes 50 times as long where most scores are equal.
        best = torch.from_numpy(scores).topk(max(depths), dim=1).indices.tolist()
        for row, places, depth in zip(block, best, depths, strict=True):
            ranked[queries[row]] = [items[place] for place in places[:depth]]
    return ranked


def both_ways(
    sims: np.ndarray,
    images: list[int],
    captions: list[int],
    right: Mapping[str, Matches],
    what: str,
) -> dict[str, dict[int, list[int]]]:
    """The rankings of images' captions and of captions' images."""
    return {
        "i2t": rankings(sims, images, captions, right["i2t"], f"{what}, image to text"),
        "t2i": rankings(sims.T, captions, images, right["t2i"], f"{what}, text to image"),
    }


def folds(
    sims: np.ndarray, images: list[int], metrics: Any
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The package's five folds, whatever the order of the images: scores, rows and columns."""
    row = {image: place for place, image in enumerate(images)}
    in_order = [metrics.coco_gts["t2i"][int(id_)][0] for id_ in metrics.coco_ids[::PER_IMAGE]]
    for fold in np.array_split([row[image] for image in in_order], N_FOLDS):
        columns = (PER_IMAGE * fold[:, None] + np.arange(PER_IMAGE)).ravel()
        yield sims[np.ix_(fold, columns)], fold, columns


def our_recalls(sims: np.ndarray) -> dict[str, dict[str, float]]:
    """COCO 5K's recalls by metrics.py, some rows or columns of the scores at a time."""
    n_images, n_captions = sims.shape
    image_of_caption = np.arange(n_captions) // PER_IMAGE
    size = max(1, AT_ONCE // n_captions)
    i2t = [
        i2t_ranks(np.asarray(sims[start : start + size]), image_of_caption - start)
        for start in range(0, n_images, size)
    ]
    size = max(1, AT_ONCE // n_images)
    t2i = [
        t2i_ranks(np.asarray(sims[:, start : start + size]), image_of_caption[start : start + size])
        for start in range(0, n_captions, size)
    ]
    return {"i2t": recalls(np.concatenate(i2t)), "t2i": recalls(np.concatenate(t2i))}


# -- report ---------------------------------------------------------------------------------------


def percent(found: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """{name: {"i2t", "t2i"}} as shares -> {"i2t": {name}, "t2i": {name}} in percent."""
    return {
        way: {name: 100.0 * float(values[way]) for name, values in found.items()}
        for way in ("i2t", "t2i")
    }


def at_each_k(compute: Callable[..., dict[str, float]], ranked: dict) -> dict:
    return percent({f"r{k}": compute(ranked, "all", K=k) for k in KS})


def evaluate(sims: np.ndarray, images: list[int], captions: list[int], metrics: Any) -> dict:
    """All benchmarks in percent, and our own recalls of COCO's.

    sims (n_images, n_captions), images and captions: COCO's ids of its rows and columns ->
    {"eccv": {"i2t": {map_at_r, rprecision, r1}, "t2i": {…}}, "cxc", "coco_5k", "coco_1k", "pm",
    "ours": {"coco_5k", "coco_1k"}}; "pm" where the plausible matches were given.

    Raises:
        ValueError: for scores that are not finite.
    """
    ranked = both_ways(sims, images, captions, metrics.eccv_gts, "ECCV")
    with contextlib.redirect_stderr(io.StringIO()):  # it draws a bar, asked or not
        found = metrics.eccv_metrics(ranked, "all")
    result = {"eccv": percent({name.removeprefix("eccv_"): x for name, x in found.items()})}
    ranked = both_ways(sims, images, captions, metrics.cxc_gts, "CxC")
    result["cxc"] = at_each_k(metrics.cxc_recalls, ranked)
    ranked = both_ways(sims, images, captions, metrics.coco_gts, "COCO 5K")
    result["coco_5k"] = at_each_k(metrics.coco_5k_recalls, ranked)
    # The package takes a fold's answers out of longer rankings; ten of the fold's own are enough.
    ranked, ours = {"i2t": {}, "t2i": {}}, []
    for block, rows, columns in folds(sims, images, metrics):
        some = ([images[row] for row in rows], [captions[column] for column in columns])
        for way, found in both_ways(block, *some, metrics.coco_gts, "COCO 1K").items():
            ranked[way] |= found
        ours.append(retrieval_metrics(block, np.arange(len(columns)) // PER_IMAGE))
    result["coco_1k"] = at_each_k(metrics.coco_1k_recalls, ranked)
    if metrics.pm_gts:
        ranked = both_ways(sims, images, captions, metrics.pm_gts, "PM")
        result["pm"] = percent({"rprecision": metrics.pmrp(ranked, "all")})
    names = [f"r{k}" for k in KS]
    result["ours"] = {
        protocol: {way: {name: whole[way][name] for name in names} for way in ("i2t", "t2i")}
        for protocol, whole in (("coco_5k", our_recalls(sims)), ("coco_1k", mean_metrics(ours)))
    }
    return result


NAMES = {"map_at_r": "mAP@R", "rprecision": "R-P", "r1": "R@1", "r5": "R@5", "r10": "R@10"}
BENCHMARKS = {
    "eccv": "ECCV", "cxc": "CxC", "coco_5k": "COCO 5K", "coco_1k": "COCO 1K", "pm": "PM",
}  # fmt: skip


def report(result: dict) -> str:
    """The benchmarks as a table, COCO's with our numbers beside them."""
    lines = [f"{'':16}{'i2t':>7}{'t2i':>7}{'metrics.py: i2t':>19}{'t2i':>7}"]
    for key, title in BENCHMARKS.items():
        for name in result.get(key, {}).get("i2t", ()):
            line = f"{f'{title} {NAMES[name]}':16}"
            line += "".join(f"{result[key][way][name]:7.1f}" for way in ("i2t", "t2i"))
            if key in result["ours"]:
                ours = result["ours"][key]
                line += f"{ours['i2t'][name]:19.1f}{ours['t2i'][name]:7.1f}"
            lines.append(line)
    return "\n".join(lines)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("sims", type=Path, help="scores of evaluation.py --split testall --save_sims")
    add("--data_path", default="./data", help="folder of the data sets")
    add("--data_name", default="coco_precomp", help="its folder in data_path")
    add("--split", default="testall", help="the split the scores belong to")
    add("--ids", default=None, type=Path, metavar="FILE", help="None = its {split}_ids.txt")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--annotations", default=None, type=Path, metavar="FILE", help=SOURCES)
    either.add_argument(
        "--caption_ids", default=None, type=Path, metavar="FILE", help="COCO's ids, one a line"
    )
    add(
        "--pm", default=None, type=Path, metavar="FOLDER", help="of the plausible matches, for PMRP"
    )
    add("--json", default=None, type=Path, metavar="FILE", help="write the numbers")
    return parser


@one_line
def main() -> None:
    opt = options().parse_args()
    folder = Path(opt.data_path) / opt.data_name
    caps, ids = folder / f"{opt.split}_caps.txt", opt.ids or folder / f"{opt.split}_ids.txt"
    metrics = ground_truth(opt.pm)
    known = metrics.coco_gts["i2t"]
    with new_files() as create:
        target = create(opt.json) if opt.json else None  # before the work, not after it
        sims = load_scores(opt.sims, len(known))
        images = read_image_ids(ids, known)
        if opt.annotations:
            captions = match_texts(caps, opt.annotations, images, known)
            source = f"by the texts in {opt.annotations}"
        elif opt.caption_ids:
            captions = read_caption_ids(opt.caption_ids, images, known)
            source = f"from {opt.caption_ids}"
        else:
            captions = [id_ for image in images for id_ in sorted(known[image])]
            source = "in the order of their ids, unchecked (--annotations checks)"
        try:
            result = evaluate(sims, images, captions, metrics)
        except ValueError as error:
            raise InputError(f"{opt.sims}: {error}") from error
        version = importlib.metadata.version("eccv_caption")
        result |= {"eccv_caption": version, "caption_ids": source}
        print(f"eccv_caption {version}; captions {source}")
        print(report(result), flush=True)
        if target is not None:
            target.write((json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
