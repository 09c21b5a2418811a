"""The drawn data set: layout, twins, captions that tell them apart, features, questions."""

import copy
import json
import re

import make_scenes as scenes
import numpy as np
import pytest
import torch
from conftest import call, contents, load_split, refused
from diagnose import KINDS, diagnose
from PIL import Image

from model import LHSC
from utils import InputError

SIZES = {"train": 60, "dev": 4, "test": 24}
MODEL_SIZES = {"img_dim": 239, "embed_size": 12, "word_dim": 8, "sim_dim": 6}
KEYS = ("count", "size", "colour", "shape")
PHRASE = re.compile(r"\b(a|one|two|three) (small|little|large|big) (\w+) (\w+)")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a small data set."""
    out = tmp_path_factory.mktemp("made") / "data"
    scenes.make_scenes(out, 0, SIZES)
    return out


def lines(out, split, kind):
    return (out / "scenes_precomp" / f"{split}_{kind}").read_text("utf-8").splitlines()


def records(out, split, kind="scenes"):
    return [json.loads(line) for line in lines(out, split, f"{kind}.jsonl")]


def objects(record):
    return {tuple(group[key] for key in KEYS): group for group in record["groups"]}


def read(caption):
    """A reader that knows no templates: (group, side, group), and all groups named.

    side is left, right, above or below: where the first group is, seen from the second.
    """
    text = caption.lower().rstrip(".")
    named = []
    for count, size, colour, shape in PHRASE.findall(text):
        count = {"a": 1, "one": 1, "two": 2, "three": 3}[count]
        if shape not in scenes.SHAPES:
            shape = shape.removesuffix("es") if shape == "crosses" else shape.removesuffix("s")
            assert count > 1
        named.append((count, {"little": "small", "big": "large"}.get(size, size), colour, shape))
    word = re.search(r"\b(left|right|above|below|over|under|beneath|top|bottom)\b", text)[1]
    side = {"over": "above", "under": "below", "beneath": "below", "top": "above",
            "bottom": "below"}.get(word, word)  # fmt: skip
    from_second = re.search(r"(its|their) (left|right)|(above|below) (it|them)\b", text)
    begins = re.match(r"(to the )?(left of|right of|above|below|over|under|beneath)", text)
    first, second = named[:2]
    return (second, side, first, named) if from_second or begins else (first, side, second, named)


def holds(record, first, side, second):
    """Whether all objects of a group are clear of the other group, on that side."""
    order = (first, second) if side in ("left", "above") else (second, first)
    low, high = (objects(record)[group] for group in order)
    axis = 0 if side in ("left", "right") else 1
    end = max(centre[axis] for centre in low["centres"]) + low["radius"]
    return end < min(centre[axis] for centre in high["centres"]) - high["radius"]


def test_the_seed_decides_the_bytes_and_sizes_only_append(made, tmp_path):
    scenes.make_scenes(tmp_path, 1, SIZES)
    assert lines(tmp_path, "test", "caps.txt") != lines(made, "test", "caps.txt")
    scenes.make_scenes(tmp_path, 0, {"train": 6, "dev": 4, "test": 22})
    assert records(tmp_path, "train") == records(made, "train")[:6]
    assert lines(tmp_path, "test", "caps.txt") == lines(made, "test", "caps.txt")[:110]
    scenes.make_scenes(tmp_path, 0, SIZES)
    found = contents(made)
    assert found == contents(tmp_path) and len(found) == 5 + 3 * 6 + sum(SIZES.values())


@pytest.mark.parametrize("split", SIZES)
def test_scan_layout(made, split):
    n, folder = SIZES[split], made / "scenes_precomp"
    features, boxes = (np.load(folder / f"{split}_{kind}.npy") for kind in ("ims", "boxes"))
    assert features.dtype == boxes.dtype == np.float32 and np.isfinite(features).all()
    assert features.shape == (n, 36, 239) and boxes.shape == (n, 36, 4)
    assert (boxes[..., 2:] > boxes[..., :2]).all() and boxes.min() == 0 and boxes.max() == 96
    ids = lines(made, split, "ids.txt")
    assert ids == [record["image"] for record in records(made, split)]
    dataset, _ = load_split(made.parent, split, "scenes_precomp")
    assert (dataset.n_images, len(dataset), dataset.image_ids) == (n, 5 * n, ids)


@pytest.mark.parametrize("split", SIZES)
def test_captions_are_true_of_the_picture_and_false_of_its_twin(made, split):
    """The groups that a test caption names are in its picture and in the twin, and in no other."""
    seen, pictures = {}, records(made, split)
    for k, text in enumerate(lines(made, split, "caps.txt")):
        record = pictures[k // 5]
        twin = pictures[record["twin"]]
        assert text[0].isupper() and text.endswith(".") and "{" not in text
        seen.setdefault(record["image"], set()).add(text)
        first, side, second, named = read(text)
        assert {first, second} == set(list(objects(record))[:2])
        assert holds(record, first, side, second) and not holds(twin, first, side, second), text
        there = [r for r in pictures if set(named) <= objects(r).keys()]
        assert split != "test" or there == sorted([record, twin], key=pictures.index)
        assert set(named) <= objects(record).keys() == objects(twin).keys()
    assert {len(texts) for texts in seen.values()} == {5}


def test_foils_are_false_by_one_word(made):
    for split in SIZES:
        texts, pictures = lines(made, split, "caps.txt"), records(made, split)
        kinds = {k: [] for k in range(len(texts))}
        for foil in records(made, split, "foils"):
            right = texts[foil["caption"]]
            kinds[foil["caption"]].append(foil["kind"])
            words = zip(right.split(), foil["text"].split(), strict=True)
            assert sum(a != b for a, b in words) == 1
            (_, side, _, named), (_, same, _, others) = read(right), read(foil["text"])
            ((true, false),) = [(a, b) for a, b in zip(named, others, strict=True) if a != b]
            changed = [k for k, a, b in zip(KEYS, true, false, strict=True) if a != b]
            assert side == same and changed == [foil["kind"]]
            assert false not in objects(pictures[foil["caption"] // 5])
        for k, text in enumerate(texts):
            several = re.search(r"\b(two|three)\b", text.lower()) is not None
            assert kinds[k] == ["count"] * several + ["size", "colour", "shape"], text


def test_two_groups_share_one_family_of_one_split():
    seen = set()
    for split, n in {"train": 600, "dev": 100, "test": 200}.items():
        drawn = scenes.draw_scenes(split, n, np.random.default_rng(3))
        assert len({(frozenset(s.groups), s.relation) for s in drawn}) == n
        assert {len(s.groups) for s in drawn} == {2, 3}
        for groups in {scene.groups for scene in drawn}:
            pairs = {frozenset((a, b)) for a in groups for b in groups if a != b}
            assert not pairs & seen
            seen |= pairs


def test_objects_are_inside_and_apart():
    rng = np.random.default_rng(0)
    huge = [scenes.Group(3, "large", *look) for look in
            (("red", "square"), ("blue", "star"), ("green", "cross"))]  # fmt: skip
    hardest = [scenes.Scene(tuple(huge), relation) for relation in scenes.RELATIONS]
    for scene in hardest + scenes.draw_scenes("train", 100, rng):
        places, radii = scenes.lay_out(scene, rng)
        circles = [(*c, r) for cs, r in zip(places, radii, strict=True) for c in cs]
        assert len(circles) == sum(group.count for group in scene.groups)
        for i, (x, y, r) in enumerate(circles):
            assert r < min(x, y) and max(x, y) < 96 - r
            assert all(np.hypot(x - u, y - v) > r + s for u, v, s in circles[:i])


def test_features_are_those_of_the_pictures_on_disk(made):
    def raw(split):
        files = [made / "scenes_images" / split / i for i in lines(made, split, "ids.txt")]
        return scenes.region_features(np.stack([np.asarray(Image.open(f)) for f in files]))

    mean, std = raw("train").mean(axis=(0, 1)), raw("train").std(axis=(0, 1))
    gain = np.ones(239)
    gain[-scenes.N_PLACE :] = scenes.PLACE_GAIN
    written = np.load(made / "scenes_precomp" / "test_ims.npy")
    np.testing.assert_allclose(written, gain * (raw("test") - mean) / std, rtol=1e-2, atol=3e-2)
    standard = np.load(made / "scenes_precomp" / "train_ims.npy")
    np.testing.assert_allclose(standard.std(axis=(0, 1)), gain, atol=3e-2)


def test_a_pixel_changes_only_the_windows_it_is_in():
    pixels = np.random.default_rng(0).integers(0, 256, (1, 96, 96, 3), dtype=np.uint8)
    points = ((0, 0), (11, 12), (35, 36), (36, 35), (47, 60), (95, 95))
    changed = np.repeat(pixels, len(points), axis=0)
    for picture, (x, y) in zip(changed, points, strict=True):
        picture[y, x] = 255 - picture[y, x]
    moved = (scenes.region_features(changed) != scenes.region_features(pixels)).any(axis=2)
    x1, y1, x2, y2 = scenes.BOXES.T
    inside = [(x1 <= x) & (x < x2) & (y1 <= y) & (y < y2) for x, y in points]
    np.testing.assert_array_equal(moved, inside)


def test_bad_options_end_in_a_line(tmp_path):
    (tmp_path / "taken").write_text("a file, not a folder")
    for option, value, says in (
        ("--dev", 0, "--dev"), ("--test", 7, "even"), ("--test", 1_000_000, "--test 1000000"),
        ("--out", "taken/data", "taken"),
    ):  # fmt: skip
        refused(call(tmp_path, scenes.main, option, value), says)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


# -- diagnose.py: accuracy on relations, attributes and counts -------------------------------------


@pytest.fixture(scope="module")
def model(made):
    """Of random weights."""
    _, vocab = load_split(made.parent, "dev", "scenes_precomp")
    torch.manual_seed(1)
    model = LHSC(len(vocab), **MODEL_SIZES).eval()
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.5, 0.5)
    return model


def answers(made, split, model, questions=None):
    """What diagnose finds; its questions are in the data set's folder, unless told otherwise."""
    dataset, vocab = load_split(made.parent, split, "scenes_precomp")
    questions = questions or made / "scenes_precomp"
    return diagnose(model, vocab, dataset, questions, torch.device("cpu"))


