"""ECCV Caption and CxC: the package's own right answers, and scores whose metrics are known."""

import copy
import json
import sys
from pathlib import Path

import eval_eccv
import numpy as np
import pytest
from conftest import call, refuses, succeeded

from metrics import retrieval_metrics
from utils import InputError

pytest.importorskip("eccv_caption")
N = 20  # images of the small benchmark
IMAGES, CAPTIONS = [*range(700, 700 + N)], [*range(1000, 1000 + 5 * N)]
COMMAND = (".", eval_eccv.main, "sims.npy", "--data_path", ".", "--data_name", ".")


@pytest.fixture(scope="session")
def full():
    return eval_eccv.load_benchmarks()


@pytest.fixture
def small(full):
    """The package with the right answers of 20 images; every other one shares a caption."""
    metrics = copy.copy(full)
    coco = {"i2t": {image: CAPTIONS[5 * k :][:5] for k, image in enumerate(IMAGES)},
            "t2i": {caption: [IMAGES[k // 5]] for k, caption in enumerate(CAPTIONS)}}  # fmt: skip
    more = copy.deepcopy(coco)
    for image, caption in zip(IMAGES[::2], CAPTIONS[5::10], strict=True):
        more["i2t"][image].append(caption)
        more["t2i"][caption].append(image)
    metrics.coco_gts, metrics.cxc_gts, metrics.eccv_gts = coco, more, more
    return metrics


def random_scores(levels):
    """Scores of a few levels, so with ties; right ones tend to be high."""
    scores = np.random.default_rng(0).random((N, 5 * N))
    scores[np.arange(5 * N) // 5, np.arange(5 * N)] += 0.25
    return np.round(scores * levels).astype(np.float32)


def test_a_case_by_hand(small):
    """Four right answers at places 1, 3, 4 and 6: AP@4 = (1 + 2/3 + 3/4) / 4, R-P = 3/4."""
    small.eccv_gts = {
        "i2t": {IMAGES[0]: [CAPTIONS[k] for k in (7, 50, 51, 3)]},
        "t2i": {CAPTIONS[9]: [IMAGES[2], IMAGES[8]]},  # at places 2 and 3: AP@2 = 1/4, R-P = 1/2
    }
    sims = np.zeros((N, 5 * N), np.float32)
    sims[0, [7, 20, 50, 51, 21, 3]] = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    sims[[4, 2, 8], 9] = [0.9, 0.8, 0.7]
    found = eval_eccv.evaluate(sims, IMAGES, CAPTIONS, small)
    average = 100 * (1 + 2 / 3 + 3 / 4) / 4
    assert found["eccv_map_at_r"] == pytest.approx({"i2t": average, "t2i": 25})
    assert found["eccv_rprecision"] == pytest.approx({"i2t": 75, "t2i": 50})
    assert found["eccv_r1"] == {"i2t": 100, "t2i": 0}


@pytest.mark.parametrize("levels", [2, 20, 1e6])
def test_coco_recalls_of_the_package_are_those_of_metrics_py(small, levels):
    """With COCO's own right answers for CxC's: ties count against the model in both."""
    small.cxc_gts, sims = small.coco_gts, random_scores(levels)
    found = eval_eccv.evaluate(sims, IMAGES, CAPTIONS, small)
    expected = retrieval_metrics(sims, np.arange(5 * N) // 5)
    for k in ("r1", "r5", "r10"):
        assert found[f"cxc_{k}"] == pytest.approx({way: expected[way][k] for way in ("i2t", "t2i")})


@pytest.mark.parametrize("score", [0.3, -0.3, 0.0, 1e-45, 3e38])
def test_ties_count_against_the_model_and_no_more_than_ties(score):
    """Of equal scores the right one is last, but before what is lower by as little as can be."""
    score = np.float32(score)
    sims = np.full((1, 30), np.nextafter(score, np.float32(-np.inf)))
    sims[0, :12] = score
    right = {1: [0, 5, 25, *range(100, 110)]}  # 13 right ones, so 13 are ranked
    ranked = eval_eccv.rank(sims, [1], list(range(30)), right)[1]
    assert {*ranked[:10]} == {*range(12)} - {0, 5}
    assert {*ranked[10:12]} == {0, 5} and ranked[12] not in {*range(12), 25}


def text_of(caption):
    return f"It's caption {caption}, a  Déjà-vu."


def tokens_of(caption):
    return text_of(caption).lower().replace("'", " '").replace(",", "").replace(".", " .")


def write_data(sims, images, captions, text=text_of):
    np.save("sims.npy", sims)
    Path("testall_ids.txt").write_text("".join(f"COCO_val2014_{i:012d}.jpg\n" for i in images))
    Path("testall_caps.txt").write_text("".join(f"{text(id_)}\n" for id_ in captions))


@pytest.fixture
def folder(small, tmp_path, monkeypatch):
    """Scores, a data set of the small benchmark, and its annotations in both formats."""
    monkeypatch.setattr(eval_eccv, "load_benchmarks", lambda: small)
    monkeypatch.chdir(tmp_path)
    write_data(random_scores(20), IMAGES, CAPTIONS)
    coco = [{"id": id_, "caption": text_of(id_)} for id_ in reversed(CAPTIONS)]
    Path("coco.json").write_text(json.dumps({"annotations": coco}))
    karpathy = [{"sentences": [{"sentid": id_, "raw": text_of(id_)}]} for id_ in CAPTIONS]
    Path("karpathy.json").write_text(json.dumps({"images": karpathy}))


@pytest.mark.parametrize("annotations", ["coco.json", "karpathy.json"])
def test_captions_are_found_by_their_texts(small, folder, annotations):
    """In any order of images and of an image's captions, raw or as tokens."""
    expected = eval_eccv.evaluate(random_scores(20), IMAGES, CAPTIONS, small)
    table = succeeded(call(*COMMAND, "--annotations", annotations, "--json", "straight.json"))
    assert json.loads(Path("straight.json").read_text()) == expected
    shares = [f"{share:.1f}" for share in expected["eccv_map_at_r"].values()]
    assert table.splitlines()[1].split() == ["eccv_map_at_r", *shares]
    rows = np.random.default_rng(1).permutation(N)
    columns = (5 * rows[:, None] + [3, 0, 4, 1, 2]).ravel()
    sims = random_scores(20)[np.ix_(rows, columns)]
    write_data(sims, rows + IMAGES[0], columns + CAPTIONS[0], tokens_of)
    succeeded(call(*COMMAND, "--annotations", annotations, "--json", "shuffled.json"))
    assert json.loads(Path("shuffled.json").read_text()) == expected


def test_twins_are_told_apart(tmp_path):
    """Two captions of an image with one text get one id each."""
    texts = {0: "A dog.", 1: "a dog", 2: "one", 3: "two", 4: "three"}
    caps = tmp_path / "caps.txt"
    caps.write_text("TWO\na dog\nA dog .\none\nthree\n")
    assert eval_eccv.match_captions(caps, texts, [7], {7: [0, 1, 2, 3, 4]}) == [3, 0, 1, 2, 4]


@pytest.mark.parametrize("name, content, words", [
    ("sims.npy", None, []),
    ("sims.npy", np.zeros((10, 50)), ["(10, 50), expected (20, 100)"]),
    ("testall_ids.txt", b"0\n701\n", ["has 1 of the 20 images"]),
    ("testall_caps.txt", b"a\n" * 100, ["line 1: 'a'", "of image 700"]),
    ("testall_caps.txt", b"a\n", ["1 captions of 20 images"]),
    ("coco.json", b"{", ["not COCO's or Karpathy's captions: JSONDecodeError"]),
    ("coco.json", b'{"info": 1}', ["KeyError: 'images'"]),
])  # fmt: skip
def test_bad_input_ends_in_one_line_and_writes_nothing(folder, name, content, words):
    Path(name).unlink()
    if isinstance(content, np.ndarray):
        np.save(name, content)
    elif content is not None:
        Path(name).write_bytes(content)
    refuses(*COMMAND, "--annotations", "coco.json", "--json", "eccv.json", words=[name, *words])


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "eccv_caption", None)
    with pytest.raises(InputError, match="pip install -r requirements-extra.txt"):
        eval_eccv.load_benchmarks()
