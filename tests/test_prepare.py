"""Captions from Karpathy's and COCO's files, regions from bottom-up TSV files, and both."""

import base64
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
from conftest import call, refused, succeeded
from prepare_captions import image_key

from data import PrecompDataset, read_boxes
from vocab import build_vocab

REGIONS, WIDTH = 4, 6
OUT = Path("data/mine")


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def prepare(*arguments):
    return call(".", prepare_captions.main, "--data_name", "mine", *arguments)


def convert(*arguments):
    sizes = ("--num_regions", REGIONS, "--img_dim", WIDTH)
    return call(".", convert_bottom_up.main, "--data_name", "mine", *sizes, *arguments)


def fails(work, *arguments, words):
    """Ends in one line that says all of `words`, and leaves every file as it was."""
    before = files()
    refused(work(*arguments), *words)
    assert files() == before


def files():
    return {str(file): file.read_bytes() for file in Path().rglob("*") if file.is_file()}


def read(path):
    return Path(path).read_text(encoding="utf-8").splitlines()


def write(path, content):
    """An array, JSON of Karpathy's or COCO's, text, or lines."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if str(path).endswith(".npy"):
        np.save(path, np.asarray(content, np.float32))
    elif str(path).endswith(".json"):
        content = {"images": content} if isinstance(content, list) else content
        Path(path).write_text(content if isinstance(content, str) else json.dumps(content))
    else:
        Path(path).write_text("".join(f"{line}\n" for line in content))
    return path


# -- captions -------------------------------------------------------------------------------------


def caption(image, k):
    return f"caption {k} of image {image} ."


def captions_of(images):
    return [caption(image, k) for image in images for k in range(5)]


def entry(number, split, n_captions=5, **more):
    """An image as in Karpathy's files; with a cocoid, as in his dataset_coco.json."""
    sentences = [{"raw": caption(number, k)} for k in range(n_captions)]
    names = {"filename": f"{1000 + number}.jpg", "imgid": number}
    return names | {"split": split, "sentences": sentences} | more


def coco_entries(splits):
    return [entry(number, split, cocoid=500 + number) for number, split in enumerate(splits)]


FLICKR = [entry(n, split) for n, split in enumerate("train test val train val test train".split())]


@pytest.fixture
def flickr(in_its_own_folder):
    return write("flickr.json", FLICKR)


def test_all_spellings_of_an_image_have_one_key():
    spellings = (
        "391895", "000000391895", "COCO_val2014_000000391895.jpg", " 391895.JPG ",
        "val2014/COCO_val2014_000000391895.jpg", "COCO_train2014_000000391895", "0391895.png",
    )  # fmt: skip
    assert {*map(image_key, spellings)} == {"391895"} and image_key("000") == "0"
    # A Flickr8k name is no number, and what is no picture's suffix belongs to the name.
    assert image_key("folder/1000268201_693b.jpg") == "1000268201_693b"
    assert len({image_key(name) for name in ("1", "10", "a1", "COCO_1", "1_0", "1.a")}) == 6


def test_splits_are_karpathys_in_file_order(flickr):
    assert "data/mine/train_caps.txt: 15 lines" in succeeded(prepare(flickr))
    assert len(files()) == 7
    for split, images in {"train": [0, 3, 6], "dev": [2, 4], "test": [1, 5]}.items():
        assert read(OUT / f"{split}_ids.txt") == [f"{1000 + i}.jpg" for i in images]
        assert read(OUT / f"{split}_caps.txt") == captions_of(images)


def test_restval_joins_train_and_test_is_the_first_1000_of_testall():
    splits = ["test", "restval", "train", "val", *["test"] * 1004]
    write("coco.json", coco_entries(splits))
    succeeded(prepare("coco.json"))
    assert read(OUT / "train_ids.txt") == ["501", "502"]
    testall = read(OUT / "testall_ids.txt")
    assert len(testall) == 1005 and testall[1] == "504"
    assert read(OUT / "test_ids.txt") == testall[:1000]
    assert read(OUT / "test_caps.txt") == read(OUT / "testall_caps.txt")[:5000]
    succeeded(prepare("coco.json", "--split", "dev", "--ids", "imgid", "--data_path", "a"))
    assert read("a/mine/dev_ids.txt") == ["3"] and len([*Path("a/mine").iterdir()]) == 2
    order = write("order.txt", ["1507"])  # the last of testall may be chosen for test
    succeeded(prepare("coco.json", "--split", "test", "--order", order, "--data_path", "b"))
    assert read("b/mine/test_caps.txt") == captions_of([1007])


