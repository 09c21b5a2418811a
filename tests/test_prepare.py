"""Captions from Karpathy's and COCO's files, regions from bottom-up TSV files, and both."""

import base64
import builtins
import gzip
import json
import resource
import sys
import tracemalloc
import zipfile
from pathlib import Path

import convert_bottom_up
import numpy as np
import prepare_captions
import pytest
from prepare_captions import few, image_key, new_files, read_id_list
from test_commands import refused, run

from data import PrecompDataset, read_boxes, read_ids
from errors import InputError
from vocab import build_vocab, read_captions

REGIONS, WIDTH = 4, 6
SMALL = ["--data_name", "mine", "--num_regions", str(REGIONS), "--img_dim", str(WIDTH)]


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def prepare(*arguments):
    """Work of prepare_captions.py, in this process."""
    opt = prepare_captions.options().parse_args(["--data_name", "mine", *map(str, arguments)])
    prepare_captions.run(opt)


def convert(*arguments):
    """Work of convert_bottom_up.py, in this process, on small regions."""
    opt = convert_bottom_up.options().parse_args([*SMALL, *map(str, arguments)])
    convert_bottom_up.run(opt)


def error_of(work, *arguments):
    """What a refused call says; nothing is left half-written."""
    with pytest.raises(InputError) as error:
        work(*arguments)
    assert not leftovers()
    return str(error.value)


def leftovers():
    return [str(file) for file in Path().rglob("*.tmp")]


