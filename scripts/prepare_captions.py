"""Captions and image ids in SCAN's layout, from Karpathy's splits or COCO's annotation files.

    python scripts/prepare_captions.py dataset_flickr30k.json --data_name f30k_precomp
    python scripts/prepare_captions.py dataset_coco.json --data_name coco_precomp

reads a file of Karpathy's caption_datasets.zip and writes

    DATA_PATH/DATA_NAME/{split}_caps.txt   one caption per line, the five of an image consecutive
    DATA_PATH/DATA_NAME/{split}_ids.txt    one image per line

for train (with Karpathy's restval, as in SCAN), dev (his val) and test. COCO's 5,000 test images
are testall, and the first 1,000 of them are test. An image's first five captions are used.
Nothing is written if an image is missing, appears twice or has fewer captions.

The images are in Karpathy's order. If you already have features, use their order with --split and
--order. COCO's own files have no dev and test splits, so they always need both:

    python scripts/prepare_captions.py --coco captions_train2014.json captions_val2014.json \\
        --data_name coco_precomp --split dev --order dev_ids.txt
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path, PurePath
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import InputError, check_targets, one_line, write_text

SPLITS = ("train", "dev", "test")
SCAN_SPLIT = {"train": "train", "restval": "train", "val": "dev", "test": "test"}  # of Karpathy's
COCO_1K = 1000  # images of COCO's test, the first of testall
PER_IMAGE = 5  # captions


def image_key(image_id: str) -> str:
    """What all spellings of an image's id share: its number, or else its name.

    "val2014/COCO_val2014_000000391895.jpg" -> "391895", "images/a_dog.jpg" -> "a_dog".
    """
    stem = PurePath(image_id.strip()).stem
    number = re.fullmatch(r"(?:COCO_[a-z]+[0-9]+_)?0*([0-9]+)", stem)
    return number[1] if number else stem


def few(names: list[str]) -> str:
    """The first three names: 'a, b, c, …'."""
    return ", ".join(names[:3]) + ", …" * (len(names) > 3)


def unique_keys(ids: Iterable[str], source: str | Path) -> list[str]:
    """The key of each image. Raises InputError if an image appears twice."""
    keys = [image_key(image_id) for image_id in ids]
    if doubled := [key for key, count in Counter(keys).items() if count > 1]:
        raise InputError(f"{source}: {len(doubled):,} images are there twice: {few(doubled)}")
    return keys


def read_id_list(path: Path) -> list[str]:
    """The image ids in an `_ids.txt`. Raises InputError for none, or for one in two places."""
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    ids = [image_id for image_id, _ in groupby(lines)]  # older files repeat it for every caption
    if not unique_keys(ids, path):
        raise InputError(f"{path}: no image ids in it")
    return ids


def check_outputs(ids_file: Path, ids: list[str], option: str, *others: Path) -> None:
    """Raise InputError if `ids_file` exists and differs from `ids`, or if another output exists."""
    for path in others:
        if path.exists():
            raise InputError(f"{path}: exists already; remove it to write it again")
    if ids_file.is_file() and [*map(image_key, read_id_list(ids_file))] != [*map(image_key, ids)]:
        raise InputError(f"{ids_file}: other images or another order; keep it with {option}")
    check_targets(ids_file, *others)


def write_lines(path: Path, lines: list[str]) -> None:
    """Write the lines as UTF-8, each ending with LF."""
    write_text(path, "".join(f"{line}\n" for line in lines))
    print(f"{path}: {len(lines):,} lines")


class Image(NamedTuple):
    id: str
    split: str | None  # SCAN's name for it; COCO's own files have none
    captions: list[str]


def read_karpathy(path: Path) -> list[Image]:
    """The images of a dataset_*.json, in file order."""
    return [
        Image(
            id=str(entry.get("cocoid", entry["filename"])),
            split=SCAN_SPLIT[entry["split"]],
            captions=[sentence["raw"] for sentence in entry["sentences"]],
        )
        for entry in json.loads(path.read_bytes())["images"]
    ]


def read_coco(path: Path) -> list[Image]:
    """The images of a captions_*.json, each with its captions in the order of their ids."""
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
        coco = COCO(path)
    annotations = {image: coco.loadAnns(sorted(coco.getAnnIds(image))) for image in coco.imgs}
    return [Image(str(i), None, [a["caption"] for a in own]) for i, own in annotations.items()]


def read_images(opt: argparse.Namespace) -> dict[str, Image]:
    """The images of all files by their key. Raises InputError for a file of another format."""
    images, source = [], "COCO" if opt.coco else "Karpathy"
    for path in opt.coco or [opt.karpathy]:
        try:
            images += read_coco(path) if opt.coco else read_karpathy(path)
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise InputError(
                f"{path}: not {source}'s captions: {type(error).__name__}: {error}"
            ) from error
    return dict(zip(unique_keys((image.id for image in images), path), images, strict=True))


def choose_ids(images: dict[str, Image], split: str | None, order: Path | None) -> dict[str, list]:
    """The image ids of each split to write: all splits, or one split in a given order.

    Raises InputError if `order` names images that are unknown or in another of Karpathy's splits,
    so that no training image is tested on. A split with a new name may have any image.
    """
    splits = {name: [i.id for i in images.values() if i.split == name] for name in SPLITS}
    if len(splits["test"]) > COCO_1K:
        splits["testall"] = splits["test"]
    if order:
        ids, known = read_id_list(order), {*map(image_key, splits.get(split) or images)}
        unknown = [image_id for image_id in ids if image_key(image_id) not in known]
        if unknown:
            count = f"{len(unknown):,} of its {len(ids):,} images"
            raise InputError(f"{order}: {count} are not in the {split} split: {few(unknown)}")
        return {split: ids}
    splits["test"] = splits["test"][:COCO_1K]
    return {name: ids for name, ids in splits.items() if ids}


def first_captions(images: list[Image]) -> list[str]:
    """The first five captions of every image, each on one line. Raises InputError for fewer."""
    captions = [[" ".join(c.split()) for c in image.captions if c.strip()] for image in images]
    counts = [(image.id, len(own)) for image, own in zip(images, captions, strict=True)]
    if short := [f"{image} ({count})" for image, count in counts if count < PER_IMAGE]:
        raise InputError(f"{len(short):,} images have fewer than five captions: {few(short)}")
    return [caption for own in captions for caption in own[:PER_IMAGE]]


@one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("karpathy", nargs="?", type=Path, help="Karpathy's dataset_*.json")
    source.add_argument("--coco", nargs="+", type=Path, help="or COCO's own captions_*.json")
    add = parser.add_argument
    add("--data_path", default="./data", help="folder of the data sets")
    add("--data_name", required=True, help="the data set's folder in data_path")
    add("--split", help="write only this split, with its images in --order")
    add("--order", type=Path, help="file of image ids")
    opt = parser.parse_args()
    if bool(opt.split) != bool(opt.order) or (opt.coco and not opt.order):
        parser.error("--split NAME and --order FILE go together, and --coco needs them")
    images, outputs = read_images(opt), {}
    folder = Path(opt.data_path) / opt.data_name
    folder.mkdir(parents=True, exist_ok=True)
    for split, ids in choose_ids(images, opt.split, opt.order).items():
        caps, ids_file = folder / f"{split}_caps.txt", folder / f"{split}_ids.txt"
        check_outputs(ids_file, ids, "--order", caps)
        outputs[caps] = first_captions([images[image_key(image_id)] for image_id in ids])
        if not ids_file.is_file():
            outputs[ids_file] = ids
    for path, lines in outputs.items():
        write_lines(path, lines)


if __name__ == "__main__":
    main()
