"""Bottom-up-attention TSV files to region arrays in SCAN's layout.

    python scripts/convert_bottom_up.py trainval_36.zip --data_name coco_precomp --split dev \\
        --ids data/coco_precomp/dev_ids.txt

writes DATA_PATH/DATA_NAME/

    {split}_ims.npy    (n, 36, 2048) float32, or float16 with --dtype float16
    {split}_boxes.npy  (n, 36, 4) float32, x1 y1 x2 y2 as shares of the picture, 0 to 1
    {split}_ids.txt    one image a line

from any number of files: plain, .gz, or .zip with every .tsv in it. --fields names the columns if
they are others than image_id, image_w, image_h, num_boxes, boxes, features.

With --ids the images have that file's order, and rows of other images are skipped. Without it all
rows are taken in file order, and the files are read twice. Nothing is written if an image is
missing or there twice, or if its row is damaged or of another size.

Memory: one row and the ids. Disk: 295 kB an image in float32, 33 GB for COCO's train.
"""

from __future__ import annotations

import argparse
import base64
import csv
import gzip
import io
import shutil
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

import numpy as np
from numpy.lib.format import open_memmap

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from prepare_captions import check_outputs, few, image_key, read_id_list, unique_keys, write_lines

from utils import InputError, at_least, atomic_write, one_line, progress
from vocab import read_captions

FIELDS = ["image_id", "image_w", "image_h", "num_boxes", "boxes", "features"]
DAMAGE = (UnicodeError, EOFError, csv.Error, zlib.error, zipfile.BadZipFile, gzip.BadGzipFile)