def snapshot(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def lines(path):
    return path.read_text(encoding="utf-8").splitlines()


# -- Karpathy's files -----------------------------------------------------------------------------


def caption(image, k):
    return f"caption {k} of image {image} ."


def karpathy_image(number, split, filename=None, n_captions=5, **more):
    sentences = [
        {"raw": caption(number, k), "tokens": ["caption", str(k), "of", "image", str(number)],
         "sentid": 10 * number + k}
        for k in range(n_captions)
    ]  # fmt: skip
    filename = filename or f"{1000 + number}.jpg"
    return {"filename": filename, "split": split, "imgid": number, "sentences": sentences} | more


def coco_image(number, split, **more):
    cocoid = 500 + 7 * number
    folder = "val2014" if split in ("val", "test") else "train2014"
    name = f"COCO_{folder}_{cocoid:012d}.jpg"
    return karpathy_image(number, split, name, cocoid=cocoid, filepath=folder, **more)


def write_json(path, images):
    path.write_text(json.dumps({"images": images, "dataset": "x"}), encoding="utf-8")
    return path


@pytest.fixture
def flickr(tmp_path):
    """A dataset_flickr30k.json whose splits stand mixed, as they do."""
    splits = ["train", "test", "val", "train", "val", "test", "train"]
    images = [karpathy_image(number, split) for number, split in enumerate(splits)]
    return write_json(tmp_path / "dataset_flickr30k.json", images)


@pytest.fixture
def coco(tmp_path):
    """A dataset_coco.json with restval, and more test images than COCO 1K has."""
    splits = ["test", "restval", "train", "val", "restval", "train", *["test"] * 1004]
    images = [coco_image(number, split) for number, split in enumerate(splits)]
    return write_json(tmp_path / "dataset_coco.json", images)


def test_the_names_of_an_image_have_one_key():
    names = (
        "391895", "000000391895", "COCO_val2014_000000391895.jpg", " 391895.JPG ",
        "val2014/COCO_val2014_000000391895.jpg", "COCO_train2014_000000391895", "0391895.png",
    )  # fmt: skip
    assert {*map(image_key, names)} == {"391895"}
    assert image_key("0") == image_key("000") == "0"
    assert image_key("flickr30k-images/1000092795.jpg") == "1000092795"
    # A Flickr8k name is no number, and what is no picture's suffix belongs to the name.
    assert image_key("1000268201_693b08cb0e.jpg") == "1000268201_693b08cb0e"
    assert image_key("scene.one") == "scene.one" and image_key("٣") == "٣"
    assert len({image_key(name) for name in ("1", "10", "a1", "COCO_1", "1_0")}) == 5


def test_the_splits_are_karpathys_in_file_order(flickr, tmp_path, capsys):
    prepare(flickr)
    folder = tmp_path / "data" / "mine"
    expected = {"train": [0, 3, 6], "dev": [2, 4], "test": [1, 5]}
    assert {f.name for f in folder.iterdir()} == {
        f"{split}_{kind}.txt" for split in expected for kind in ("caps", "ids")
    }
    for split, images in expected.items():
        assert lines(folder / f"{split}_ids.txt") == [f"{1000 + i}.jpg" for i in images]
        wanted = [caption(image, k) for image in images for k in range(5)]
        assert read_captions(folder / f"{split}_caps.txt") == wanted
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["split", "images", "captions", "file"]
    assert table[1].split() == ["train", "3", "15", "data/mine/train_caps.txt"]
    assert len(table) == 7


def test_restval_joins_train_and_test_is_the_first_1000_of_testall(coco, tmp_path):
    prepare(coco)
    folder = tmp_path / "data" / "mine"
    assert lines(folder / "train_ids.txt") == [str(500 + 7 * i) for i in (1, 2, 4, 5)]
    everything = lines(folder / "testall_ids.txt")
    assert len(everything) == 1005 and everything[:2] == ["500", "542"]
    assert lines(folder / "test_ids.txt") == everything[:1000]
    captions = lines(folder / "testall_caps.txt")
    assert lines(folder / "test_caps.txt") == captions[:5000] and len(captions) == 5025
    prepare(coco, "--no-restval", "--split", "train", "--data_name", "less")
    assert lines(tmp_path / "data" / "less" / "train_ids.txt") == ["514", "535"]
    assert len([*(tmp_path / "data" / "less").iterdir()]) == 2


def test_captions_are_cut_to_one_line_and_to_five(tmp_path):
    image = karpathy_image(3, "test", n_captions=7)
    raws = [
        " A dog\nand a cat.\n", "a\tb\r\n  c", "naïve café – 日本 😀", "x\u2028y\x85z\x0bw",
        "  \n ", "the fifth that is not empty", "too many",
    ]  # fmt: skip
    for sentence, raw in zip(image["sentences"], raws, strict=True):
        sentence["raw"] = raw
    prepare(write_json(tmp_path / "k.json", [image]))
    expected = [
        "A dog and a cat.", "a b c", "naïve café – 日本 😀", "x y z w",
        "the fifth that is not empty",
    ]  # fmt: skip
    assert read_captions(tmp_path / "data/mine/test_caps.txt") == expected
    prepare(tmp_path / "k.json", "--tokens", "--captions_per_image", 2, "--overwrite")
    assert lines(tmp_path / "data/mine/test_caps.txt") == [
        "caption 0 of image 3", "caption 1 of image 3",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "kind, expected",
    [("cocoid", "521"), ("imgid", "3"), ("filename", "val2014/COCO_val2014_000000000521.jpg")],
)
def test_ids_of_any_kind(coco, tmp_path, kind, expected):
    prepare(coco, "--split", "dev", "--ids", kind)
    assert lines(tmp_path / "data/mine/dev_ids.txt") == [expected]


def test_an_order_is_kept_as_it_stands(flickr, tmp_path, capsys):
    """Ids of other spelling, each said five times over: images in that order, lines unchanged."""
    order = tmp_path / "order.txt"
    order.write_text("".join(f"{name}\n" * 5 for name in ("1006", "images/1000.jpg")))
    prepare(flickr, "--split", "train", "--order", order)
    folder = tmp_path / "data/mine"
    assert lines(folder / "train_ids.txt") == ["1006", "images/1000.jpg"]
    assert lines(folder / "train_caps.txt") == [caption(i, k) for i in (6, 0) for k in range(5)]
    assert "without 1 images of Karpathy's train: 1003.jpg" in capsys.readouterr().out


def test_ids_that_are_there_and_name_the_same_images_are_left_alone(flickr, tmp_path):
    ids = tmp_path / "data/mine/dev_ids.txt"
    ids.parent.mkdir(parents=True)
    ids.write_text("1004\n" * 5 + "1002\n" * 5)
    np.save(ids.with_name("dev_ims.npy"), np.zeros((2, 3, 4), np.float32))
    before = ids.read_bytes()
    prepare(flickr, "--split", "dev", "--order", ids)
    assert ids.read_bytes() == before
    assert lines(ids.with_name("dev_caps.txt"))[0] == caption(4, 0)


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_captions_in_another_order_than_the_features_are_refused(flickr, tmp_path, overwrite):
    folder = tmp_path / "data/mine"
    folder.mkdir(parents=True)
    (folder / "dev_ids.txt").write_text("1004\n1002\n")
    np.save(folder / "dev_ims.npy", np.zeros((2, 3, 4), np.float32))
    before = snapshot(folder)
    message = error_of(prepare, flickr, *overwrite)
    assert "dev_ids.txt" in message and "--order data/mine/dev_ids.txt" in message
    assert snapshot(folder) == before  # nor was train written, which came first


@pytest.mark.parametrize(
    "rows, repeat, fits", [(2, 1, True), (3, 1, False), (2, 5, True), (10, 1, False)]
)
def test_counts_must_fit_the_features(flickr, tmp_path, rows, repeat, fits):
    folder = tmp_path / "data/mine"
    folder.mkdir(parents=True)
    regions = np.random.rand(rows, 3, 4).astype(np.float32)
    np.save(folder / "dev_ims.npy", np.repeat(regions, repeat, axis=0))
    if fits:
        prepare(flickr)
        assert len(lines(folder / "dev_caps.txt")) == 10
    else:
        message = error_of(prepare, flickr)
        assert f"{rows} rows" in message and "2 images" in message
        assert [*snapshot(folder)] == ["dev_ims.npy"]


def test_nothing_is_overwritten_unless_asked(flickr, tmp_path):
    prepare(flickr)
    folder = tmp_path / "data/mine"
    (folder / "test_caps.txt").write_text("mine\n")
    before = snapshot(folder)
    assert "--overwrite" in error_of(prepare, flickr)
    assert snapshot(folder) == before
    prepare(flickr, "--overwrite")
    assert len(lines(folder / "test_caps.txt")) == 10


def test_when_one_file_fails_none_is_left(tmp_path):
    a, b = tmp_path / "out/a", tmp_path / "out/b"
    a.parent.mkdir()
    a.write_text("old")

    def work():
        with new_files() as create:
            create(a).write(b"new")
            create(b).write(b"new")
            raise OSError(28, "No space left on device")

    message = error_of(work)
    assert "No space left" in message and str(a.parent) in message
    assert a.read_text() == "old" and not b.exists()
    with new_files() as create:
        create(a).write(b"new")
        create(b).write(b"newer")
        assert a.read_text() == "old" and not b.exists()
    assert (a.read_text(), b.read_text()) == ("new", "newer") and not leftovers()


def without(entry, key):
    return {name: value for name, value in entry.items() if name != key}


GOOD = karpathy_image(0, "test")
SURROGATE = karpathy_image(0, "test", n_captions=4)
SURROGATE["sentences"].append({"raw": "half \ud83d", "tokens": ["x"], "sentid": 9})
NUL = karpathy_image(0, "test", n_captions=4)
NUL["sentences"].append({"raw": "a\0b", "tokens": ["x"], "sentid": 9})


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", ["not a JSON file"]),
        (b'{"images": [{"filename": "a.jpg", "sp', ["not a JSON file"]),
        (b'{"images": "\xff"}', ["not a JSON file"]),
        (b"[" * 100_000, ["not a JSON file"]),
        ([1, 2], ["expected a JSON object", "list"]),
        ({"annotations": [], "info": {}}, ["'images'", "'annotations', 'info'"]),
        ({"images": []}, ["'images'"]),
        ({"images": ["a.jpg"]}, ["images[0]"]),
        ({"images": [GOOD, without(GOOD, "split")]}, ["images[1]", "no 'split'"]),
        ({"images": [GOOD | {"split": "dev"}]}, ["'dev'", "train, restval, val, test"]),
        ({"images": [GOOD | {"split": ["test"]}]}, ["images[0]"]),
        ({"images": [without(GOOD, "sentences")]}, ["no 'sentences'"]),
        ({"images": [GOOD | {"sentences": 5}]}, ["images[0]"]),
        ({"images": [GOOD | {"sentences": [{"tokens": []}]}]}, ["no 'raw'"]),
        ({"images": [GOOD | {"sentences": [{"raw": 7}]}]}, ["a caption is text, not 7"]),
        ({"images": [without(GOOD, "filename")]}, ["filename", "--ids"]),
        ({"images": [GOOD | {"filename": "a\nb.jpg"}]}, ["filename", "--ids"]),
        ({"images": [GOOD, GOOD | {"split": "train"}]}, ["stand there twice", "1000.jpg"]),
        ({"images": [karpathy_image(0, "test", n_captions=3)]}, ["fewer than 5", "1000.jpg (3)"]),
        ({"images": [SURROGATE]}, ["1000.jpg", "surrogate"]),
        ({"images": [NUL]}, ["1000.jpg", "NUL"]),
    ],
)
def test_files_that_are_not_karpathys_are_refused(tmp_path, content, words):
    path = tmp_path / "k.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    message = error_of(prepare, path)
    assert all(word in message for word in words), message
    assert not (tmp_path / "data").exists() or not [*(tmp_path / "data/mine").iterdir()]


