"""Captions from Karpathy's and COCO's files, regions from bottom-up TSV files, and both."""

import base64
import gzip
import json
import sys
import tracemalloc
import zipfile
from pathlib import Path
from types import SimpleNamespace

import convert_bottom_up
import numpy as np
import prepare_captions
import pytest
from conftest import call, contents, refuses, succeeded
from prepare_captions import image_key

from data import PrecompDataset, read_boxes
from vocab import build_vocab, read_captions

REGIONS, WIDTH = 4, 6
OUT = Path("data/mine")
PREPARE = (".", prepare_captions.main, "--data_name", "mine")
SIZES = ("--num_regions", REGIONS, "--img_dim", WIDTH)
CONVERT = (".", convert_bottom_up.main, "--data_name", "mine", *SIZES)


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    OUT.mkdir(parents=True)


def prepare(*arguments):
    return succeeded(call(*PREPARE, *arguments))


def convert(*arguments):
    return succeeded(call(*CONVERT, *arguments))


def write(path, content):
    """JSON, or lines."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    is_json = isinstance(content, dict)
    Path(path).write_text(json.dumps(content) if is_json else "".join(f"{x}\n" for x in content))
    return path


def captions_of(images):
    return [f"caption {k} of image {image} ." for image in images for k in range(5)]


def karpathy(splits, cocoid=False, captions=None):
    """Karpathy's file: images 0, 1, … are called 1000.jpg, 1001.jpg, …, or 500, 501, …"""
    images = []
    for n, split in enumerate(splits):
        sentences = [{"raw": raw} for raw in captions or captions_of([n])]
        image = {"filename": f"{1000 + n}.jpg", "split": split, "sentences": sentences}
        images.append(image | ({"cocoid": 500 + n} if cocoid else {}))
    return {"images": images}


def coco(images):
    """COCO's file, its annotations in no order; image n is called 500 + n."""
    annotations = [
        {"id": 10 * n + k, "image_id": 500 + n, "caption": f" {caption}\n"}
        for n in images
        for k, caption in enumerate([*captions_of([n]), "a sixth"])
    ]
    np.random.default_rng(0).shuffle(annotations)
    return {"annotations": annotations, "images": [{"id": 500 + n} for n in images]}


FLICKR = ["train", "test", "val", "train", "val", "test", "train"]


@pytest.fixture
def flickr(in_its_own_folder):
    return write("flickr.json", karpathy(FLICKR))


def test_all_spellings_of_an_image_have_one_key():
    spellings = (
        "391895", "000000391895", "COCO_val2014_000000391895.jpg", " 391895.JPG ",
        "val2014/COCO_val2014_000000391895.jpg", "COCO_train2014_000000391895", "0391895.png",
    )  # fmt: skip
    assert {*map(image_key, spellings)} == {"391895"} and image_key("000") == "0"
    assert image_key("folder/1000268201_693b.jpg") == "1000268201_693b"  # Flickr8k's are no numbers
    assert len({image_key(name) for name in ("1", "10", "a1", "COCO_1", "1_0")}) == 5


def test_restval_joins_train_and_test_is_the_first_1000_of_testall():
    splits = ["test", "restval", "train", "val", *["test"] * 1004]
    prepare(write("coco.json", karpathy(splits, cocoid=True)))
    assert read_captions(OUT / "train_ids.txt") == ["501", "502"]
    testall = read_captions(OUT / "testall_ids.txt")
    assert len(testall) == 1005 and testall[1] == "504"
    assert read_captions(OUT / "test_ids.txt") == testall[:1000]
    assert read_captions(OUT / "test_caps.txt") == read_captions(OUT / "testall_caps.txt")[:5000]
    order = write("order.txt", ["1507"])  # the last of testall may be chosen for test
    prepare("coco.json", "--split", "test", "--order", order, "--data_path", "b")
    assert read_captions("b/mine/test_caps.txt") == captions_of([1007])