def test_captions_are_cut_to_one_line_and_to_five():
    raws = [" A dog\nand a cat.\n", "a\tb\r\n  c", "naïve café – 日本 😀", "x\u2028y\x85z\x0bw",
            "  \n ", "the fifth that is not empty", "too many"]  # fmt: skip
    write("k.json", [entry(3, "test", sentences=[{"raw": raw} for raw in raws])])
    succeeded(prepare("k.json"))
    cleaned = ["A dog and a cat.", "a b c", "naïve café – 日本 😀", "x y z w", raws[5]]
    assert read(OUT / "test_caps.txt") == cleaned
    succeeded(prepare("k.json", "--captions_per_image", 2, "--data_path", "two"))
    assert read("two/mine/test_caps.txt") == cleaned[:2]


@pytest.mark.parametrize("repeat", [1, 5])
def test_an_order_is_kept_as_it_stands(flickr, repeat):
    """Ids of another spelling, also once a caption, in the folder of the features."""
    order = write(OUT / "train_ids.txt", np.repeat(["1006", "images/1000.jpg"], repeat))
    np.save(OUT / "train_ims.npy", np.arange(2 * repeat, dtype="f4").reshape(-1, 1, 1) // repeat)
    before = files()
    succeeded(prepare(flickr, "--split", "train", "--order", order))
    assert read(OUT / "train_caps.txt") == captions_of([6, 0])
    assert files().items() >= before.items()
    order = write("order.txt", ["1005", "1000"])  # a split of another name takes any image
    succeeded(prepare(flickr, "--split", "some", "--order", order))
    assert read(OUT / "some_ids.txt") == ["1005", "1000"]


def coco_content(images):
    """captions_*.json, its annotations in no order."""
    annotations = [
        {"id": 100 * image + k, "image_id": image, "caption": f" {caption(image, k)}\n"}
        for image in images
        for k in range(6 if image % 2 else 5)
    ]
    np.random.default_rng(0).shuffle(annotations)
    return {"annotations": annotations, "images": [{"id": image} for image in images]}


def test_both_sources_give_the_same():
    """Karpathy's sentences are COCO's annotations in the order of their numbers."""
    images = [entry(n, "val", 6 if n % 2 else 5, cocoid=n) for n in (31, 8, 7, 9)]
    succeeded(prepare(write("k.json", images)))
    write("a.json", coco_content([7, 8]))
    write("b.json", coco_content([9, 31, 10]))
    arguments = ("--coco", "a.json", "b.json", "--split", "dev", "--order", OUT / "dev_ids.txt")
    succeeded(prepare(*arguments, "--data_path", "own"))
    for name in ("dev_caps.txt", "dev_ids.txt"):
        assert Path("own/mine", name).read_bytes() == (OUT / name).read_bytes()
    arguments = ("--coco", "a.json", "a.json", *arguments[3:])
    fails(prepare, *arguments, words=["2 images are there twice: 7, 8"])


ORDERED = ("flickr.json", "--split", "dev", "--order", "order.txt")
FROM_COCO = ("--coco", "coco.json", "--split", "dev", "--order", "order.txt")
NO_CAPTION = coco_content([7, 8])
del NO_CAPTION["annotations"][3]["caption"]


@pytest.mark.parametrize(
    ("given", "arguments", "words"),
    [
        # Options.
        ({}, [], ["--coco"]),
        ({}, ["flickr.json", "--coco", "a.json"], ["not allowed"]),
        ({}, ["--coco", "a.json", "--split", "dev"], ["--order"]),
        ({}, ["flickr.json", "--order", "order.txt"], ["--split"]),
        ({}, ["flickr.json", "--split", "x"], ["--split x", "train, dev, test"]),
        ({}, ["flickr.json", "--ids", "cocoid"], ["flickr.json", "KeyError('cocoid')"]),
        ({}, ["no.json"], ["no.json"]),
        # What is there, and would not fit.
        ({OUT / "dev_ids.txt": ["1004", "1002"]}, ["flickr.json"], ["another order", "--order"]),
        ({OUT / "test_caps.txt": ["mine"]}, ["flickr.json"], ["test_caps.txt: exists"]),
        ({OUT / "dev_ims.npy": np.arange(3)[:, None, None]}, ["flickr.json"], ["3 images"]),
        ({OUT / "dev_ims.npy": np.arange(10)[:, None, None]}, ["flickr.json"], ["10 images"]),
        # Damaged annotations.
        ({"k.json": '{"images": [{"filename": "a.jpg", "sp'}, ["k.json"], ["not as in Karpathy's"]),
        ({"k.json": "[1, 2]"}, ["k.json"], ["k.json: not as in Karpathy's"]),
        ({"k.json": {"annotations": []}}, ["k.json"], ["KeyError('images')"]),
        ({"k.json": [entry(0, "dev")]}, ["k.json"], ["KeyError('dev')"]),
        ({"k.json": [*FLICKR, FLICKR[2]]}, ["k.json"], ["1 images are there twice: 1002"]),
        ({"k.json": [entry(0, "test", 3)]}, ["k.json"], ["fewer than 5", "1000.jpg (3)"]),
        ({"coco.json": NO_CAPTION, "order.txt": "78"}, FROM_COCO, ["KeyError('caption')"]),
        ({"coco.json": coco_content([7]), "order.txt": "78"}, FROM_COCO, ["1 of its 2", "8"]),
        ({"coco.json": [{"id": 7}], "order.txt": "7"}, FROM_COCO, ["fewer than 5", "7 (0)"]),
        ({"coco.json": "[]", "order.txt": "7"}, FROM_COCO, ["not as in COCO's"]),
        # Orders.
        ({"order.txt": ["1004", "77", "1002", "78"]}, ORDERED, ["2 of its 4", "77, 78"]),
        ({"order.txt": ["2", "4"]}, ORDERED, ["2 of its 2", "--ids"]),  # imgid
        ({"order.txt": ["1004", "1005"]}, ORDERED, ["order.txt", "dev split", "1005"]),  # of test
        ({"order.txt": ["1004", "1002", "1004.jpg"]}, ORDERED, ["there twice: 1004"]),
        ({"order.txt": [""]}, ORDERED, ["order.txt: no image ids"]),
    ],
)
def test_captions_that_cannot_be_written_are_refused(flickr, given, arguments, words):
    for path, content in given.items():
        write(path, content)
    fails(prepare, *arguments, words=words)


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
    values = {
        "image_id": str(image), "image_w": "640", "image_h": "480", "num_boxes": str(REGIONS),
        "boxes": encoded(boxes_of(image) * [640, 480, 640, 480]),
        "features": encoded(features_of(image)),
    }  # fmt: skip
    return values | changes


def write_tsv(path, rows, names=convert_bottom_up.FIELDS):
    """As Python 2's csv.DictWriter wrote them: tabs, CR LF."""
    text = "".join("\t".join(row.get(name, "x") for name in names) + "\r\n" for row in rows)
    Path(path).write_bytes(text.encode())
    return path


@pytest.mark.parametrize(("dtype", "wrapped"), [("float32", "{}"), ("float16", "b'{}'")])
def test_rows_are_put_in_the_order_of_the_ids(dtype, wrapped):
    """Other rows are skipped, damaged, doubled or not. Python 3 may have wrapped the base64."""
    rows = [row(5), row(98, features="!"), row(3), row(391895), row(3)]
    for values in rows:
        values |= {name: wrapped.format(values[name]) for name in ("boxes", "features")}
    ids = write("ids.txt", ["COCO_val2014_000000391895.jpg", "0005"])
    tsv = write_tsv("a.tsv", rows)
    succeeded(convert(tsv, "--split", "dev", "--ids", ids, "--dtype", dtype))
    regions = np.load(OUT / "dev_ims.npy")
    boxes = read_boxes(OUT / "dev_boxes.npy", 2, REGIONS)
    assert regions.dtype == dtype and regions.flags.c_contiguous and boxes.dtype == np.float32
    assert np.array_equal(regions, np.array([features_of(391895), features_of(5)], dtype))
    assert np.allclose(boxes, [boxes_of(391895), boxes_of(5)], atol=1e-6)
    assert read(OUT / "dev_ids.txt") == ["COCO_val2014_000000391895.jpg", "0005"]


def test_without_ids_all_rows_in_file_order():
    """Files of three kinds, one after the other."""
    rows = Path(write_tsv("whole.tsv", map(row, range(6)))).read_bytes().splitlines(keepends=True)
    Path("a.tsv").write_bytes(b"".join(rows[:2]).rstrip())  # no end of line at the end
    Path("b.tsv.gz").write_bytes(gzip.compress(rows[2]) + gzip.compress(b"\n" + rows[3]))
    with zipfile.ZipFile("c.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in (("t/1.tsv", rows[4]), ("t/README", b"no rows"), ("t/2.tsv", rows[5])):
            archive.writestr(name, text)
    succeeded(convert("a.tsv", "b.tsv.gz", "c.zip"))
    assert read(OUT / "test_ids.txt") == list("012345")
    assert np.array_equal(np.load(OUT / "test_ims.npy"), [features_of(i) for i in range(6)])
    succeeded(convert("whole.tsv", "--split", "again"))
    for kind in ("ims", "boxes"):
        again = (OUT / f"again_{kind}.npy").read_bytes()
        assert again == (OUT / f"test_{kind}.npy").read_bytes()


def test_other_columns_are_named():
    fields = ["image_id", "image_h", "image_w", "_", "_", "boxes", "features"]
    write_tsv("a.tsv", [row(4), row(1, boxes=encoded([[-0.4, 10, 640.6, 470]] * REGIONS))], fields)
    succeeded(convert("a.tsv", "--fields", ",".join(fields)))
    boxes = np.load(OUT / "test_boxes.npy")
    assert np.allclose(boxes[0], boxes_of(4), atol=1e-6)
    assert (boxes[1, :, [0, 2]] == [[0], [1]]).all()  # rounded over the edge, and cut there
    lacking = ("a.tsv", "--fields", "image_id,features,boxes")
    fails(convert, *lacking, words=["image_w, image_h"])
    fields[1:3] = "image_w", "image_h"
    swapped = ("a.tsv", "--split", "b", "--fields", ",".join(fields))
    fails(convert, *swapped, words=["480 × 640", "other way round"])


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"features": row(2)["features"][:-5]}, ["padding"]),
        ({"features": row(2)["features"][:-8]}, ["4 regions × 6", "--img_dim"]),
        ({"features": encoded(np.zeros((57, WIDTH)))}, ["342", "4 regions × 6", "--num_regions"]),
        ({"features": ""}, ["base64"]),
        ({"features": encoded(features_of(2) * np.nan)}, ["NaN"]),
        ({"features": encoded(np.full((REGIONS, WIDTH), 1e6))}, ["float16 cannot hold"]),
        ({"boxes": encoded(np.full((REGIONS, 4), np.inf))}, ["NaN"]),
        ({"boxes": encoded(boxes_of(2)[:, ::-1])}, ["x1 y1 x2 y2"]),
        ({"image_w": "nan"}, ["x1 y1 x2 y2"]),
        ({"image_w": "image_w"}, ["'image_w'", "--fields"]),
        ({"image_id": "2\t3"}, ["6 columns"]),
    ],
)
def test_rows_that_are_wrong_are_refused(changes, words):
    arguments = (write_tsv("a.tsv", [row(1), row(2, **changes), row(3)]), "--dtype", "float16")
    fails(convert, *arguments, words=["a.tsv, line 2", *words])