def test_tokens_are_a_list(tmp_path):
    image = GOOD | {"sentences": [{"raw": "a dog", "tokens": "a dog"}] * 5}
    path = write_json(tmp_path / "k.json", [image])
    assert "tokens" in error_of(prepare, path, "--tokens")


@pytest.mark.parametrize(
    "content, words",
    [
        (b"1004\n77\n1002\n78\n", ["2 of its 4 ids are no filename", "77, 78"]),
        (b"2\n4\n", ["no filename", "--ids imgid"]),
        (b"1004\n1005\n", ["not in Karpathy's dev", "1005.jpg (test)"]),
        (b"1004\n1002\n1004.jpg\n", ["1 images stand there more than once: 1004"]),
        (b"1004\n1004\n1002\n", ["more than once"]),
        (b"1004\n\n1002\n", ["line 2 is empty"]),
        (b"", ["empty"]),
        (b"1004\n\xff\n", ["not UTF-8"]),
    ],
)
def test_orders_that_cannot_be_kept_are_refused(flickr, tmp_path, content, words):
    order = tmp_path / "order.txt"
    order.write_bytes(content)
    message = error_of(prepare, flickr, "--split", "dev", "--order", order)
    assert all(word in message for word in ["order.txt", *words]), message


def test_an_order_for_another_split_may_take_any_image(flickr, tmp_path):
    (tmp_path / "order.txt").write_bytes(b"\xef\xbb\xbf1005\r\n1000\r\n")
    prepare(flickr, "--split", "some", "--order", "order.txt")
    assert lines(tmp_path / "data/mine/some_ids.txt") == ["1005", "1000"]


def test_the_first_1000_of_coco_may_be_any_of_the_5000(coco, tmp_path, capsys):
    (tmp_path / "order.txt").write_text("7563\n")  # the last of testall
    prepare(coco, "--split", "test", "--order", "order.txt")
    assert lines(tmp_path / "data/mine/test_caps.txt")[0] == caption(1009, 0)
    assert "without 1,000 images" in capsys.readouterr().out


# -- COCO's own files -----------------------------------------------------------------------------


def write_coco(path, images, seed=0):
    """captions_*.json in COCO's format, its annotations in no order."""
    annotations = [
        {"id": 100 * image + k, "image_id": image, "caption": f" {caption(image, k)}\n"}
        for image in images
        for k in range(6 if image % 2 else 5)
    ]
    np.random.default_rng(seed).shuffle(annotations)
    content = {
        "info": {"year": 2014}, "licenses": [], "annotations": annotations,
        "images": [
            {"id": i, "file_name": f"COCO_val2014_{i:012d}.jpg", "height": 4} for i in images
        ],
    }  # fmt: skip
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_coco_annotations_are_read_through_pycocotools(tmp_path, capsys):
    from pycocotools.coco import COCO

    files = [write_coco(tmp_path / "a.json", [7, 8]), write_coco(tmp_path / "b.json", [31, 9])]
    (tmp_path / "ids.txt").write_text("31\nCOCO_val2014_000000000008.jpg\n9\n")
    prepare("--coco", *files, "--split", "dev", "--order", "ids.txt")
    expected = []
    for image in (31, 8, 9):
        for file in files:
            own = COCO(str(file))
            found = own.loadAnns(own.getAnnIds(imgIds=[image]))
            texts = [one["caption"] for one in sorted(found, key=lambda one: one["id"])]
            expected += [text.strip() for text in texts[:5]]
    assert len(expected) == 15
    capsys.readouterr()
    assert lines(tmp_path / "data/mine/dev_caps.txt") == expected
    assert lines(tmp_path / "data/mine/dev_ids.txt")[1] == "COCO_val2014_000000000008.jpg"
    prepare("--coco", *files, "--split", "some", "--order", "ids.txt", "--ids", "filename")
    assert "index created" not in capsys.readouterr().out
    assert lines(tmp_path / "data/mine/some_caps.txt") == expected