def test_captions_are_cut_to_one_line_and_to_five():
    raws = [" A dog\nand a cat.\n", "a\tb\r\n  c", "naïve café – 日本 😀", "x\u2028y\x85z\x0bw",
            "  \n ", "the fifth that is not empty", "too many"]  # fmt: skip
    prepare(write("k.json", karpathy(["test"], captions=raws)))
    cleaned = ["A dog and a cat.", "a b c", "naïve café – 日本 😀", "x y z w", raws[5]]
    assert read_captions(OUT / "test_caps.txt") == cleaned


@pytest.mark.parametrize("repeat", [1, 5])
def test_an_order_is_kept_as_it_stands(flickr, repeat):
    """Ids of another spelling, also once a caption, in the folder of the features."""
    order = write(OUT / "train_ids.txt", np.repeat(["1006", "images/1000.jpg"], repeat))
    before = contents(".")
    prepare(flickr, "--split", "train", "--order", order)
    assert read_captions(OUT / "train_caps.txt") == captions_of([6, 0])
    assert contents(".").items() >= before.items()
    order = write("order.txt", ["1005", "1000"])  # a split of another name takes any image
    prepare(flickr, "--split", "some", "--order", order)
    assert read_captions(OUT / "some_ids.txt") == ["1005", "1000"]


def test_both_sources_give_the_same():
    """Karpathy's sentences are COCO's annotations in the order of their numbers."""
    prepare(write("k.json", karpathy(["val"] * 4, cocoid=True)))
    write("a.json", coco([2, 1]))
    write("b.json", coco([0, 3, 4]))
    order = ("--split", "dev", "--order", OUT / "dev_ids.txt")
    prepare("--coco", "a.json", "b.json", *order, "--data_path", "own")
    for name in ("dev_caps.txt", "dev_ids.txt"):
        assert Path("own/mine", name).read_bytes() == (OUT / name).read_bytes()
    words = ["2 images are there twice: 502, 501"]
    refuses(*PREPARE, "--coco", "a.json", "a.json", *order, words=words)


ORDERED = ("flickr.json", "--split", "dev", "--order", "order.txt")
FROM_COCO = ("--coco", "coco.json", "--split", "dev", "--order", "order.txt")


@pytest.mark.parametrize("given, arguments, words", [
    ({}, ["--coco", "a.json"], ["--order"]),
    ({}, ["flickr.json", "--order", "order.txt"], ["--split"]),
    ({OUT / "dev_ids.txt": ["1004", "1002"]}, ["flickr.json"], ["another order", "--order"]),
    ({OUT / "test_caps.txt": ["mine"]}, ["flickr.json"], ["test_caps.txt: exists"]),
    ({"k.json": ['{"images": [{"filename": "a.jpg", "sp']}, ["k.json"], ["not Karpathy's"]),
    ({"k.json": karpathy(["dev"])}, ["k.json"], ["KeyError: 'dev'"]),
    ({"k.json": {"images": 2 * karpathy(["val"])["images"]}}, ["k.json"], ["twice: 1000"]),
    ({"k.json": karpathy(["test"], captions=["a", " "])}, ["k.json"], ["five", "1000.jpg (1)"]),
    ({"coco.json": coco([7]), "order.txt": ["507", "8"]}, FROM_COCO, ["1 of its 2", "8"]),
    ({"coco.json": ["[]"], "order.txt": ["7"]}, FROM_COCO, ["not COCO's"]),
    ({"order.txt": ["1004", "77", "1002", "78"]}, ORDERED, ["2 of its 4", "77, 78"]),
    ({"order.txt": ["1004", "1005"]}, ORDERED, ["order.txt", "dev split", "1005"]),  # of test
    ({"order.txt": ["1004", "1002", "1004.jpg"]}, ORDERED, ["there twice: 1004"]),
    ({"order.txt": [""]}, ORDERED, ["order.txt: no image ids"]),
])  # fmt: skip
def test_captions_that_cannot_be_written_are_refused(flickr, given, arguments, words):
    for path, content in given.items():
        write(path, content)
    refuses(*PREPARE, *arguments, words=words)