def test_it_counts_what_is_right(made, model):
    dataset, vocab = load_split(made.parent, "test", "scenes_precomp")

    @torch.no_grad()
    def sim(image, text):
        words = torch.tensor([vocab.encode(text)])
        return model(dataset.image(image)[None], words, torch.tensor([words.shape[1]])).item()

    right, pictures = {kind: [] for kind in KINDS}, records(made, "test")
    for caption, text in enumerate(dataset.texts):
        image = caption // 5
        right["relation"].append(sim(image, text) > sim(pictures[image]["twin"], text))
    for foil in records(made, "test", "foils"):
        image, text = foil["caption"] // 5, dataset.texts[foil["caption"]]
        right[foil["kind"]].append(sim(image, text) > sim(image, foil["text"]))
    assert answers(made, "test", model) == {
        kind: {"questions": len(expected), "accuracy": 100 * sum(expected) / len(expected)}
        for kind, expected in right.items()
    }


def test_equal_scores_are_wrong_answers(made, model):
    blind = copy.deepcopy(model)
    torch.nn.init.zeros_(blind.similarity.score_fc.weight)
    assert {found["accuracy"] for found in answers(made, "dev", blind).values()} == {0}


def test_questions_fit_the_data_set(made, model, tmp_path):
    def ask(n_scenes, caption):
        scenes = [json.dumps({"twin": k ^ 1}) for k in range(n_scenes)]
        (tmp_path / "dev_scenes.jsonl").write_text("\n".join(scenes))
        foil = {"caption": caption, "kind": "size", "text": "a"}
        (tmp_path / "dev_foils.jsonl").write_text(json.dumps(foil))
        return answers(made, "dev", model, tmp_path)

    assert list(ask(4, 1)) == ["relation", "size"]  # kinds without questions are left out
    for wrong in ((5, 1), (4, 20)):
        with pytest.raises(InputError, match="not those of its dev"):
            ask(*wrong)