def test_both_sources_give_the_same(tmp_path):
    """Karpathy's sentences are COCO's annotations in the order of their numbers."""
    images = [7, 8, 31]
    own = write_coco(tmp_path / "captions.json", images, seed=3)
    with_categories = json.loads(own.read_text()) | {"categories": [{"id": 1}]}
    own.write_text(json.dumps(with_categories))
    entries = [
        {"cocoid": i, "imgid": n, "filename": f"COCO_val2014_{i:012d}.jpg", "split": "val",
         "sentences": [{"raw": caption(i, k)} for k in range(6 if i % 2 else 5)]}
        for n, i in enumerate(images)
    ]  # fmt: skip
    prepare(write_json(tmp_path / "k.json", entries), "--split", "dev")
    order = tmp_path / "data/mine/dev_ids.txt"
    prepare("--coco", own, "--split", "dev", "--order", order, "--data_name", "own")
    assert snapshot(tmp_path / "data/own") == snapshot(tmp_path / "data/mine")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c.pop("annotations"), ["'annotations'"]),
        (lambda c: c["annotations"][3].pop("caption"), ["annotations[3]", "'caption'"]),
        (lambda c: c["annotations"][3].pop("id"), ["annotations[3]", "'id'"]),
        (lambda c: c["annotations"][3].update(image_id="7"), ["annotations[3]"]),
        (lambda c: c["annotations"][3].update(caption=None), ["annotations[3]"]),
        (lambda c: c["images"].append("x"), ["images[2]"]),
        (lambda c: c["images"].append(c["images"][0]), ["twice"]),
        (lambda c: c["annotations"].append(c["annotations"][0]), ["twice"]),
        (lambda c: c["images"].pop(), ["ids.txt", "1 of its 2 ids", "8"]),
        (lambda c: c["annotations"].clear() or c["annotations"].append(
            {"id": 1, "image_id": 7, "caption": "one"}), ["fewer than 5", "7 (1)", "8 (0)"]),
    ],
)  # fmt: skip
def test_damaged_coco_annotations_are_refused(tmp_path, change, words):
    path = write_coco(tmp_path / "a.json", [7, 8])
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    (tmp_path / "ids.txt").write_text("7\n8\n")
    message = error_of(prepare, "--coco", path, "--split", "dev", "--order", "ids.txt")
    assert all(word in message for word in words), message


def test_images_in_two_annotation_files_are_refused(tmp_path):
    a, b = write_coco(tmp_path / "a.json", [7, 8]), write_coco(tmp_path / "b.json", [8])
    (tmp_path / "ids.txt").write_text("7\n8\n")
    message = error_of(prepare, "--coco", a, b, "--split", "dev", "--order", "ids.txt")
    assert "b.json: 1 of its images" in message and "8" in message


def test_without_pycocotools_it_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *rest):
        if name.startswith("pycocotools"):
            raise ImportError("No module named 'pycocotools'")
        return real(name, *rest)

    path = write_coco(tmp_path / "a.json", [7])
    (tmp_path / "ids.txt").write_text("7\n")
    monkeypatch.setattr(builtins, "__import__", missing)
    message = error_of(prepare, "--coco", path, "--split", "dev", "--order", "ids.txt")
    assert "pip install -r requirements.txt" in message


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], ["--coco"]),
        (["k.json", "--coco", "a.json"], ["one of"]),
        (["--coco", "a.json", "--split", "dev"], ["--order"]),
        (["k.json", "--order", "ids.txt"], ["--split"]),
        (["--coco", "a", "--order", "ids.txt", "--split", "x", "--tokens"], ["--tokens"]),
        (["dataset_flickr30k.json", "--split", "testall"], ["testall", "train, dev, test"]),
        (["dataset_flickr30k.json", "--ids", "cocoid"], ["cocoid"]),
    ],
)
def test_options_that_do_not_go_together(flickr, arguments, words):
    message = error_of(prepare, *arguments)
    assert all(word in message for word in words), message


# -- bottom-up TSV files --------------------------------------------------------------------------

NAMES = convert_bottom_up.FIELDS


def encoded(array):
    return base64.b64encode(np.asarray(array, "<f4").tobytes()).decode()


def features_of(image):
    """Features that tell the image."""
    return np.random.default_rng(image).random((REGIONS, WIDTH), np.float32)


def boxes_of(image, width=640, height=480):
    corners = np.random.default_rng(image + 1).random((REGIONS, 2, 2)) * (width, height)
    return np.sort(corners, axis=1).reshape(REGIONS, 4).astype(np.float32)


def tsv_row(image, **changes):
    values = {
        "image_id": str(image), "image_w": "640", "image_h": "480", "num_boxes": str(REGIONS),
        "boxes": encoded(boxes_of(int(image))), "features": encoded(features_of(int(image))),
    }  # fmt: skip
    return values | changes


