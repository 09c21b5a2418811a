"""Captions and image ids in SCAN's layout, from Karpathy's splits or COCO's annotation files.

    python scripts/prepare_captions.py dataset_flickr30k.json --data_name f30k_precomp
    python scripts/prepare_captions.py dataset_coco.json --data_name coco_precomp

reads a file of Karpathy's caption_datasets.zip and writes

    DATA_PATH/DATA_NAME/{split}_caps.txt   one caption a line, the five of an image consecutive
    DATA_PATH/DATA_NAME/{split}_ids.txt    one image a line

for train (with Karpathy's restval, as in SCAN), dev (his val) and test. COCO's 5,000 test images
are testall, and the first 1,000 of them are test. An image's first five captions are taken.

The images come in Karpathy's order. If you have features already, take theirs with --split and
--order. COCO's own files know no dev and test, so they always need both:

    python scripts/prepare_captions.py --coco captions_train2014.json captions_val2014.json \\
        --data_name coco_precomp --split dev --order dev_ids.txt

Ids are compared without folder, suffix, COCO's prefix and leading zeros, so that
val2014/COCO_val2014_000000391895.jpg and 391895 are the same image. Nothing is written if an image
is missing, is there twice or has too few captions.
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
from pathlib import Path
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
    name = image_id.strip().rpartition("/")[2]
    stem = re.sub(r"\.(jpe?g|png|webp|bmp|gif|tiff?)$", "", name, flags=re.IGNORECASE)
    number = re.fullmatch(r"(?:COCO_[a-z]+[0-9]+_)?0*([0-9]+)", stem)
    return number[1] if number else stem


def few(names: list[str]) -> str:
    """'a, b, c, …'."""
    return ", ".join(names[:3]) + ", …" * (len(names) > 3)


def unique_keys(ids: Iterable[str], source: str | Path) -> list[str]:
    """The key of each image. Raises InputError if an image is there twice."""
    keys = [image_key(image_id) for image_id in ids]
    doubled = [key for key, count in Counter(keys).items() if count > 1]
    if doubled:
        raise InputError(f"{source}: {len(doubled):,} images are there twice: {few(doubled)}")
    return keys


def read_id_list(path: Path) -> list[str]:
    """The images of an `_ids.txt`, each once; older files repeat the line for every caption.

    Raises InputError if there are none, or an image is named in two places.
    """
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    ids = [image_id for image_id, _ in groupby(line.strip() for line in lines if line.strip())]
    if not unique_keys(ids, path):
        raise InputError(f"{path}: no image ids in it")
    return ids


def check_outputs(ids_file: Path, ids: list[str], option: str, *others: Path) -> None:
    """Raises InputError if `ids_file` has another order than `ids`, or another output exists."""
    for path in others:
        if path.exists():
            raise InputError(f"{path}: exists already; remove it to write it again")
    if ids_file.is_file() and [*map(image_key, read_id_list(ids_file))] != [*map(image_key, ids)]:
        raise InputError(f"{ids_file}: has other images or another order; keep it with {option}, "
                         "or remove it")  # fmt: skip
    check_targets(ids_file, *others)


def write_lines(path: Path, lines: list[str]) -> None:
    """UTF-8, each line ended with LF."""
    write_text(path, "".join(f"{line}\n" for line in lines))
    print(f"{path}: {len(lines):,} lines")


class Image(NamedTuple):
    id: str
    split: str | None  # SCAN's name for it; COCO's own files have none
    captions: list[str]


def read_karpathy(path: Path) -> list[Image]:
    """The images of a dataset_*.json, in file order."""
    images = []
    for entry in json.loads(path.read_bytes())["images"]:
        image_id = str(entry.get("cocoid", entry["filename"]))
        captions = [sentence["raw"] for sentence in entry["sentences"]]
        images.append(Image(image_id, SCAN_SPLIT[entry["split"]], captions))
    return images


def read_coco(path: Path) -> list[Image]:
    """The images of a captions_*.json, each with its captions in the order of their ids."""
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
        coco = COCO(path)
    images = []
    for image_id in coco.imgs:
        annotations = sorted(coco.imgToAnns[image_id], key=lambda annotation: annotation["id"])
        images.append(Image(str(image_id), None, [one["caption"] for one in annotations]))
    return images


def read_images(opt: argparse.Namespace) -> dict[str, Image]:
    """The images of all files by their key, in file order.

    Raises InputError if a file is of another kind, or an image is there twice.
    """
    images = []
    for path in opt.coco or [opt.karpathy]:
        try:
            images += read_coco(path) if opt.coco else read_karpathy(path)
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            expected = "COCO's captions_*.json" if opt.coco else "Karpathy's dataset_*.json"
            raise InputError(f"{path}: not as in {expected}: {error!r}") from error
    return dict(zip(unique_keys((image.id for image in images), path), images, strict=True))


def choose_ids(images: dict[str, Image], split: str | None, order: Path | None) -> dict[str, list]:
    """The image ids of each split to write.

    Raises InputError if `order` names images that are unknown or of another of Karpathy's splits:
    what was trained on must not be tested on. A split of a new name takes any image.
    """
    splits = {name: [i.id for i in images.values() if i.split == name] for name in SPLITS}
    splits["testall"] = splits["test"]
    if order:
        ids, known = read_id_list(order), {*map(image_key, splits.get(split) or images)}
        unknown = [image_id for image_id in ids if image_key(image_id) not in known]
        if unknown:
            raise InputError(
                f"{order}: {len(unknown):,} of its {len(ids):,} images are not in the {split} "
                f"split of the annotations: {few(unknown)}"
            )
        return {split: ids}
    splits["test"] = splits["testall"][:COCO_1K]
    if splits["test"] == splits["testall"]:
        del splits["testall"]
    return {name: ids for name, ids in splits.items() if ids}


def first_captions(images: list[Image]) -> list[str]:
    """The first five captions of every image, each on one line; empty ones do not count.

    Raises InputError if an image has fewer.
    """
    captions, short = [], []
    for image in images:
        own = [" ".join(caption.split()) for caption in image.captions if caption.strip()]
        captions += own[:PER_IMAGE]
        if len(own) < PER_IMAGE:
            short.append(f"{image.id} ({len(own)})")
    if short:
        raise InputError(f"{len(short):,} images have fewer than five captions: {few(short)}")
    return captions


@one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("karpathy", nargs="?", type=Path, help="Karpathy's dataset_*.json")
    source.add_argument("--coco", nargs="+", type=Path, help="or COCO's own captions_*.json")
    add = parser.add_argument
    add("--data_path", default="./data", help="folder of the data sets")
    add("--data_name", required=True, help="the data set's folder in data_path")
    add("--split", help="write one split only, in the --order of its images")
    add("--order", type=Path, help="file of image ids")
    opt = parser.parse_args()
    if bool(opt.split) != bool(opt.order) or (opt.coco and not opt.order):
        parser.error("--split NAME and --order FILE go together, and --coco needs them")
    images = read_images(opt)
    splits = choose_ids(images, opt.split, opt.order)
    folder = Path(opt.data_path) / opt.data_name
    folder.mkdir(parents=True, exist_ok=True)
    outputs = {}
    for split, ids in splits.items():
        caps, ids_file = folder / f"{split}_caps.txt", folder / f"{split}_ids.txt"
        check_outputs(ids_file, ids, "--order", caps)
        outputs[caps] = first_captions([images[image_key(image_id)] for image_id in ids])
        if not ids_file.is_file():
            outputs[ids_file] = ids
    for path, lines in outputs.items():
        write_lines(path, lines)


if __name__ == "__main__":
    main()