# -- bottom-up TSV files --------------------------------------------------------------------------


def encoded(array):
    return base64.b64encode(np.asarray(array, "<f4").tobytes()).decode()


def features_of(image):
    """Features that tell the image."""
    return np.random.default_rng(image).random((REGIONS, WIDTH), np.float32)


def boxes_of(image):
    """Shares of the picture."""
    corners = np.random.default_rng(image + 1).random((REGIONS, 2, 2), np.float32)
    return np.sort(corners, axis=1).reshape(REGIONS, 4)


def row(image, **changes):
    boxes = boxes_of(image) * [640, 480, 640, 480]
    values = {"image_id": str(image), "image_w": "640", "image_h": "480", "num_boxes": str(REGIONS)}
    return values | {"boxes": encoded(boxes), "features": encoded(features_of(image))} | changes


def write_tsv(path, rows):
    """As Python 2's csv.DictWriter wrote them: tabs, CR LF."""
    Path(path).write_bytes("".join("\t".join(row.values()) + "\r\n" for row in rows).encode())
    return path


@pytest.fixture
def ids(in_its_own_folder):
    return "--ids", write("ids.txt", range(4))


@pytest.mark.parametrize(("dtype", "wrapped"), [("float32", "{}"), ("float16", "b'{}'")])
def test_rows_are_put_in_the_order_of_the_ids(dtype, wrapped):
    """Other rows are skipped, damaged, doubled or not. Python 3 may have wrapped the base64."""
    outside = encoded([[-0.4, 10, 640.6, 470]] * REGIONS)
    rows = [row(5), row(98, features="!"), row(3), row(391895, boxes=outside), row(3)]
    for values in rows:
        values |= {name: wrapped.format(values[name]) for name in ("boxes", "features")}
    ids = write("ids.txt", ["COCO_val2014_000000391895.jpg", "0005"])
    tsv = write_tsv("a.tsv", rows)
    convert(tsv, "--split", "dev", "--ids", ids, "--dtype", dtype)
    regions = np.load(OUT / "dev_ims.npy")
    boxes = read_boxes(OUT / "dev_boxes.npy", 2, REGIONS)
    assert regions.dtype == dtype and regions.flags.c_contiguous and boxes.dtype == np.float32
    assert np.array_equal(regions, np.array([features_of(391895), features_of(5)], dtype))
    assert np.allclose(boxes[1], boxes_of(5), atol=1e-6)
    assert (boxes[0, :, [0, 2]] == [[0], [1]]).all()  # rounded over the edge, and cut there
    assert read_captions(OUT / "dev_ids.txt") == ["COCO_val2014_000000391895.jpg", "0005"]