def write_tsv(path, rows, names=NAMES, end="\r\n"):
    """As Python 2's csv.DictWriter wrote them: tabs, CR LF."""
    text = "".join("\t".join(row.get(name, "x") for name in names) + end for row in rows)
    path.write_bytes(text.encode())
    return path


def write_ids(path, ids):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in ids))
    return path


def test_rows_are_put_in_the_order_of_the_ids(tmp_path, capsys):
    tsv = write_tsv(tmp_path / "a.tsv", [tsv_row(i) for i in (5, 99, 3, 391895, 98)])
    ids = write_ids(tmp_path / "ids.txt", ["COCO_val2014_000000391895.jpg", "0005", "3"])
    convert(tsv, "--split", "dev", "--ids", ids)
    folder = tmp_path / "data/mine"
    regions = np.load(folder / "dev_ims.npy", allow_pickle=False)
    assert regions.dtype == np.float32 and regions.shape == (3, REGIONS, WIDTH)
    boxes = read_boxes(folder / "dev_boxes.npy", 3, REGIONS)
    assert boxes.dtype == np.float32
    for place, image in enumerate((391895, 5, 3)):
        assert np.array_equal(regions[place], features_of(image))
        expected = boxes_of(image) / np.array([640, 480, 640, 480], np.float32)
        assert boxes[place] == pytest.approx(expected, abs=1e-6)
    assert lines(folder / "dev_ids.txt") == lines(ids)
    table = capsys.readouterr().out.splitlines()
    assert table[1].split()[:2] == ["dev", "3"] and "relative        2" in table[1]


def test_without_ids_all_rows_in_file_order(tmp_path):
    """Files of three kinds, one after the other."""
    whole = write_tsv(tmp_path / "whole.tsv", [tsv_row(i) for i in range(6)], end="\n")
    rows = whole.read_bytes().splitlines(keepends=True)
    plain, packed, archive = (tmp_path / name for name in ("a.tsv", "b.tsv.gz", "c.zip"))
    plain.write_bytes(b"".join(rows[:2]).rstrip(b"\n"))  # no end of line at the end
    packed.write_bytes(gzip.compress(rows[2]) + gzip.compress(b"\n" + rows[3]))
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("t/part1.tsv", rows[4])
        file.writestr("t/README", "no rows")
        file.writestr("t/part2.tsv", rows[5])
    convert(plain, packed, archive, "--boxes", "pixels")
    folder = tmp_path / "data/mine"
    assert lines(folder / "test_ids.txt") == list("012345")
    regions, boxes = (np.load(folder / f"test_{kind}.npy") for kind in ("ims", "boxes"))
    assert np.array_equal(regions, [features_of(i) for i in range(6)])
    assert np.array_equal(boxes, [boxes_of(i) for i in range(6)])
    convert(whole, "--split", "again", "--boxes", "pixels")
    assert (folder / "again_ims.npy").read_bytes() == (folder / "test_ims.npy").read_bytes()


def test_the_file_is_the_one_numpy_writes(tmp_path):
    convert(write_tsv(tmp_path / "a.tsv", [tsv_row(i) for i in range(12)]))
    np.save(tmp_path / "expected.npy", np.array([features_of(i) for i in range(12)]))
    ours = np.load(tmp_path / "data/mine/test_ims.npy", mmap_mode="r", allow_pickle=False)
    assert ours.flags.c_contiguous
    made, wanted = (p.read_bytes() for p in (tmp_path / "data/mine/test_ims.npy",
                                             tmp_path / "expected.npy"))  # fmt: skip
    assert len(made) == len(wanted) and made[-4 * ours.size :] == wanted[-4 * ours.size :]


def test_other_columns_are_named(tmp_path):
    names = ["image_id", "image_h", "image_w", "_", "_", "num_boxes", "boxes", "features"]
    tsv = write_tsv(tmp_path / "a.tsv", [tsv_row(4)], names)
    convert(tsv, "--fields", ",".join(names))
    boxes = np.load(tmp_path / "data/mine/test_boxes.npy")
    assert boxes[0] == pytest.approx(boxes_of(4) / np.array([640, 480, 640, 480]), abs=1e-6)
    few_names = ["image_id", "features", "num_boxes"]
    tsv = write_tsv(tmp_path / "b.tsv", [tsv_row(4)], few_names)
    convert(tsv, "--fields", ",".join(few_names), "--split", "less")
    assert {f.name for f in (tmp_path / "data/mine").glob("less*")} == {
        "less_ims.npy", "less_ids.txt",
    }  # fmt: skip


def test_width_and_height_the_other_way_round_are_noticed(tmp_path):
    tall = tsv_row(1, boxes=encoded([[10, 10, 600, 400]] * REGIONS))
    tsv = write_tsv(tmp_path / "a.tsv", [tall])
    fields = "image_id,image_h,image_w,num_boxes,boxes,features"
    message = error_of(convert, tsv, "--fields", fields)
    assert "600, 400" in message and "480 × 640" in message and "--fields" in message
    convert(tsv)


def test_a_box_that_was_rounded_over_the_edge_is_cut_there(tmp_path):
    box = [-0.4, 0, 640.6, 480.2]
    convert(write_tsv(tmp_path / "a.tsv", [tsv_row(1, boxes=encoded([box] * REGIONS))]))
    boxes = np.load(tmp_path / "data/mine/test_boxes.npy")
    assert boxes[0].tolist() == [[0, 0, 1, 1]] * REGIONS


