"""Bottom-up-attention TSV files to region arrays in SCAN's layout.

    python scripts/prepare_captions.py dataset_coco.json --data_name coco_precomp
    python scripts/convert_bottom_up.py trainval_36.zip --data_name coco_precomp --split dev \\
        --ids data/coco_precomp/dev_ids.txt

writes DATA_PATH/DATA_NAME/

    {split}_ims.npy    (n, 36, 2048) float32, or float16 with --dtype float16
    {split}_boxes.npy  (n, 36, 4) float32, x1 y1 x2 y2 as shares of the picture, 0 to 1, whatever
                       size it is shown at; --boxes pixels keeps the file's numbers
    {split}_ids.txt    one image a line

Any number of files, plain, .gz or .zip (every .tsv in it), one image a line: image_id, image_w,
image_h, num_boxes, boxes, features, separated by tabs, the last two base64 of float32. Columns in
another order, or more of them, are named with --fields; names that are not these six are skipped:

    --fields image_id,image_h,image_w,_,_,_,_,num_boxes,boxes,features

Without a column `boxes` no boxes are written. base64 that Python 3 wrapped into b'…' is taken too.

With --ids the images have that file's order, and other rows are skipped without being decoded; ids
are compared without folder, suffix, COCO's prefix and leading zeros
(COCO_val2014_000000391895.jpg is 391895). Without --ids all rows are taken, in file order.

An image that is missing or stands there twice, another number of regions than --num_regions,
numbers that are not finite, and boxes that reach out of the picture end the conversion; then
nothing is written.

Memory: one row (a line may have 64 MB) and the ids, however large the files. Disk: 295 kB an image
in float32, 33 GB for COCO's train. Time: one pass over the files.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import itertools
import math
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
from prepare_captions import (
    few,
    ids_to_write,
    image_key,
    new_files,
    print_table,
    read_id_list,
    refuse_existing,
    split_name,
)

from errors import InputError, one_line
from evaluation import progress
from train import at_least
from vocab import read_captions

FIELDS = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")
LONGEST = 64 * 2**20  # bytes of a line; a hundred boxes need 1.1 MB
FLOAT = np.dtype("<f4")


class Row(NamedTuple):
    """A line of a TSV file."""

    where: str
    fields: dict[str, bytes]
    share: float  # of all files, read so far


class RowFile:
    """A .npy array written row by row, in any order; how many there are may be known at the end.

    Plain writes: a full disk is an error here, where a memory map would end the process.
    """

    def __init__(self, file: BinaryIO, row_shape: tuple[int, ...], dtype: str) -> None:
        self._file, self._row_shape, self._dtype = file, row_shape, np.dtype(dtype)
        self._write_header(0)
        self._start = file.tell()
        self._row_bytes = self._dtype.itemsize * math.prod(row_shape)

    def _write_header(self, n_rows: int) -> None:
        # numpy leaves room in a header for its first dimension to grow.
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (n_rows, *self._row_shape),
        }
        self._file.seek(0)
        np.lib.format.write_array_header_1_0(self._file, header)

    def __setitem__(self, row: int, values: np.ndarray) -> None:
        self._file.seek(self._start + row * self._row_bytes)
        self._file.write(np.ascontiguousarray(values, self._dtype).data)

    def finish(self, n_rows: int) -> None:
        self._write_header(n_rows)
        assert self._file.tell() == self._start


class Places:
    """Which row of the arrays an image gets, and what was skipped, doubled and missing.

    ids: the images to take, in their order; None takes all, in the order they come.
    """

    def __init__(self, ids: list[str] | None) -> None:
        self.ids: list[str] = ids or []
        self.wanted = None if ids is None else {image_key(name): k for k, name in enumerate(ids)}
        self.seen: set[str] = set()
        self.twice: list[str] = []
        self.skipped = 0
        self.example = ""  # an image that was skipped

    def row_of(self, name: str) -> int | None:
        """The image's row, or None where it is not to be written."""
        key = image_key(name)
        if self.wanted is not None and key not in self.wanted:
            self.skipped += 1
            self.example = self.example or name
            return None
        if key in self.seen:
            self.twice.append(name)
            return None
        self.seen.add(key)
        if self.wanted is not None:
            return self.wanted[key]
        self.ids.append(name)
        return len(self.ids) - 1

    def check(self, ids: Path | None) -> None:
        """
        Raises:
            InputError: if images are missing, or were there more than once.
        """
        if self.twice:
            raise InputError(
                f"{len(self.twice):,} rows are of images that had one before: {few(self.twice)}; "
                f"nothing was written"
            )
        missing = [name for name in self.ids if image_key(name) not in self.seen]
        if missing:
            like = f" (ids there look like {self.example})" if self.example else ""
            raise InputError(
                f"{ids}: {len(missing):,} of its {len(self.ids):,} images are in none of the TSV "
                f"files: {few(missing)}{like}; nothing was written"
            )


