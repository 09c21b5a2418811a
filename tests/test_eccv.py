"""ECCV Caption and CxC: the package's own right answers, and scores whose metrics are known."""

import copy
import json
import sys
from pathlib import Path

import eval_eccv
import numpy as np
import pytest
from conftest import call, refused, succeeded

from metrics import retrieval_metrics
from utils import InputError

pytest.importorskip("eccv_caption")
N = 20  # images of the small benchmark


@pytest.fixture(scope="session")
def full():
    """The package's right answers for 5,000 images and 25,000 captions."""
    return eval_eccv.load_benchmarks()


@pytest.fixture
def small(full):
    """The package with the right answers of 20 images that share captions."""
    start = 373119
    owners = (full.coco_gts["t2i"].get(id_, [start])[0] for id_ in full.eccv_gts["i2t"][start])
    images = list(dict.fromkeys([start, *owners, *full.eccv_gts["i2t"]]))[:N]
    captions = [id_ for image in images for id_ in full.coco_gts["i2t"][image]]
    metrics, there = copy.copy(full), {*images, *captions}
    for name in ("coco_gts", "cxc_gts", "eccv_gts"):
        setattr(metrics, name, {})
        for way, queries in (("i2t", images), ("t2i", captions)):
            whole = getattr(full, name)[way]
            cut = {q: [id_ for id_ in whole.get(q, ()) if id_ in there] for q in queries}
            getattr(metrics, name)[way] = {q: ids for q, ids in cut.items() if ids}
    assert len(metrics.eccv_gts["i2t"][start]) > 5  # right answers that COCO does not know
    return metrics


def ids_of(metrics):
    """Images, and their captions end to end."""
    known = metrics.coco_gts["i2t"]
    return list(known), [id_ for ids in known.values() for id_ in ids]