def test_files_of_three_kinds_one_after_the_other(ids):
    rows = Path(write_tsv("whole.tsv", map(row, range(4)))).read_bytes().splitlines(keepends=True)
    Path("a.tsv").write_bytes(rows[0].rstrip())  # no end of line at the end
    Path("b.tsv.gz").write_bytes(gzip.compress(rows[1]) + gzip.compress(b""))
    with zipfile.ZipFile("c.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in (("t/1.tsv", rows[2]), ("t/README", b"no rows"), ("t/2.tsv", rows[3])):
            archive.writestr(name, text)
    convert("a.tsv", "b.tsv.gz", "c.zip", *ids)
    assert np.array_equal(np.load(OUT / "test_ims.npy"), [features_of(i) for i in range(4)])


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("changes, words", [
    ({"features": row(2)["features"][:-5]}, ["padding"]),
    ({"features": encoded(np.zeros((57, WIDTH)))}, ["342", "4 regions × 6: --num_regions"]),
    ({"features": encoded(features_of(2) * np.nan)}, ["NaN"]),
    ({"features": encoded(np.full((REGIONS, WIDTH), 1e6))}, ["float16 cannot hold"]),
    ({"boxes": encoded(np.full((REGIONS, 4), np.inf))}, ["NaN"]),
    ({"boxes": encoded(boxes_of(2)[:, ::-1])}, ["x1 y1 x2 y2"]),
    ({"image_w": "nan"}, ["x1 y1 x2 y2"]),
    ({"image_id": "2\t3"}, ["the columns image_id, image_w"]),
])  # fmt: skip
def test_rows_that_are_wrong_are_refused(ids, changes, words):
    arguments = (write_tsv("a.tsv", [row(1), row(2, **changes), row(3)]), "--dtype", "float16")
    refuses(*CONVERT, *arguments, *ids, words=["a.tsv, line 2", *words])


def test_missing_and_double_images_are_named():
    tsv = write_tsv("a.tsv", [row(i) for i in (1, 2, 2, 3)])
    ids = write("ids.txt", [1, 3, *range(50, 60)])
    refuses(*CONVERT, tsv, "--ids", ids, words=["10 of 12", "none of", "50, 51, 52, …"])
    refuses(*CONVERT, tsv, "--ids", write("ids.txt", [2, 1]), words=["1 of 2", "twice: 2"])


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz", "a.zip"])
def test_a_file_cut_anywhere_or_of_something_else_is_refused(ids, name):
    write_tsv("whole.tsv", map(row, range(4)))
    with zipfile.ZipFile("whole.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write("whole.tsv")
    tsv = Path("whole.tsv").read_bytes()
    packed = {"a.tsv": tsv, "a.tsv.gz": gzip.compress(tsv), "a.zip": Path("whole.zip").read_bytes()}
    whole = packed[name]
    cut = (whole[:size] for size in range(0, len(whole) - 2, 41))  # it ends with CR LF
    for content in (*cut, b"\r\n\r\n", bytes(range(256)), b"no row\n"):
        Path(name).write_bytes(content)
        refuses(*CONVERT, name, *ids)
    Path(name).write_bytes(whole)
    convert(name, *ids)


def test_memory_holds_a_row_not_the_file(monkeypatch):
    """20 MB of rows, converted with less than a fourth of that."""
    monkeypatch.setattr(sys.modules[__name__], "WIDTH", 8192)
    write_tsv("a.tsv", (row(1, image_id=str(image)) for image in range(115)))
    tracemalloc.start()
    convert("a.tsv", "--ids", write("ids.txt", range(115)), "--img_dim", WIDTH)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6 and (OUT / "test_ims.npy").stat().st_size > 15e6


def test_what_is_in_the_way_is_said_before_the_work(ids, monkeypatch):
    """The TSV file holds nothing that could be converted."""
    write("bad.tsv", ["no row"])
    with monkeypatch.context() as patch:
        patch.setattr(convert_bottom_up.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
        refuses(*CONVERT, "bad.tsv", *ids, words=["GB needed"])
    write(OUT / "test_ids.txt", [2, 1])
    refuses(*CONVERT, "bad.tsv", *ids, words=["test_ids.txt", "another order", "--ids"])
    write(OUT / "test_boxes.npy", "x")
    refuses(*CONVERT, "bad.tsv", *ids, words=["test_boxes.npy: exists already"])


def test_each_caption_gets_its_image():
    """Captions, then regions from a TSV in another order, then the data set training reads."""
    splits = ["val", "test", "restval", "val", "train", "test", "val"]
    prepare(write("coco.json", karpathy(splits, cocoid=True)))
    tsv = write_tsv("a.tsv", [row(500 + n) for n in (6, 2, 0, 5, 4, 3, 1)])
    vocab = build_vocab(captions_of(range(7)), threshold=1)
    for split, numbers in {"train": [2, 4], "dev": [0, 3, 6], "test": [1, 5]}.items():
        convert(tsv, "--split", split, "--ids", OUT / f"{split}_ids.txt")
        dataset = PrecompDataset("data", "mine", split, vocab)
        assert dataset.texts == captions_of(numbers)
        for index in range(len(dataset)):
            number = numbers[index // 5]
            regions, _, image, _ = dataset[index]
            assert np.array_equal(regions.numpy(), features_of(500 + number))
            assert image_key(dataset.image_ids[image]) == str(500 + number)