def test_half_precision(tmp_path):
    tsv = write_tsv(tmp_path / "a.tsv", [tsv_row(1)])
    convert(tsv, "--dtype", "float16")
    regions = np.load(tmp_path / "data/mine/test_ims.npy")
    assert regions.dtype == np.float16
    assert np.array_equal(regions[0], features_of(1).astype(np.float16))
    large = tsv_row(1, features=encoded(np.full((REGIONS, WIDTH), 1e6)))
    tsv = write_tsv(tmp_path / "b.tsv", [large])
    message = error_of(convert, tsv, "--dtype", "float16", "--split", "large")
    assert "image 1" in message and "float16" in message


def test_base64_wrapped_by_python_3_is_taken(tmp_path):
    row = tsv_row(1)
    row["features"], row["boxes"] = f"b'{row['features']}'", f'b"{row["boxes"]}"'
    convert(write_tsv(tmp_path / "a.tsv", [row]))
    regions = np.load(tmp_path / "data/mine/test_ims.npy")
    assert np.array_equal(regions[0], features_of(1))


NOT_A_NUMBER = features_of(2).copy()
NOT_A_NUMBER[1, 2] = np.nan
WIDE = np.zeros((REGIONS, WIDTH + 1))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"features": tsv_row(2)["features"][:-5]}, ["features", "base64"]),
        ({"features": tsv_row(2)["features"][:-8]}, ["bytes, expected 96", "4 × 6"]),
        ({"features": encoded(WIDE)}, ["112 bytes", "--img_dim"]),
        ({"features": "no base64!"}, ["features", "base64"]),
        ({"features": ""}, ["0 bytes"]),
        ({"features": encoded(NOT_A_NUMBER)}, ["features", "NaN"]),
        ({"boxes": encoded(np.full((REGIONS, 4), np.inf))}, ["boxes", "infinite"]),
        ({"boxes": encoded(boxes_of(2))[:-8]}, ["boxes", "bytes"]),
        ({"boxes": encoded(boxes_of(2)[:, ::-1])}, ["boxes", "x1 y1 x2 y2"]),
        ({"num_boxes": "57"}, ["57 boxes, expected 4", "--num_regions"]),
        ({"num_boxes": "num_boxes"}, ["num_boxes", "expected a number", "--fields"]),
        ({"num_boxes": "4.5"}, ["num_boxes"]),
        ({"image_w": "0"}, ["image_w"]),
        ({"image_h": "nan"}, ["image_h"]),
        ({"image_id": ""}, ["image_id"]),
        ({"image_id": "a\0b"}, ["image_id"]),
        ({"image_id": "2\t3"}, ["7 columns, expected 6"]),
    ],
)
def test_rows_that_are_wrong_are_refused(tmp_path, changes, words):
    tsv = write_tsv(tmp_path / "a.tsv", [tsv_row(1), tsv_row(2, **changes), tsv_row(3)])
    message = error_of(convert, tsv)
    assert "a.tsv, line 2" in message and all(word in message for word in words), message
    assert not [*(tmp_path / "data/mine").iterdir()]


def test_a_wrong_row_that_is_not_asked_for_does_not_matter(tmp_path):
    tsv = write_tsv(tmp_path / "a.tsv", [tsv_row(1, features="!"), tsv_row(2)])
    convert(tsv, "--ids", write_ids(tmp_path / "ids.txt", ["2"]))
    assert np.array_equal(np.load(tmp_path / "data/mine/test_ims.npy")[0], features_of(2))


def test_missing_and_double_images_are_named(tmp_path):
    tsv = write_tsv(tmp_path / "a.tsv", [tsv_row(i) for i in (1, 2, 2, 3, 4, 4)])
    ids = write_ids(tmp_path / "ids.txt", ["1", "3", *map(str, range(50, 60))])
    message = error_of(convert, tsv, "--ids", ids)
    assert "10 of its 12 images" in message and "50, 51, 52 and 7 more" in message
    assert "look like 2" in message
    message = error_of(convert, tsv)
    assert "2 rows" in message and "2, 4" in message
    message = error_of(convert, tsv, "--ids", write_ids(tmp_path / "ids.txt", ["2", "1"]))
    assert "1 rows" in message
    # Twice, but not asked for.
    convert(tsv, "--ids", write_ids(tmp_path / "ids.txt", ["3", "1"]))
    message = error_of(convert, tsv, tsv, "--ids", ids, "--overwrite")
    assert "2 rows" in message and "1, 3" in message


@pytest.mark.parametrize("kind", ["plain", "gz", "zip"])
def test_a_file_cut_anywhere_is_refused(tmp_path, kind):
    whole = write_tsv(tmp_path / "whole.tsv", [tsv_row(i) for i in range(3)]).read_bytes()
    if kind == "gz":
        whole = gzip.compress(whole)
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "whole.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(tmp_path / "whole.tsv")
        whole = (tmp_path / "whole.zip").read_bytes()
    ids = write_ids(tmp_path / "ids.txt", ["2", "1", "0"])
    cut = tmp_path / "cut.tsv"
    for size in range(0, len(whole) - 2, 37):  # the last two bytes are an end of line
        cut.write_bytes(whole[:size])
        message = error_of(convert, cut, "--ids", ids)
        assert "cut.tsv" in message or "3 images" in message, message
    cut.write_bytes(whole)
    convert(cut, "--ids", ids)