def open_texts(path: Path) -> Iterator[TextIO]:
    """The file as text, unpacked; of an archive every .tsv."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".tsv"):
                    with archive.open(name) as file:
                        yield io.TextIOWrapper(file, encoding="utf-8", newline="")
    else:
        open_text = gzip.open if path.suffix == ".gz" else open
        with open_text(path, "rt", encoding="utf-8", newline="") as file:
            yield file


def read_rows(opt: argparse.Namespace) -> Iterator[tuple[str, dict[str, str]]]:
    """All rows of the files, and where each stands.

    Raises InputError if a file is damaged or has no rows, or a row other columns.
    """
    csv.field_size_limit(2**26)  # features of 36 regions have 393,216 characters
    for path in opt.tsv:
        where = ""
        try:
            for file in open_texts(path):
                rows = csv.DictReader(file, opt.fields, delimiter="\t", quoting=csv.QUOTE_NONE)
                for row in rows:
                    where = f"{path}, line {rows.line_num}"
                    if None in row or None in row.values():
                        raise InputError(f"{where}: not the {len(opt.fields)} columns of --fields")
                    yield where, row
        except DAMAGE as error:
            raise InputError(f"{where or path}: damaged, or not whole: {error}") from error
        if not where:
            raise InputError(f"{path}: no TSV rows in it")


def decode(text: str, shape: tuple[int, int], dtype: str = "float32") -> np.ndarray:
    """base64 of float32 -> an array of this shape. Raises ValueError if it is not, or not finite.

    If Python 3 wrote it, it may be wrapped as b'…'.
    """
    content = base64.b64decode(text.removeprefix("b'").removesuffix("'"), validate=True)
    values = np.frombuffer(content, "<f4").reshape(shape).astype(dtype)
    if not np.isfinite(values).all():
        raise ValueError(f"NaN, or numbers that {dtype} cannot hold")
    return values


def relative_boxes(row: dict[str, str], num_regions: int) -> np.ndarray:
    """(num_regions, 4) x1 y1 x2 y2 as shares of the picture. Raises ValueError if they are not."""
    width, height = float(row["image_w"]), float(row["image_h"])
    boxes = decode(row["boxes"], (num_regions, 4)) / [width, height, width, height]
    inside = (boxes > -0.02) & (boxes < 1.02)  # detectors round: it may reach out a little
    if not inside.all() or (boxes[:, :2] > boxes[:, 2:]).any():
        raise ValueError(
            f"boxes that are not x1 y1 x2 y2 in a picture of {width:.0f} × {height:.0f} pixels; "
            f"are image_w and image_h the other way round in --fields?"
        )
    return boxes.clip(0, 1).astype(np.float32)


def convert_rows(
    opt: argparse.Namespace, ids: list[str], ims_file: BinaryIO, boxes_file: BinaryIO
) -> None:
    """Write the regions and boxes of the images, in the order of `ids`.

    Raises InputError if an image is missing or there twice, or its row is wrong.
    """
    shape = (opt.num_regions, opt.img_dim)
    # numpy makes the files; rows are written as plain bytes, since a full disk is an OSError then,
    # where a memory map would end the process.
    ims_start = open_memmap(ims_file.name, "w+", opt.dtype, (len(ids), *shape)).offset
    boxes_start = open_memmap(boxes_file.name, "w+", "f4", (len(ids), opt.num_regions, 4)).offset
    place = {image_key(image_id): k for k, image_id in enumerate(ids)}
    all_rows = ((where, image_key(row["image_id"]), row) for where, row in read_rows(opt))
    rows = ((where, place[key], row) for where, key, row in all_rows if key in place)
    times = np.zeros(len(ids), int)
    for where, k, row in progress(rows, len(ids), "converting"):
        times[k] += 1
        try:
            regions = decode(row["features"], shape, opt.dtype)
            boxes = relative_boxes(row, opt.num_regions)
        except ValueError as error:
            raise InputError(
                f"{where}, image {ids[k]}: {error} (expected base64 of float32, {shape[0]} regions "
                f"× {shape[1]}; --num_regions, --img_dim, --fields)"
            ) from error
        for file, start, values in (
            (ims_file, ims_start, regions), (boxes_file, boxes_start, boxes),
        ):  # fmt: skip
            file.seek(start + k * values.nbytes)
            file.write(values.tobytes())
    for wrong, what in ((times == 0, "in none of the TSV files"), (times > 1, "there twice")):
        if wrong.any():
            names = few([ids[k] for k in wrong.nonzero()[0]])
            raise InputError(f"{wrong.sum():,} of {len(ids):,} images are {what}: {names}")


def convert(opt: argparse.Namespace) -> None:
    """Check what can be checked beforehand, then write. Raises InputError."""
    missing = [name for name in FIELDS if name not in opt.fields and name != "num_boxes"]
    if missing:
        raise InputError(f"--fields: {', '.join(missing)} missing")
    ids = read_id_list(opt.ids) if opt.ids else [row["image_id"] for _, row in read_rows(opt)]
    unique_keys(ids, opt.ids or few([*map(str, opt.tsv)]))

    folder = Path(opt.data_path) / opt.data_name
    folder.mkdir(parents=True, exist_ok=True)
    ims, boxes, caps, ids_file = (
        folder / f"{opt.split}_{kind}" for kind in ("ims.npy", "boxes.npy", "caps.txt", "ids.txt")
    )
    check_outputs(ids_file, ids, "--ids", ims, boxes)
    if caps.is_file() and len(read_captions(caps)) % len(ids):
        raise InputError(f"{caps}: {len(read_captions(caps)):,} captions, but {len(ids):,} images")
    size = len(ids) * opt.num_regions * (opt.img_dim * np.dtype(opt.dtype).itemsize + 16)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise InputError(f"{folder}: {size / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")

    def write_both(ims_file: BinaryIO) -> None:
        atomic_write(boxes, lambda boxes_file: convert_rows(opt, ids, ims_file, boxes_file))

    atomic_write(ims, write_both)
    print(f"{ims}: {len(ids):,} images × {opt.num_regions} × {opt.img_dim} {opt.dtype}")
    if not ids_file.is_file():
        write_lines(ids_file, ids)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("tsv", nargs="+", type=Path, help="TSV files, plain, .gz or .zip")
    add("--data_path", default="./data", help="folder of the data sets")
    add("--data_name", required=True, help="the data set's folder in data_path")
    add("--split", default="test", help="the file names begin with it (test)")
    add("--ids", type=Path, help="file of image ids: the images to take, in that order")
    add("--fields", default=FIELDS, type=lambda text: text.split(","), help=",".join(FIELDS))
    add("--num_regions", default=36, type=at_least(1), help="boxes in every row (36)")
    add("--img_dim", default=2048, type=at_least(1), help="numbers in every feature (2048)")
    add("--dtype", default="float32", choices=["float32", "float16"], help="of the regions")
    return parser


@one_line
def main() -> None:
    convert(options().parse_args())


if __name__ == "__main__":
    main()
