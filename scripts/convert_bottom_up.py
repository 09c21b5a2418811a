"""Convert bottom-up-attention TSV files to region arrays in SCAN's layout.

    python scripts/convert_bottom_up.py trainval_36.zip --data_name coco_precomp --split dev \\
        --ids data/coco_precomp/dev_ids.txt

writes DATA_PATH/DATA_NAME/

    {split}_ims.npy    (n, 36, 2048) float32, or float16 with --dtype float16
    {split}_boxes.npy  (n, 36, 4) float32, x1 y1 x2 y2 as fractions of the picture
    {split}_ids.txt    one image per line

for the images named in --ids, in that order, from any number of files: plain, .gz, or .zip (every
.tsv in it is read). Nothing is written if an image is missing or appears twice, or if its row is
damaged or has another size. Memory: one row and the ids. Disk: 295 kB per image in float32.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import shutil
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from prepare_captions import check_outputs, few, image_key, read_id_list, write_lines

from utils import InputError, at_least, atomic_write, one_line, progress

FIELDS = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")


def unpacked(path: Path) -> Iterator[BinaryIO]:
    """The file, unpacked; for a .zip, every .tsv in it."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".tsv"):
                    with archive.open(name) as file:
                        yield file
    else:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield file


def read_rows(paths: list[Path]) -> Iterator[tuple[str, str, dict[str, bytes]]]:
    """All rows of the files: the file and line, the key of the image, and the columns.

    Raises InputError if a file is damaged, or a row has the wrong number of columns.
    """
    for path in paths:
        where = str(path)
        try:
            for file in unpacked(path):
                for number, line in enumerate(file, start=1):
                    where, columns = f"{path}, line {number}", line.rstrip(b"\r\n").split(b"\t")
                    if len(columns) != len(FIELDS):
                        raise InputError(f"{where}: expected the columns {', '.join(FIELDS)}")
                    key = image_key(columns[0].decode(errors="replace"))
                    yield where, key, dict(zip(FIELDS, columns, strict=True))
        except (EOFError, zlib.error, zipfile.BadZipFile, gzip.BadGzipFile) as error:
            raise InputError(f"{where}: damaged, or not whole: {error}") from error


def decode(text: bytes, shape: tuple[int, int], dtype: str = "float32") -> np.ndarray:
    """base64 of float32 -> a finite array of this shape. Raises ValueError for anything else."""
    text = text.removeprefix(b"b'").removesuffix(b"'")  # as Python 3 may have written it
    values = np.frombuffer(base64.b64decode(text, validate=True), "<f4")
    values = values.reshape(shape).astype(dtype)
    if not np.isfinite(values).all():
        raise ValueError(f"NaN, or numbers that {dtype} cannot hold")
    return values


def relative_boxes(row: dict[str, bytes], num_regions: int) -> np.ndarray:
    """(R, 4) x1 y1 x2 y2 as fractions of the picture. Raises ValueError for invalid boxes."""
    width, height = float(row["image_w"]), float(row["image_h"])
    boxes = decode(row["boxes"], (num_regions, 4)) / [width, height, width, height]
    inside = (boxes > -0.02) & (boxes < 1.02)  # detectors round: a box may extend a little outside
    if not inside.all() or (boxes[:, :2] > boxes[:, 2:]).any():
        raise ValueError(f"boxes are not x1 y1 x2 y2 in a picture of {width:g} × {height:g} pixels")
    return boxes.clip(0, 1).astype(np.float32)


class RowWriter:
    """Writes a .npy file of this shape, its rows in any order: `writer[k] = row`."""

    def __init__(self, file: BinaryIO, shape: tuple[int, ...], dtype: str) -> None:
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        self.file, self.start = file, file.tell()

    def __setitem__(self, k: int, row: np.ndarray) -> None:
        self.file.seek(self.start + k * row.nbytes)
        self.file.write(row.tobytes())


def convert_rows(
    opt: argparse.Namespace, ids: list[str], ims_file: BinaryIO, boxes_file: BinaryIO
) -> None:
    """Write the regions and boxes in the order of `ids`, each row as soon as it is read.

    Raises InputError if an image is missing or appears twice, or its row is invalid.
    """
    shape = (opt.num_regions, opt.img_dim)
    ims = RowWriter(ims_file, (len(ids), *shape), opt.dtype)
    boxes = RowWriter(boxes_file, (len(ids), opt.num_regions, 4), "float32")
    place = {image_key(image_id): k for k, image_id in enumerate(ids)}
    rows = ((where, place[key], row) for where, key, row in read_rows(opt.tsv) if key in place)
    times = np.zeros(len(ids), int)
    for where, k, row in progress(rows, len(ids), "converting"):
        times[k] += 1
        try:
            ims[k] = decode(row["features"], shape, opt.dtype)
            boxes[k] = relative_boxes(row, opt.num_regions)
        except ValueError as error:
            expected = f"{shape[0]} regions × {shape[1]}: --num_regions, --img_dim"
            raise InputError(f"{where}, image {ids[k]}: {error} (expected {expected})") from error
    for wrong, what in ((times == 0, "in none of the TSV files"), (times > 1, "there twice")):
        if wrong.any():
            names = few([ids[k] for k in wrong.nonzero()[0]])
            raise InputError(f"{wrong.sum():,} of {len(ids):,} images are {what}: {names}")


@one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("tsv", nargs="+", type=Path, help="TSV files, plain, .gz or .zip")
    add("--ids", required=True, type=Path, help="file of image ids, which sets the order")
    add("--data_path", default="./data", help="folder of the data sets")
    add("--data_name", required=True, help="the data set's folder in data_path")
    add("--split", default="test", help="prefix of the file names (test)")
    add("--num_regions", default=36, type=at_least(1), help="boxes in every row (36)")
    add("--img_dim", default=2048, type=at_least(1), help="size of every region feature (2048)")
    add("--dtype", default="float32", choices=["float32", "float16"], help="of the features")
    opt = parser.parse_args()
    ids, folder = read_id_list(opt.ids), Path(opt.data_path) / opt.data_name
    folder.mkdir(parents=True, exist_ok=True)
    ims, boxes, ids_file = (
        folder / f"{opt.split}_{kind}" for kind in ("ims.npy", "boxes.npy", "ids.txt")
    )
    check_outputs(ids_file, ids, "--ids", ims, boxes)
    size = len(ids) * opt.num_regions * (opt.img_dim * np.dtype(opt.dtype).itemsize + 4 * 4)
    if size > shutil.disk_usage(folder).free:
        raise InputError(f"{folder}: {size / 1e9:.2f} GB needed, and not free")

    def write_both(ims_file: BinaryIO) -> None:
        atomic_write(boxes, lambda boxes_file: convert_rows(opt, ids, ims_file, boxes_file))

    atomic_write(ims, write_both)
    print(f"{ims}: {len(ids):,} images × {opt.num_regions} × {opt.img_dim} {opt.dtype}")
    if not ids_file.is_file():
        write_lines(ids_file, ids)


if __name__ == "__main__":
    main()