def test_damaged_archives_are_refused(tmp_path):
    whole = write_tsv(tmp_path / "whole.tsv", [tsv_row(i) for i in range(3)]).read_bytes()
    packed = bytearray(gzip.compress(whole))
    packed[len(packed) // 2] ^= 0xFF
    (tmp_path / "a.gz").write_bytes(packed)
    assert "a.gz" in error_of(convert, "a.gz")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("features.npy", b"x")
    assert "no .tsv" in error_of(convert, "b.zip")


def test_empty_files_are_refused(tmp_path):
    good = write_tsv(tmp_path / "good.tsv", [tsv_row(1)])
    for content in (b"", b"\r\n\r\n", gzip.compress(b"")):
        (tmp_path / "empty.tsv").write_bytes(content)
        assert "empty.tsv: no rows" in error_of(convert, good, "empty.tsv")


def test_a_file_without_lines_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(convert_bottom_up, "LONGEST", 2**16)
    (tmp_path / "a.tsv").write_bytes(b"\1" * 2**17)
    assert "a line longer than" in error_of(convert, "a.tsv")


def test_memory_holds_a_row_not_the_file(tmp_path):
    """40 MB of rows, converted with less than a fourth of that."""
    row = tsv_row(0, features=encoded(np.ones((REGIONS, 8192))))
    with (tmp_path / "a.tsv").open("w") as file:
        for image in range(230):
            file.write("\t".join((row | {"image_id": str(image)}).values()) + "\n")
    assert (tmp_path / "a.tsv").stat().st_size > 40e6
    tracemalloc.start()
    convert("a.tsv", "--img_dim", 8192)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6
    assert np.load(tmp_path / "data/mine/test_ims.npy", mmap_mode="r").shape == (230, REGIONS, 8192)


@pytest.mark.parametrize(
    "fields, words",
    [
        ("image_id,features", ["lacks num_boxes"]),
        ("image_id,num_boxes,boxes,features", ["lacks image_w, image_h"]),
        (",".join([*NAMES, "boxes"]), ["boxes twice"]),
        ("", ["lacks image_id"]),
    ],
)
def test_columns_that_are_needed(tmp_path, fields, words):
    tsv = write_tsv(tmp_path / "a.tsv", [tsv_row(1)])
    message = error_of(convert, tsv, "--fields", fields)
    assert all(word in message for word in words), message


def test_regions_that_are_there_are_not_overwritten(tmp_path):
    tsv = write_tsv(tmp_path / "a.tsv", [tsv_row(1), tsv_row(2)])
    folder = tmp_path / "data/mine"
    convert(tsv)
    before = snapshot(folder)
    assert "test_ims.npy: is there already; --overwrite" in error_of(convert, tsv)
    other = write_tsv(tmp_path / "b.tsv", [tsv_row(3), tsv_row(4, features="!")])
    assert "line 2" in error_of(convert, other, "--overwrite")
    assert snapshot(folder) == before
    names = [name for name in NAMES if name != "boxes"]
    other = write_tsv(tmp_path / "c.tsv", [tsv_row(3)], names)
    convert(other, "--overwrite", "--fields", ",".join(names))
    assert {*snapshot(folder)} == {"test_ims.npy", "test_ids.txt"}  # no boxes of other regions
    assert lines(folder / "test_ids.txt") == ["3"]


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_regions_in_another_order_than_the_captions_are_refused(tmp_path, overwrite):
    tsv = write_tsv(tmp_path / "a.tsv", [tsv_row(1), tsv_row(2)])
    folder = tmp_path / "data/mine"
    write_ids(folder / "test_ids.txt", ["2", "1"])
    write_ids(folder / "test_caps.txt", [f"caption {k}" for k in range(10)])
    before = snapshot(folder)
    message = error_of(convert, tsv, *overwrite)
    assert "--ids data/mine/test_ids.txt" in message
    ids = write_ids(tmp_path / "ids.txt", ["1", "2"])
    message = error_of(convert, tsv, "--ids", ids, *overwrite)
    assert "data/mine/test_ids.txt" in message and "test_caps.txt" in message
    assert snapshot(folder) == before
    convert(tsv, "--ids", folder / "test_ids.txt")
    assert np.array_equal(np.load(folder / "test_ims.npy")[0], features_of(2))


def test_regions_that_do_not_fit_the_captions_are_refused(tmp_path):
    tsv = write_tsv(tmp_path / "a.tsv", [tsv_row(1), tsv_row(2)])
    caps = write_ids(tmp_path / "data/mine/test_caps.txt", [f"caption {k}" for k in range(15)])
    ids = write_ids(tmp_path / "ids.txt", ["1", "2"])
    for arguments in ([tsv], [tsv, "--ids", ids]):
        message = error_of(convert, *arguments)
        assert "15 captions do not fit 2 images" in message
        assert [*snapshot(caps.parent)] == ["test_caps.txt"]


def test_what_is_in_the_way_is_said_before_the_work(tmp_path):
    """The files hold nothing that could be converted."""
    (tmp_path / "a.tsv").write_text("no row\n")
    ids = write_ids(tmp_path / "ids.txt", ["1", "2"])
    folder = tmp_path / "data/mine"
    there = write_ids(folder / "test_ids.txt", ["2", "1"])
    assert "test_ids.txt: is there already" in error_of(convert, "a.tsv")
    assert "test_ids.txt: is there already" in error_of(convert, "a.tsv", "--ids", ids)
    caps = write_ids(folder / "test_caps.txt", [f"caption {k}" for k in range(15)])
    assert "15 captions" in error_of(convert, "a.tsv", "--ids", there)
    caps.unlink()
    assert "a.tsv, line 1" in error_of(convert, "a.tsv", "--overwrite")


def test_a_disk_without_room_is_noticed_before_the_work(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 10**3})
    monkeypatch.setattr(convert_bottom_up.shutil, "disk_usage", lambda folder: usage)
    tsv = write_tsv(tmp_path / "a.tsv", [tsv_row(i) for i in range(9)])
    ids = write_ids(tmp_path / "ids.txt", range(9))
    message = error_of(convert, tsv, "--ids", ids)
    assert "GB free" in message and "--data_path" in message


