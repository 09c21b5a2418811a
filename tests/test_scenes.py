"""The embedded data set: layout, twins, captions that tell them apart, features of pixels."""

import json
import re
import sys

import make_scenes as scenes
import numpy as np
import pytest
from PIL import Image

from data import PrecompDataset
from vocab import build_from_data

SIZES = {"train": 14, "dev": 4, "test": 24}
PHRASE = re.compile(r"\b(a|one|two|three) (small|little|large|big) (\w+) (\w+)")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small data set; its folder."""
    out = tmp_path_factory.mktemp("data")
    scenes.make_scenes(out, 0, SIZES)
    return out


def lines(out, split, kind):
    text = (out / "scenes_precomp" / f"{split}_{kind}").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return text[:-1].split("\n")


def records(out, split):
    return [json.loads(line) for line in lines(out, split, "scenes.jsonl")]


def captions(out, split):
    texts = lines(out, split, "caps.txt")
    return [texts[i : i + 5] for i in range(0, len(texts), 5)]


def objects(record):
    keys = ("count", "size", "colour", "shape")
    return {tuple(group[key] for key in keys) for group in record["groups"]}


def phrase_to_object(count, size, colour, shape):
    number = {"a": 1, "one": 1, "two": 2, "three": 3}[count]
    singular = {f"{s}{'es' * (s == 'cross') or 's'}": s for s in scenes.SHAPES}
    assert (shape in scenes.SHAPES) == (number == 1)
    size = {"little": "small", "big": "large"}.get(size, size)
    return number, size, colour, singular.get(shape, shape)


def read(caption):
    """An English reader apart from the grammar: (object, side, object), all objects named.

    The side is left, right, above or below: the first object is on that side of the second.
    """
    text = caption.lower().rstrip(".")
    named = [phrase_to_object(*found.groups()) for found in PHRASE.finditer(text)]
    sides = {"over": "above", "under": "below", "beneath": "below", "top": "above",
             "bottom": "below"}  # fmt: skip
    word = re.search(r"\b(left|right|above|below|over|under|beneath|top|bottom)\b", text)[1]
    side = sides.get(word, word)
    from_second = re.search(r"(its|their) (left|right)|(above|below) (it|them)\b", text)
    begins = re.match(r"(to the )?(left of|right of|above|below|over|under|beneath)", text)
    first, second = named[:2]
    return (second, side, first, named) if from_second or begins else (first, side, second, named)


def holds(record, first, side, second):
    """Whether all of one group is clear of the other, on that side, by where they stand."""

    def extent(wanted, axis):
        keys = ("count", "size", "colour", "shape")
        (group,) = [g for g in record["groups"] if tuple(g[k] for k in keys) == wanted]
        along = [centre[axis] for centre in group["centres"]]
        return min(along) - group["radius"], max(along) + group["radius"]

    axis = 0 if side in ("left", "right") else 1
    low, high = (first, second) if side in ("left", "above") else (second, first)
    return extent(low, axis)[1] < extent(high, axis)[0]


def test_same_seed_same_bytes(made, tmp_path):
    scenes.make_scenes(tmp_path / "again", 0, SIZES)
    files = sorted(p.relative_to(made) for p in made.rglob("*") if p.is_file())
    assert len(files) == 3 * 7 + 1 + sum(SIZES.values())
    for file in files:
        assert (made / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_other_seed_other_scenes(made, tmp_path):
    scenes.make_scenes(tmp_path, 1, SIZES)
    assert captions(tmp_path, "test") != captions(made, "test")


def test_one_size_changes_no_other_split_and_no_earlier_picture(made, tmp_path):
    scenes.make_scenes(tmp_path, 0, {"train": 7, "dev": 4, "test": 26})
    assert captions(tmp_path, "test")[:24] == captions(made, "test")
    assert captions(tmp_path, "train") == captions(made, "train")[:7]
    pixels = [(out / "scenes_images/dev/dev_00003.png").read_bytes() for out in (made, tmp_path)]
    assert pixels[0] == pixels[1]


def test_smaller_run_leaves_no_stale_pictures(tmp_path):
    for n in (4, 2):
        scenes.make_scenes(tmp_path, 0, dict.fromkeys(SIZES, n))
    assert len(list((tmp_path / "scenes_images").rglob("*.png"))) == 6


@pytest.mark.parametrize("split", SIZES)
def test_scan_layout(made, split):
    n = SIZES[split]
    folder = made / "scenes_precomp"
    features = np.load(folder / f"{split}_ims.npy")
    boxes = np.load(folder / f"{split}_boxes.npy")
    assert features.dtype == boxes.dtype == np.float32
    assert features.shape[:2] == (n, 36) and 128 <= features.shape[2] <= 256
    assert boxes.shape == (n, 36, 4)
    assert (boxes[..., 2:] > boxes[..., :2]).all() and boxes.min() == 0 and boxes.max() == 96
    assert np.isfinite(features).all()
    ids = lines(made, split, "ids.txt")
    assert ids == [record["image"] for record in records(made, split)]
    for name in ids:
        with Image.open(made / "scenes_images" / split / name) as picture:
            assert (picture.size, picture.mode) == ((96, 96), "RGB")

    vocab = build_from_data(made, "scenes_precomp")
    dataset = PrecompDataset(made, "scenes_precomp", split, vocab)
    assert (dataset.n_images, len(dataset), dataset.image_ids) == (n, 5 * n, ids)


@pytest.mark.parametrize("split", SIZES)
def test_five_different_captions_name_what_is_there(made, split):
    for record, texts in zip(records(made, split), captions(made, split), strict=True):
        assert len(set(texts)) == 5
        related = {tuple(list(group.values())[:4]) for group in record["groups"][:2]}
        for text in texts:
            assert text[0].isupper() and text.endswith(".") and "{" not in text
            first, _, second, named = read(text)
            assert {first, second} == related
            assert set(named) <= objects(record)


@pytest.mark.parametrize("split", SIZES)
def test_twins_are_the_same_objects_in_another_relation(made, split):
    all_records, texts = records(made, split), captions(made, split)
    for i, record in enumerate(all_records):
        twin = all_records[record["twin"]]
        assert twin["twin"] == i and twin is not record
        assert objects(record) == objects(twin) and record["relation"] != twin["relation"]
        assert not set(texts[i]) & set(texts[record["twin"]])


@pytest.mark.parametrize("split", SIZES)
def test_captions_are_true_of_the_picture_and_false_of_its_twin(made, split):
    all_records = records(made, split)
    for record, texts in zip(all_records, captions(made, split), strict=True):
        for text in texts:
            claim = read(text)[:3]
            assert holds(record, *claim), text
            assert not holds(all_records[record["twin"]], *claim), text


def test_two_groups_stand_together_in_one_family_of_one_split():
    seen = set()
    for split, n in {"train": 600, "dev": 100, "test": 200}.items():
        drawn = scenes.draw_scenes(split, n, np.random.default_rng(3))
        assert len({(frozenset(s.groups), s.relation) for s in drawn}) == n
        for groups in {scene.groups for scene in drawn}:
            pairs = {frozenset((a, b)) for a in groups for b in groups if a != b}
            assert not pairs & seen
            seen |= pairs
        assert {len(s.groups) for s in drawn} == {2, 3}


def test_objects_are_inside_and_apart():
    rng = np.random.default_rng(0)
    for scene in scenes.draw_scenes("train", 150, rng):
        places, radii = scenes.lay_out(scene, rng)
        circles = [(*c, r) for cs, r in zip(places, radii, strict=True) for c in cs]
        for i, (x, y, r) in enumerate(circles):
            assert r < min(x, y) and max(x, y) < 96 - r
            assert all(np.hypot(x - u, y - v) > r + s for u, v, s in circles[:i])


def test_any_two_groups_find_room():
    rng = np.random.default_rng(0)
    largest = [scenes.Group(3, "large", "red", "square"), scenes.Group(3, "large", "blue", "star")]
    for relation in scenes.RELATIONS:
        for third in ([], [scenes.Group(3, "large", "green", "cross")]):
            places, _ = scenes.lay_out(scenes.Scene((*largest, *third), relation), rng)
            assert len(places) == 2 + len(third)


def test_features_are_those_of_the_pictures_on_disk(made):
    def raw(split):
        files = [made / "scenes_images" / split / i for i in lines(made, split, "ids.txt")]
        return scenes.region_features(np.stack([np.asarray(Image.open(f)) for f in files]))

    train, test = raw("train"), raw("test")
    mean, std = train.mean(axis=(0, 1)), train.std(axis=(0, 1))
    written = np.load(made / "scenes_precomp" / "test_ims.npy")
    gain = np.ones_like(mean)
    gain[-scenes.N_PLACE :] = scenes.PLACE_GAIN
    np.testing.assert_allclose(written, gain * (test - mean) / std, rtol=1e-2, atol=3e-2)
    standard = np.load(made / "scenes_precomp" / "train_ims.npy")
    np.testing.assert_allclose(standard.mean(axis=(0, 1)), 0, atol=1e-3)
    np.testing.assert_allclose(standard.std(axis=(0, 1)), gain, atol=3e-2)


def test_a_pixel_changes_only_the_windows_it_is_in():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (1, 96, 96, 3), dtype=np.uint8)
    before = scenes.region_features(pixels)[0]
    x1, y1, x2, y2 = scenes.window_boxes().T
    for x, y in ((0, 0), (11, 12), (35, 36), (36, 35), (47, 60), (95, 95)):
        changed = pixels.copy()
        changed[0, y, x] = 255 - changed[0, y, x]
        moved = (scenes.region_features(changed)[0] != before).any(axis=1)
        inside = (x1 <= x) & (x < x2) & (y1 <= y) & (y < y2)
        np.testing.assert_array_equal(moved, inside)


def test_a_linear_map_reads_colour_shape_and_size_from_a_window():
    rng = np.random.default_rng(0)
    groups = [group for group in scenes.GROUPS if group.count == 1] * 6
    pixels = []
    for group in groups:
        radius = scenes.SIZES[group.size][0]
        centre = rng.uniform(radius, 36 - radius, (1, 2))  # inside the first window
        picture = scenes.draw(scenes.Scene((group,), "above"), [centre], [radius], rng)
        pixels.append(np.asarray(picture))
    features = scenes.region_features(np.stack(pixels))[:, 0].astype(np.float64)
    features = (features - features.mean(axis=0)) / (features.std(axis=0) + 1e-6)
    seen = np.arange(len(groups)) < 300
    kernel = features @ features.T
    for attribute, least in (("colour", 0.97), ("shape", 0.9), ("size", 0.97)):
        values = sorted({getattr(group, attribute) for group in groups})
        labels = np.array([values.index(getattr(group, attribute)) for group in groups])
        ridge = np.linalg.solve(
            kernel[seen][:, seen] + np.eye(300), np.eye(len(values))[labels[seen]]
        )
        read = (kernel[~seen][:, seen] @ ridge).argmax(axis=1)
        accuracy = (read == labels[~seen]).mean()
        assert accuracy >= least, attribute


def test_features_do_not_depend_on_the_block(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 96, 96, 3), dtype=np.uint8)
    whole = scenes.region_features(pixels)
    monkeypatch.setattr(scenes, "FEATURE_BLOCK", 2)
    np.testing.assert_array_equal(scenes.region_features(pixels), whole)


def test_foils_are_false_by_one_word(made):
    """By the English reader: one object named is another, in one attribute, and not there."""
    keys = ("count", "size", "colour", "shape")
    for split in SIZES:
        texts, scenes_of = lines(made, split, "caps.txt"), records(made, split)
        found = {}
        for foil in map(json.loads, lines(made, split, "foils.jsonl")):
            right = texts[foil["caption"]]
            found.setdefault(foil["caption"], []).append(foil["kind"])
            changed = [(a, b) for a, b in zip(right.split(), foil["text"].split(), strict=True)
                       if a != b]  # fmt: skip
            assert len(changed) == 1, (right, foil)
            (_, side, _, named), (_, same, _, others) = read(right), read(foil["text"])
            assert same == side
            ((true, false),) = [(a, b) for a, b in zip(named, others, strict=True) if a != b]
            assert [k for k, a, b in zip(keys, true, false, strict=True) if a != b] == [
                foil["kind"]
            ]
            assert false not in objects(scenes_of[foil["caption"] // 5])
        for caption, text in enumerate(texts):
            several = re.search(r"\b(two|three)\b", text.lower()) is not None
            kinds = ["count"] * several + ["size", "colour", "shape"]
            assert sorted(found[caption]) == sorted(kinds), text


def test_features_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match="96"):
        scenes.region_features(np.zeros((1, 64, 64, 3), dtype=np.uint8))


def test_ceiling_by_hand():
    # Images 0 and 1 tie on all four of their captions; image 2 is alone, and right.
    scores = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]], dtype=float)
    image_of_caption = np.array([0, 0, 1, 1, 2, 2])
    found = scenes.ceiling(scores, image_of_caption)
    assert found["i2t"]["r1"] == found["t2i"]["r1"] == pytest.approx(100 * (0.5 + 0.5 + 1) / 3)
    assert found["i2t"]["r5"] == found["t2i"]["r10"] == 100
    assert found["rsum"] == pytest.approx(2 * 200 / 3 + 400)


def test_ties_in_expectation():
    # One right among four tied, behind one that is better: it is 2nd … 5th, each as likely.
    scores, right = np.array([[3, 2, 2, 2, 2, 1]]), np.array([[0, 0, 1, 0, 0, 0]], dtype=bool)
    recalls = [scenes.expected_recall(scores, right, k) for k in range(1, 7)]
    assert recalls == pytest.approx([0, 25, 50, 75, 100, 100])
    # Two right among four tied: both wrong ones come first in 1 of C(4, 2) orders.
    scores, right = np.ones((1, 4)), np.array([[1, 0, 1, 0]], dtype=bool)
    recalls = [scenes.expected_recall(scores, right, k) for k in (1, 2, 3)]
    assert recalls == pytest.approx([50, 100 * 5 / 6, 100])


def test_objects_alone_do_not_tell_twins_apart(made, capsys):
    guess = scenes.make_scenes(made, 0, SIZES)
    five_wrong_first = 1 / 252  # C(10, 5) orders of the ten captions of two twins
    assert guess["i2t"]["r1"] == guess["t2i"]["r1"] == pytest.approx(50)
    assert guess["i2t"]["r5"] == pytest.approx(100 * (1 - five_wrong_first))
    assert guess["t2i"]["r5"] == guess["t2i"]["r10"] == guess["i2t"]["r10"] == 100
    printed = capsys.readouterr().out
    assert f"rsum {guess['rsum']:.1f}" in printed and "R@1 50.0" in printed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--train", "-3"], "--train -3"),
        (["--dev", "0"], "--dev 0"),
        (["--test", "7"], "even"),
        (["--test", "1000000"], "--test 1000000"),
        (["--seed", "-1"], "--seed -1"),
        (["--out", "taken/data"], "taken"),
    ],
)
def test_bad_options_end_in_one_line(arguments, says, tmp_path, monkeypatch, capsys):
    (tmp_path / "taken").write_text("a file, no folder")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["make_scenes.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        scenes.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1 and says in error
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
