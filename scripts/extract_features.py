"""Anyone's pictures as regions, in SCAN's layout.

    python scripts/extract_features.py PHOTOS --data_name mine              # EfficientNet-Lite2
    python scripts/extract_features.py PHOTOS --data_name mine --backbone facebook/dinov2-base
    python scripts/extract_features.py a.jpg b.jpg --data_name mine --project projection.npz

writes DATA_PATH/DATA_NAME/

    {split}_ims.npy        (n, regions, channels) float32, or float16 with --dtype float16
    {split}_boxes.npy      (n, regions, 4) float32, x1 y1 x2 y2 as shares of the picture
    {split}_ids.txt        the pictures' names, one a line
    {split}_features.json  how they were made

Folders are searched for pictures (with their subfolders), which are sorted by name; with --ids FILE
it is the pictures named there, in that order, so that features fit captions that exist already.
Pictures that cannot be read are named and left out (with --ids: an error, at the end).

What is done is kept: started again with the same options, it goes on where it was stopped. Memory
does not grow with the number of pictures. Backbones are described in features.py.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from errors import InputError, one_line
from evaluation import progress, select_device, write_whole
from features import Extractor, Recipe, read_picture
from train import at_least

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def find_pictures(paths: list[Path]) -> dict[str, Path]:
    """The pictures named, and those in the folders named: {id: file}, sorted by id.

    A picture's id is its path below the folder named, or its file name.

    Raises:
        InputError: for a path that is not there, no picture at all, or two of one id.
    """
    found: dict[str, Path] = {}
    for path in paths:
        if path.is_dir():
            files = [f for f in path.rglob("*") if f.suffix.lower() in PICTURES and f.is_file()]
            named = {file.relative_to(path).as_posix(): file for file in files}
        elif path.is_file():
            named = {path.name: path}
        else:
            raise InputError(f"{path}: no such picture or folder")
        for name, file in named.items():
            if name in found and found[name] != file:
                raise InputError(f"{file} and {found[name]}: two pictures of one name, {name}")
            found[name] = file
    if not found:
        raise InputError(
            f"{', '.join(map(str, paths))}: no pictures ({' '.join(sorted(PICTURES))})"
        )
    return dict(sorted(found.items()))


def in_order_of(ids: Path, found: dict[str, Path]) -> dict[str, Path]:
    """The pictures that a file of ids names, in its order; ids may leave out the suffix.

    Raises:
        InputError: if one is not among the pictures, or stands there twice.
    """
    try:
        names = [line.strip() for line in ids.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise InputError(f"{ids}: not UTF-8: {error}") from error
    by_stem = {Path(name).with_suffix("").as_posix(): name for name in found}
    missing = [name for name in names if name not in found and name not in by_stem]
    if missing:
        raise InputError(
            f"{ids}: {len(missing)} of {len(names)} have no picture, e.g. {missing[0]}"
        )
    if len(set(names)) < len(names):
        raise InputError(f"{ids}: {len(names) - len(set(names))} ids stand there more than once")
    return {name: found[name if name in found else by_stem[name]] for name in names}


class Unfinished:
    """What has been extracted so far, in a folder of its own beside the result.

    regions.npy (n, R, img_dim) is filled row by row; done.txt has a line for each picture handled,
    "+" or why it could not be read; task.json says what they belong to.
    """

    def __init__(self, folder: Path, task: dict, shape: tuple[int, ...], dtype: str) -> None:
        self.folder = folder
        record, regions, done = (folder / f for f in ("task.json", "regions.npy", "done.txt"))
        text = json.dumps(task)
        if record.is_file() and record.read_text(encoding="utf-8") == text:
            self.regions = np.load(regions, mmap_mode="r+", allow_pickle=False)
            lines = done.read_text(encoding="utf-8").split("\n")[:-1]  # a torn line is done again
            done.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            self.said = lines
        else:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            need, free = np.dtype(dtype).itemsize * int(np.prod(shape)), shutil.disk_usage(folder)
            if need > free.free:
                raise InputError(
                    f"{folder}: {need / 1e9:.1f} GB needed, {free.free / 1e9:.1f} free"
                )
            self.regions = np.lib.format.open_memmap(regions, mode="w+", dtype=dtype, shape=shape)
            done.touch()
            record.write_text(text, encoding="utf-8")
            self.said = []
        self._done = done.open("a", encoding="utf-8")

    def add(self, regions: list[np.ndarray | str]) -> None:
        """The next pictures: their regions, or why there are none."""
        for row, value in enumerate(regions, start=len(self.said)):
            if not isinstance(value, str):
                self.regions[row] = value
        self.regions.flush()
        lines = [value if isinstance(value, str) else "+" for value in regions]
        self._done.write("".join(f"{line}\n" for line in lines))
        self._done.flush()
        os.fsync(self._done.fileno())
        self.said += lines

    def finish(self, target: Path) -> None:
        """The regions of the pictures that could be read become `target`; the rest is removed."""
        self._done.close()
        good = np.array([line == "+" for line in self.said])
        source = self.folder / "regions.npy"
        if not good.all():
            whole, source = self.regions, self.folder / "readable.npy"
            kept = np.lib.format.open_memmap(
                source, mode="w+", dtype=whole.dtype, shape=(int(good.sum()), *whole.shape[1:])
            )
            for row, of in enumerate(np.flatnonzero(good)):
                kept[row] = whole[of]
            kept.flush()
        os.replace(source, target)
        shutil.rmtree(self.folder)


def blocks(files: list[Path], size: int) -> Iterator[list]:
    """Pictures, or why they cannot be read, `size` at a time; the next are read meanwhile."""

    def read(file: Path) -> object:
        try:
            return read_picture(file)
        except InputError as error:
            return " ".join(str(error).split())

    with ThreadPoolExecutor(4) as pool:
        chunks = [files[start : start + size] for start in range(0, len(files), size)]
        coming = [pool.submit(read, file) for file in (chunks[0] if chunks else [])]
        for following in [*chunks[1:], []]:
            now, coming = coming, [pool.submit(read, file) for file in following]
            yield [picture.result() for picture in now]


def extract(
    extractor: Extractor, files: list[Path], unfinished: Unfinished, batch_size: int
) -> None:
    """The pictures that are not done yet, batch by batch."""
    left = files[len(unfinished.said) :]
    if len(left) < len(files):
        print(f"going on: {len(files) - len(left):,} of {len(files):,} pictures are done")
    total = -(-len(left) // batch_size)
    for block in progress(blocks(left, batch_size), total, "extracting"):
        pictures = [picture for picture in block if not isinstance(picture, str)]
        regions = iter(extractor(pictures).numpy() if pictures else ())
        unfinished.add([p if isinstance(p, str) else next(regions) for p in block])


def run(opt: argparse.Namespace) -> None:
    files = find_pictures(opt.pictures)
    if opt.ids:
        files = in_order_of(opt.ids, files)
    folder = Path(opt.data_path) / opt.data_name
    ims, boxes, ids, how = (
        folder / f"{opt.split}_{kind}"
        for kind in ("ims.npy", "boxes.npy", "ids.txt", "features.json")
    )
    if ims.exists() and not opt.overwrite:
        raise InputError(f"{ims}: is there already; --overwrite replaces it")
    project = str(opt.project.resolve()) if opt.project else None
    recipe = Recipe(opt.backbone, opt.grid, opt.size, project)
    extractor = Extractor(recipe, select_device(opt.device))
    shape = (len(files), len(extractor.boxes), extractor.img_dim)
    task = {
        "recipe": recipe._asdict(), "dtype": opt.dtype, "shape": shape,
        "pictures": {name: str(file.resolve()) for name, file in files.items()},
    }  # fmt: skip
    unfinished = Unfinished(folder / f".{opt.split}_extracting", task, shape, opt.dtype)
    extract(extractor, list(files.values()), unfinished, opt.batch_size)

    unread = [line for line in unfinished.said if line != "+"]
    for line in unread:
        print(f"left out: {line}", file=sys.stderr)
    if len(unread) == len(files) or (unread and opt.ids):
        raise InputError(
            f"{len(unread)} of {len(files)} pictures cannot be read, e.g. {unread[0]}; "
            "nothing was written"
        )
    names = [name for name, line in zip(files, unfinished.said, strict=True) if line == "+"]
    write_whole(
        boxes, lambda file: np.save(file, np.repeat(extractor.boxes[None], len(names), axis=0))
    )
    write_whole(ids, lambda file: file.write("".join(f"{name}\n" for name in names).encode()))
    made = {"recipe": recipe._asdict(), "pictures": [str(p.resolve()) for p in opt.pictures]}
    write_whole(how, lambda file: file.write(json.dumps(made, indent=1).encode()))
    unfinished.finish(ims)
    size = ims.stat().st_size / 1e6
    print(f"{ims}: {len(names):,} pictures, {shape[1]} regions × {shape[2]}, {size:.1f} MB"
          + f"; {len(unread)} left out" * bool(unread))  # fmt: skip


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Pictures to regions.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("pictures", nargs="+", type=Path, help="picture files, and folders of them")
    add("--data_path", default="./data", help="folder of the data sets")
    add("--data_name", required=True, help="the data set's folder in data_path")
    add("--split", default="test", help="the names of the files begin with it")
    add("--backbone", default="efficientnet-lite2", help="or scenes, or a model of transformers")
    add("--grid", default=6, type=at_least(0), help="cells a side; 0 = every patch")
    add("--size", default=None, type=at_least(16), help="pixels a side; None = the backbone's own")
    add("--project", default=None, type=Path, help=".npz of a linear projection of the regions")
    add("--dtype", default="float32", choices=["float32", "float16"], help="of the regions")
    add("--ids", default=None, type=Path, help="file of the pictures wanted, in that order")
    add("--batch_size", default=32, type=at_least(1), help="pictures at a time")
    add("--overwrite", default=False, action="store_true", help="replace what is there")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


@one_line
def main() -> None:
    run(options().parse_args())


if __name__ == "__main__":
    main()