def test_a_full_disk_ends_in_one_line_and_leaves_nothing(tmp_path):
    """A limit on the size of files stands for the disk: both end a write in an error."""
    tsv = write_tsv(tmp_path / "a.tsv", [tsv_row(i) for i in range(99)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        message = error_of(convert, tsv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "data/mine: File too large; nothing was written" in message
    assert not [*(tmp_path / "data/mine").iterdir()]


# -- both together --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cocoid", "filename"])
def test_each_caption_gets_its_image(tmp_path, kind):
    """Captions, then regions from a TSV in another order, then the data set training reads."""
    splits = ["val", "test", "restval", "val", "train", "test", "val"]
    images = [coco_image(number, split) for number, split in enumerate(splits)]
    path = write_json(tmp_path / "dataset_coco.json", images)
    prepare(path, "--ids", kind)
    shuffled = [500 + 7 * n for n in (6, 2, 0, 5, 4, 3, 1)]
    tsv = write_tsv(tmp_path / "trainval_4.tsv", [tsv_row(cocoid) for cocoid in shuffled])
    folder = tmp_path / "data/mine"
    for split in ("train", "dev", "test", "testall"):
        convert(tsv, "--split", split, "--ids", folder / f"{split}_ids.txt")
    vocab = build_vocab(read_captions(folder / "train_caps.txt"), threshold=1)
    for split, numbers in {"train": [2, 4], "dev": [0, 3, 6], "testall": [1, 5]}.items():
        dataset = PrecompDataset(tmp_path / "data", "mine", split, vocab)
        assert len(dataset) == 5 * len(numbers) and dataset.n_images == len(numbers)
        for index in range(len(dataset)):
            number = numbers[index // 5]
            regions, _, image, _ = dataset[index]
            assert dataset.texts[index] == caption(number, index % 5)
            assert np.array_equal(regions.numpy(), features_of(500 + 7 * number))
            assert image_key(dataset.image_ids[image]) == str(500 + 7 * number)
    # And from the features' ids back to the captions: the same files.
    prepare(
        path, "--ids", kind, "--split", "dev", "--order", folder / "dev_ids.txt",
        "--data_name", "back",
    )  # fmt: skip
    assert (tmp_path / "data/back/dev_caps.txt").read_bytes() == (
        folder / "dev_caps.txt"
    ).read_bytes()


def test_the_order_of_a_tsv_can_be_that_of_the_captions(flickr, tmp_path):
    """Regions first, in file order; then captions in the order of their ids."""
    convert(write_tsv(tmp_path / "a.tsv", [tsv_row(i) for i in (1005, 1001)]))
    ids = tmp_path / "data/mine/test_ids.txt"
    prepare(flickr, "--split", "test", "--order", ids)
    vocab = build_vocab(["caption of image"], threshold=1)
    dataset = PrecompDataset(tmp_path / "data", "mine", "test", vocab)
    assert dataset.texts[5] == caption(1, 0)
    assert np.array_equal(dataset[5][0].numpy(), features_of(1001))
    assert read_ids(ids, 2) == ["1005", "1001"]


def test_the_command_lines(flickr, tmp_path):
    result = run(tmp_path, "scripts/prepare_captions.py", flickr, "--data_name", "mine")
    assert result.returncode == 0, result.stderr
    assert "data/mine/test_caps.txt" in result.stdout
    tsv = write_tsv(tmp_path / "a.tsv", [tsv_row(i) for i in (1005, 1001)])
    arguments = [tsv, *SMALL, "--ids", "data/mine/test_ids.txt"]
    result = run(tmp_path, "scripts/convert_bottom_up.py", *arguments)
    assert result.returncode == 0, result.stderr
    assert "data/mine/test_ims.npy" in result.stdout


@pytest.mark.parametrize(
    "script, arguments, words",
    [
        (prepare_captions, ["no.json"], ["no.json"]),
        (prepare_captions, ["."], ["directory"]),
        (prepare_captions, ["k.json", "--split", "a/b"], ["a/b"]),
        (prepare_captions, ["k.json", "--captions_per_image", "0"], ["0", "1 or more"]),
        (convert_bottom_up, ["no.tsv"], ["no.tsv"]),
        (convert_bottom_up, ["."], ["directory"]),
        (convert_bottom_up, ["a.tsv", "--ids", "no.txt"], ["no.txt"]),
        (convert_bottom_up, ["a.tsv", "--split", ""], ["--split"]),
        (convert_bottom_up, ["a.tsv", "--num_regions", "x"], ["--num_regions"]),
    ],
)
def test_mistakes_exit_with_2_and_one_line(tmp_path, monkeypatch, capsys, script, arguments, words):
    write_tsv(tmp_path / "a.tsv", [tsv_row(1)])
    monkeypatch.setattr(sys, "argv", [script.__name__, "--data_name", "mine", *arguments])
    with pytest.raises(SystemExit) as end:
        script.main()
    said = type("Result", (), {"returncode": end.value.code, "stderr": capsys.readouterr().err})
    refused(said, *words)
    assert not leftovers()


def test_long_lists_are_cut():
    assert few("abc") == "a, b, c" and few(map(str, range(1500))) == "0, 1, 2 and 1,497 more"
    assert few([]) == ""


def test_ids_one_a_caption_are_ids_one_an_image(tmp_path):
    path = write_ids(tmp_path / "ids.txt", ["b"] * 3 + ["a"] * 3)
    assert read_id_list(path) == ["b", "a"] == read_ids(path, 2)
    assert read_id_list(write_ids(path, ["one"] * 5)) == ["one"]