def random_scores(levels):
    """Scores of a few levels, so with ties; right ones tend to be high."""
    scores = np.random.default_rng(0).random((N, 5 * N))
    scores[np.arange(5 * N) // 5, np.arange(5 * N)] += 0.25
    return np.round(scores * levels).astype(np.float32)


# -- metrics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1, -1])
@pytest.mark.parametrize("way", ["i2t", "t2i"])
def test_the_right_answers_first_or_last(full, way, value):
    """Two right captions of ECCV Caption are not among the 25,000: nothing can rank them."""
    images, captions = ids_of(full)
    queries, items = (images, captions) if way == "i2t" else (captions, images)
    column, right = {id_: k for k, id_ in enumerate(items)}, full.eccv_gts[way]
    queries = [query for query in queries if query in right]
    sims = np.zeros((len(queries), len(items)), np.float16)
    for row, query in enumerate(queries):
        sims[row, [column[id_] for id_ in right[query] if id_ in column]] = value
    ranked = eval_eccv.rank(sims, queries, items, right)
    found = full.eccv_metrics({way: ranked}, way)
    best = np.mean([len(set(ids) & column.keys()) / len(ids) for ids in right.values()])
    assert round(100 * best, 2) == (99.99 if way == "i2t" else 100)  # as the docstring says
    expected = (1, best, best) if value > 0 else (0, 0, 0)
    for name, share in zip(("r1", "map_at_r", "rprecision"), expected, strict=True):
        assert found[f"eccv_{name}"][way] == pytest.approx(share)


def test_a_case_by_hand(small):
    """Four right answers at places 1, 3, 4 and 6: AP@4 = (1 + 2/3 + 3/4) / 4, R-P = 3/4."""
    images, captions = ids_of(small)
    small.eccv_gts = {
        "i2t": {images[0]: [captions[k] for k in (7, 50, 51, 3)]},
        "t2i": {captions[9]: [images[2], images[8]]},  # at places 2 and 3: AP@2 = 1/4, R-P = 1/2
    }
    sims = np.zeros((N, 5 * N), np.float32)
    sims[0, [7, 20, 50, 51, 21, 3]] = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    sims[[4, 2, 8], 9] = [0.9, 0.8, 0.7]
    found = eval_eccv.evaluate(sims, images, captions, small)
    average = 100 * (1 + 2 / 3 + 3 / 4) / 4
    assert found["eccv_map_at_r"] == pytest.approx({"i2t": average, "t2i": 25})
    assert found["eccv_rprecision"] == pytest.approx({"i2t": 75, "t2i": 50})
    assert found["eccv_r1"] == {"i2t": 100, "t2i": 0}


@pytest.mark.parametrize("levels", [2, 20, 1e6])
def test_coco_recalls_of_the_package_are_those_of_metrics_py(small, levels):
    """With COCO's own right answers for CxC's: ties count against the model in both."""
    small.cxc_gts = small.coco_gts
    sims = random_scores(levels)
    found = eval_eccv.evaluate(sims, *ids_of(small), small)
    expected = retrieval_metrics(sims, np.arange(5 * N) // 5)
    for k in ("r1", "r5", "r10"):
        assert found[f"cxc_{k}"] == pytest.approx({way: expected[way][k] for way in ("i2t", "t2i")})


@pytest.mark.parametrize("score", [0.3, -0.3, 0.0, 1e-45, 3e38])
def test_ties_count_against_the_model_and_no_more_than_ties(score):
    """Of equal scores the right one is last, but before what is lower by as little as can be."""
    score = np.float32(score)
    sims = np.full((1, 30), np.nextafter(score, np.float32(-np.inf)))
    sims[0, :12] = score
    ranked = eval_eccv.rank(sims, [1], list(range(30)), {1: [0, 5, 25]})[1]
    assert set(ranked) <= set(range(12)) - {0, 5} and len(ranked) == 10
    right = {1: [0, 5, 25, *range(100, 110)]}  # 13 right ones, so 13 are ranked
    ranked = eval_eccv.rank(sims, [1], list(range(30)), right)[1]
    assert set(ranked[10:12]) == {0, 5} and ranked[12] not in {*range(12), 25}


def test_a_collapsed_model_scores_nothing(small):
    found = eval_eccv.evaluate(np.full((N, 5 * N), 0.5, np.float32), *ids_of(small), small)
    assert found["eccv_r1"] == found["cxc_r1"] == {"i2t": 0, "t2i": 0}


# -- the command, on the small benchmark ----------------------------------------------------------


def text_of(caption):
    return f"It's caption {caption}, a  Déjà-vu."


def write_data(images, captions, text=text_of):
    """A data set with the images and captions in this order."""
    names = "".join(f"COCO_val2014_{image:012d}.jpg\n" for image in images)
    Path("testall_ids.txt").write_text(names)
    Path("testall_caps.txt").write_text("".join(f"{text(id_)}\n" for id_ in captions))


@pytest.fixture
def folder(small, tmp_path, monkeypatch):
    """Scores, a data set of the small benchmark, and its annotations in both formats."""
    monkeypatch.setattr(eval_eccv, "load_benchmarks", lambda: small)
    monkeypatch.chdir(tmp_path)
    np.save("sims.npy", random_scores(20))
    write_data(*ids_of(small))
    captions = ids_of(small)[1]
    coco = [{"id": id_, "caption": text_of(id_)} for id_ in reversed(captions)]
    Path("coco.json").write_text(json.dumps({"annotations": coco}))
    karpathy = [{"sentences": [{"sentid": id_, "raw": text_of(id_)}]} for id_ in captions]
    Path("karpathy.json").write_text(json.dumps({"images": karpathy}))


def run(*arguments):
    return call(".", eval_eccv.main, "sims.npy", "--data_path", ".", "--data_name", ".", *arguments)


@pytest.mark.parametrize("annotations", ["coco.json", "karpathy.json"])
def test_captions_are_found_by_their_texts(small, folder, annotations):
    """In any order of images and of an image's captions, raw or as tokens."""
    images, captions = ids_of(small)
    expected = eval_eccv.evaluate(random_scores(20), images, captions, small)
    table = succeeded(run("--annotations", annotations, "--json", "straight.json"))
    assert json.loads(Path("straight.json").read_text()) == expected
    shares = [f"{share:.1f}" for share in expected["eccv_map_at_r"].values()]
    assert table.splitlines()[1].split() == ["eccv_map_at_r", *shares]

    rows = np.random.default_rng(1).permutation(N)
    columns = (5 * rows[:, None] + [3, 0, 4, 1, 2]).ravel()
    np.save("sims.npy", random_scores(20)[np.ix_(rows, columns)])
    write_data(
        [images[row] for row in rows],
        [captions[column] for column in columns],
        lambda id_: text_of(id_).lower().replace("'", " '").replace(",", "").replace(".", " ."),
    )
    succeeded(run("--annotations", annotations, "--json", "shuffled.json"))
    assert json.loads(Path("shuffled.json").read_text()) == expected


def test_twins_are_told_apart(small, tmp_path):
    """Two captions of an image with one text get one id each."""
    image, ids = next(iter(small.coco_gts["i2t"].items()))
    texts = dict(zip(ids, ["A dog.", "a dog", "one", "two", "three"], strict=True))
    caps = tmp_path / "caps.txt"
    caps.write_text("TWO\na dog\nA dog .\none\nthree\n")
    found = eval_eccv.match_captions(caps, texts, [image], small.coco_gts["i2t"])
    assert found == [ids[3], ids[0], ids[1], ids[2], ids[4]]


def replaced(name, old, new):
    text = Path(name).read_text()
    assert old in text
    Path(name).write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda: Path("sims.npy").unlink(), ["sims.npy"]),
        (lambda: np.save("sims.npy", np.zeros((10, 50))), ["(10, 50), expected (20, 100)"]),
        (lambda: np.save("sims.npy", np.full((20, 100), np.nan)), ["sims.npy: NaN"]),
        (lambda: Path("testall_ids.txt").unlink(), ["testall_ids.txt"]),
        (lambda: Path("testall_ids.txt").write_text("0\n1\n"), ["2 images, 2 of them", "(0, 1)"]),
        (lambda: replaced("testall_caps.txt", "Déjà", "deja"), ["caps.txt, line 1: \"It's capt"]),
        (lambda: Path("testall_caps.txt").write_text("a\n"), ["1 captions of 20 images"]),
        (lambda: Path("coco.json").unlink(), ["coco.json"]),
        (lambda: Path("coco.json").write_text("{"), ["coco.json: not as in", "JSONDecodeError"]),
        (lambda: Path("coco.json").write_text('{"info": 1}'), ["KeyError('images')"]),
        (lambda: replaced("coco.json", '"id"', '"image"'), ["coco.json", "KeyError('id')"]),
    ],
)
def test_bad_input_ends_in_one_line_and_writes_nothing(folder, damage, words):
    damage()
    before = sorted(Path().iterdir())
    refused(run("--annotations", "coco.json", "--json", "eccv.json"), *words)
    assert sorted(Path().iterdir()) == before


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "eccv_caption", None)
    with pytest.raises(InputError, match="pip install -r requirements-extra.txt"):
        eval_eccv.load_benchmarks()