# -- reading --------------------------------------------------------------------------------------


def members(raw: BinaryIO) -> Iterator[tuple[str, BinaryIO]]:
    """The TSV files in an open file: itself, unpacked, or all of an archive, with their names."""
    magic = raw.read(4)
    raw.seek(0)
    if magic[:2] == b"\x1f\x8b":
        with gzip.open(raw) as file:
            yield "", file
    elif magic == b"PK\x03\x04":
        with zipfile.ZipFile(raw) as archive:
            names = [name for name in archive.namelist() if name.lower().endswith(".tsv")]
            if not names:
                raise ValueError("no .tsv in the archive")
            for name in names:
                with archive.open(name) as file:
                    yield f" ({name})", file
    else:
        yield "", raw


def lines_of(path: Path) -> Iterator[tuple[str, bytes, int]]:
    """The lines of a TSV file: where each stands, its bytes, and how far the file is read."""
    with path.open("rb") as raw:
        where = f"{path}"
        try:
            for name, file in members(raw):
                for number in itertools.count(1):
                    where = f"{path}{name}, line {number}"
                    line = file.readline(LONGEST + 1)
                    if not line:
                        break
                    if len(line) > LONGEST:
                        raise ValueError(f"a line longer than {LONGEST // 2**20} MB")
                    line = line.rstrip(b"\r\n")
                    if line:
                        yield where, line, raw.tell()
        except Exception as error:  # whatever the unpackers say of damaged bytes
            raise InputError(f"{where}: not a TSV file, or a damaged one: {error}") from error


def rows(paths: list[Path], fields: list[str]) -> Iterator[Row]:
    """The rows of all files.

    Raises:
        InputError: if a file has none, or one has another number of columns.
    """
    sizes = [path.stat().st_size for path in paths]
    before = 0
    for path, size in zip(paths, sizes, strict=True):
        found = False
        for where, line, position in lines_of(path):
            found, values = True, line.split(b"\t")
            if len(values) != len(fields):
                raise InputError(
                    f"{where}: {len(values)} columns, expected {len(fields)}: {', '.join(fields)}; "
                    f"cut off? (other columns are named with --fields)"
                )
            share = (before + min(position, size)) / sum(sizes)
            yield Row(where, dict(zip(fields, values, strict=True)), share)
        if not found:
            raise InputError(f"{path}: no rows in it; was it downloaded whole?")
        before += size


def number(row: Row, field: str, kind: type = float) -> float:
    """A positive number of a row."""
    text = row.fields[field]
    try:
        value = kind(text)
        if not 0 < value < math.inf:
            raise ValueError
    except ValueError:
        raise InputError(
            f"{row.where}: {field} is {text[:40].decode('utf-8', 'replace')!r}, expected a number; "
            f"a line of column names, or columns in another order? --fields names them"
        ) from None
    return value