def test_missing_and_double_images_are_named():
    write_tsv("a.tsv", [row(i) for i in (1, 2, 2, 3, 4, 4)])
    fails(convert, "a.tsv", words=["a.tsv: 2 images are there twice: 2, 4"])
    arguments = ("a.tsv", "--ids", "ids.txt")
    write("ids.txt", [1, 3, *range(50, 60)])
    fails(convert, *arguments, words=["10 of 12", "none of", "50, 51, 52, …"])
    write("ids.txt", [2, 1])
    fails(convert, *arguments, words=["1 of 2", "twice: 2"])


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz", "a.zip"])
def test_a_file_cut_anywhere_is_refused(name):
    whole = Path(write_tsv("whole.tsv", map(row, range(3)))).read_bytes()
    if name == "a.tsv.gz":
        whole = gzip.compress(whole)
    if name == "a.zip":
        with zipfile.ZipFile("whole.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write("whole.tsv")
        whole = Path("whole.zip").read_bytes()
    arguments = (name, "--ids", write("ids.txt", "210"))
    for size in range(0, len(whole) - 2, 41):  # the last two bytes are an end of line
        Path(name).write_bytes(whole[:size])
        fails(convert, *arguments, words=())
    Path(name).write_bytes(whole)
    succeeded(convert(*arguments))


@pytest.mark.parametrize("content", [b"", b"\r\n\r\n", bytes(range(256)), b"no row\n"])
@pytest.mark.parametrize("name", ["bad.tsv", "bad.gz", "bad.zip"])
def test_files_without_rows_are_refused(content, name):
    Path(name).write_bytes(content)
    good = write_tsv("good.tsv", [row(1)])
    fails(convert, good, name, words=[name])


def test_memory_holds_a_row_not_the_file(monkeypatch):
    """20 MB of rows, converted with less than a fourth of that."""
    monkeypatch.setattr(sys.modules[__name__], "WIDTH", 8192)
    write_tsv("a.tsv", (row(1, image_id=str(image)) for image in range(115)))
    assert Path("a.tsv").stat().st_size > 20e6
    tracemalloc.start()
    succeeded(convert("a.tsv"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6 and np.load(OUT / "test_ims.npy", mmap_mode="r").shape[0] == 115


def test_what_is_in_the_way_is_said_before_the_work(monkeypatch):
    """The TSV file holds nothing that could be converted."""
    arguments = (write("bad.tsv", ["no row"]), "--ids", write("ids.txt", [1, 2]))
    with monkeypatch.context() as patch:
        usage = type("Usage", (), {"free": 10})
        patch.setattr(convert_bottom_up.shutil, "disk_usage", lambda folder: usage)
        fails(convert, *arguments, words=["GB needed", "GB free"])
    for name, content, words in (
        ("test_caps.txt", range(15), ["15 captions, but 2 images"]),
        ("test_ids.txt", [2, 1], ["another order", "--ids data/mine/test_ids.txt"]),
        ("test_boxes.npy", [0], ["test_boxes.npy: exists already"]),
    ):
        write(OUT / name, content)
        fails(convert, *arguments, words=words)


def test_a_full_disk_leaves_nothing():
    """A limit on the size of files stands for the disk: both end a write in an error."""
    tsv = write_tsv("a.tsv", map(row, range(99)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        fails(convert, tsv, words=["File too large"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# -- both together --------------------------------------------------------------------------------


def test_each_caption_gets_its_image():
    """Captions, then regions from a TSV in another order, then the data set training reads."""
    splits = ["val", "test", "restval", "val", "train", "test", "val"]
    succeeded(prepare(write("coco.json", coco_entries(splits))))
    tsv = write_tsv("a.tsv", [row(500 + n) for n in (6, 2, 0, 5, 4, 3, 1)])
    vocab = build_vocab(captions_of(range(7)), threshold=1)
    for split, numbers in {"train": [2, 4], "dev": [0, 3, 6], "test": [1, 5]}.items():
        succeeded(convert(tsv, "--split", split, "--ids", OUT / f"{split}_ids.txt"))
        dataset = PrecompDataset("data", "mine", split, vocab)
        assert dataset.texts == captions_of(numbers)
        for index in range(len(dataset)):
            number = numbers[index // 5]
            regions, _, image, _ = dataset[index]
            assert np.array_equal(regions.numpy(), features_of(500 + number))
            assert image_key(dataset.image_ids[image]) == str(500 + number)