def floats(text: bytes, shape: tuple[int, int], what: str) -> np.ndarray:
    """base64 of float32 -> an array of this shape, all finite.

    Raises:
        InputError: beginning with `what`, if it is none.
    """
    if text[:2] in (b"b'", b'b"') and text[-1:] == text[1:2]:
        text = text[2:-1]
    try:
        content = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise InputError(f"{what} are not base64, or cut off: {error}") from error
    if len(content) != FLOAT.itemsize * math.prod(shape):
        raise InputError(
            f"{what} have {len(content):,} bytes, expected {FLOAT.itemsize * math.prod(shape):,} "
            f"({shape[0]} × {shape[1]} float32)"
        )
    values = np.frombuffer(content, FLOAT).reshape(shape)
    if not np.isfinite(values).all():
        raise InputError(f"{what} hold NaN or infinite numbers")
    return values


def read_features(row: Row, name: str, opt: argparse.Namespace) -> np.ndarray:
    """A row's features, (num_regions, img_dim) of the dtype asked for."""
    n_boxes = number(row, "num_boxes", int)
    if n_boxes != opt.num_regions:
        raise InputError(
            f"{row.where}: image {name} has {n_boxes} boxes, expected {opt.num_regions} in every "
            f"row (--num_regions); of files with 10 to 100 boxes an image take the one with 36"
        )
    shape = (opt.num_regions, opt.img_dim)
    what = f"{row.where}: image {name}: the features"
    features = floats(row.fields["features"], shape, f"{what} (--img_dim {opt.img_dim})")
    with np.errstate(over="ignore"):
        features = features.astype(opt.dtype)
    if not np.isfinite(features).all():
        raise InputError(f"{what} are too large for --dtype {opt.dtype}")
    return features


def read_boxes(row: Row, name: str, opt: argparse.Namespace) -> np.ndarray:
    """A row's boxes, (num_regions, 4) x1 y1 x2 y2, as shares of the picture or in pixels.

    Detectors round: a box may reach a pixel, or a hundredth, out of the picture.
    """
    what = f"{row.where}: image {name}: the boxes"
    boxes = floats(row.fields["boxes"], (opt.num_regions, 4), what)
    if (boxes[:, :2] > boxes[:, 2:]).any():
        raise InputError(f"{what} end before they begin; expected x1 y1 x2 y2")
    if "image_w" not in row.fields or "image_h" not in row.fields:
        return boxes
    width, height = number(row, "image_w"), number(row, "image_h")
    size = np.array([width, height, width, height], np.float32)
    slack = 1 + 0.01 * size
    if (boxes < -slack).any() or (boxes > size + slack).any():
        x, y = boxes[:, 2].max(), boxes[:, 3].max()
        raise InputError(
            f"{what} reach to {x:.0f}, {y:.0f}, out of the picture of {width:.0f} × {height:.0f} "
            f"pixels; are image_w and image_h the other way round? --fields names the columns"
        )
    return np.clip(boxes / size, 0, 1) if opt.boxes == "relative" else boxes


# -- the command line -----------------------------------------------------------------------------


def convert(
    opt: argparse.Namespace,
    fields: list[str],
    places: Places,
    features: RowFile,
    boxes: RowFile | None,
) -> Iterator[int]:
    """Write every row that is wanted; yields the percents of the files that have been read."""
    told = 0
    for row in rows(opt.tsv, fields):
        try:
            name = row.fields["image_id"].decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise InputError(f"{row.where}: an image_id that is not UTF-8: {error}") from error
        if not name or len(name.splitlines()) > 1 or "\0" in name:
            raise InputError(f"{row.where}: image_id is {name!r:.60}, expected a name or number")
        place = places.row_of(name)
        if place is not None:
            features[place] = read_features(row, name, opt)
            if boxes is not None:
                boxes[place] = read_boxes(row, name, opt)
        while told < int(100 * row.share):
            told += 1
            yield told


def check_fields(opt: argparse.Namespace) -> list[str]:
    """The names of the columns.

    Raises:
        InputError: if one that is needed is not among them, or stands there twice.
    """
    fields = [field.strip() for field in opt.fields.split(",")]
    needed = {"image_id", "num_boxes", "features"}
    if opt.boxes == "relative" and "boxes" in fields:
        needed |= {"image_w", "image_h"}
    lacking = [field for field in FIELDS if field in needed and field not in fields]
    twice = [field for field in FIELDS if fields.count(field) > 1]
    if lacking or twice:
        what = f"lacks {', '.join(lacking)}" if lacking else f"has {', '.join(twice)} twice"
        raise InputError(f"--fields {opt.fields}: {what}; the names are {','.join(FIELDS)}")
    return fields


def check_captions(caps: Path, n_images: int) -> None:
    """
    Raises:
        InputError: if the split's captions are there and are not of so many images.
    """
    if caps.is_file() and (n_captions := len(read_captions(caps))) % n_images:
        raise InputError(
            f"{caps}: {n_captions:,} captions do not fit {n_images:,} images; nothing was written"
        )


def run(opt: argparse.Namespace) -> None:
    fields = check_fields(opt)
    folder = Path(opt.data_path) / opt.data_name
    ims, boxes, caps, ids = (
        folder / f"{opt.split}_{kind}" for kind in ("ims.npy", "boxes.npy", "caps.txt", "ids.txt")
    )
    with_boxes = "boxes" in fields
    refuse_existing([ims, boxes], opt.overwrite)
    places = Places(None if opt.ids is None else read_id_list(opt.ids))
    if opt.ids:
        check_captions(caps, len(places.ids))
        ids_to_write(ids, places.ids, caps, "--ids", opt.overwrite)
        check_space(folder, len(places.ids), opt)
    elif ids.exists() and (caps.is_file() or not opt.overwrite):
        raise InputError(
            f"{ids}: is there already; --ids {ids} takes its images in its order (or remove it)"
        )

    with new_files() as create:
        shape = (opt.num_regions, opt.img_dim)
        arrays = [RowFile(create(ims), shape, opt.dtype)]
        if with_boxes:
            arrays.append(RowFile(create(boxes), (opt.num_regions, 4), "float32"))
        work = convert(opt, fields, places, arrays[0], arrays[1] if with_boxes else None)
        for _ in progress(work, 100, "converting, percent read"):
            pass
        places.check(opt.ids)
        check_captions(caps, len(places.ids))
        for array in arrays:
            array.finish(len(places.ids))
        if ids_to_write(ids, places.ids, caps, "--ids", opt.overwrite):
            create(ids).write("".join(f"{name}\n" for name in places.ids).encode("utf-8"))
    if not with_boxes:
        boxes.unlink(missing_ok=True)  # those of the regions that were replaced
    print_table(
        [
            ("split", "images", "regions", "boxes", "skipped", "MB", "file"),
            (
                opt.split, f"{len(places.ids):,}", f"{shape[0]} × {shape[1]} {opt.dtype}",
                opt.boxes if with_boxes else "none", f"{places.skipped:,}",
                f"{ims.stat().st_size / 1e6:,.1f}", str(ims),
            ),
        ]
    )  # fmt: skip


def check_space(folder: Path, n_images: int, opt: argparse.Namespace) -> None:
    """
    Raises:
        InputError: if the regions do not fit the disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    need = n_images * opt.num_regions * (opt.img_dim * np.dtype(opt.dtype).itemsize + 16)
    free = shutil.disk_usage(folder).free
    if need > free:
        raise InputError(
            f"{folder}: {need / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free; --data_path names "
            f"another disk, --dtype float16 halves what float32 needs"
        )


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("tsv", nargs="+", type=Path, help="TSV files, plain, .gz or .zip")
    add("--data_path", default="./data", help="folder of the data sets")
    add("--data_name", required=True, help="the data set's folder in data_path")
    add("--split", default="test", type=split_name, help="the names of the files begin with it")
    add("--ids", default=None, type=Path, help="file of the images wanted, in that order")
    add("--fields", default=",".join(FIELDS), help="the columns")
    add("--num_regions", default=36, type=at_least(1), help="boxes in every row")
    add("--img_dim", default=2048, type=at_least(1), help="numbers in every feature")
    add("--dtype", default="float32", choices=["float32", "float16"], help="of the regions")
    add("--boxes", default="relative", choices=["relative", "pixels"], help="unit of the boxes")
    add("--overwrite", default=False, action="store_true", help="replace what is there")
    return parser


@one_line
def main() -> None:
    run(options().parse_args())


if __name__ == "__main__":
    main()
