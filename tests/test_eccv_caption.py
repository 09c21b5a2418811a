"""ECCV Caption: the package's own ground truth, and scores whose right answer is known."""

import copy
import importlib.metadata
import json
import sys
from types import SimpleNamespace

import eccv_caption  # the script: its folder comes first
import numpy as np
import pytest
from conftest import ROOT
from test_commands import refused, run

from metrics import retrieval_metrics

try:
    importlib.metadata.version("eccv_caption")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("the package eccv_caption is not installed", allow_module_level=True)

N_SMALL = 20  # images of the small benchmark


@pytest.fixture(scope="session")
def full():
    """The package's ground truth: 5,000 images, 25,000 captions."""
    return eccv_caption.ground_truth()


def in_package_order(metrics):
    captions = [int(id_) for id_ in metrics.coco_ids]
    return [metrics.coco_gts["t2i"][id_][0] for id_ in captions[::5]], captions


@pytest.fixture
def small(full):
    """The package and its ground truth, cut down to 20 images that share captions."""
    start = 373119
    owners = (full.coco_gts["t2i"].get(id_, [start])[0] for id_ in full.eccv_gts["i2t"][start])
    images = list(dict.fromkeys([start, *owners, *full.eccv_gts["i2t"]]))[:N_SMALL]
    captions = [id_ for image in images for id_ in sorted(full.coco_gts["i2t"][image])]
    metrics = copy.copy(full)
    for name in ("coco_gts", "cxc_gts", "eccv_gts"):
        setattr(metrics, name, {})
        for way, queries, items in (("i2t", images, captions), ("t2i", captions, images)):
            whole = getattr(full, name)[way]
            cut = {q: [id_ for id_ in whole.get(q, ()) if id_ in set(items)] for q in queries}
            getattr(metrics, name)[way] = {q: ids for q, ids in cut.items() if ids}
    metrics.coco_ids = np.array(captions)
    assert len(metrics.eccv_gts["i2t"][start]) > 5  # right answers that COCO does not know
    return metrics


def random_scores(seed=0, n_images=N_SMALL, levels=None):
    """Scores without ties, or with a few levels only; right ones tend to be high."""
    rng = np.random.default_rng(seed)
    n = 5 * n_images
    sims = rng.permutation(n_images * n).reshape(n_images, n) / (n_images * n)
    sims[np.arange(n) // 5, np.arange(n)] += 0.25
    if levels:
        sims = np.round(sims * levels)
    return sims.astype(np.float32)


def best_first(matches, items, value, shape):
    """Scores 0, and `value` for the right answers of each query, in the order of the queries."""
    sims = np.zeros(shape, np.float16)
    column = {id_: place for place, id_ in enumerate(items)}
    for row, ids in matches:
        sims[row, [column[id_] for id_ in ids if id_ in column]] = value
    return sims


# -- the package and the script have one name -----------------------------------------------------


def test_the_package_is_found_beside_a_script_of_its_name():
    assert eccv_caption.__file__ == str(ROOT / "scripts/eccv_caption.py")
    package = eccv_caption.package()
    assert "site-packages" in package.__file__ and hasattr(package, "Metrics")
    assert sys.modules["eccv_caption"] is eccv_caption
    assert eccv_caption.package() is package


def test_a_missing_package_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "eccv_caption_package", raising=False)
    monkeypatch.setattr(eccv_caption.PathFinder, "find_spec", lambda *_: None)
    assert "pip install -r requirements-extra.txt" in fails(monkeypatch, capsys, "sims.npy")


# -- known answers --------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "share"), [(1, 1), (-1, 0)])
@pytest.mark.parametrize("way", ["i2t", "t2i"])
def test_the_right_answers_first_or_last(full, way, value, share):
    """The package's whole ground truth, one direction at a time; its mAP@R, R-P and R@1.

    Two right captions are not among the 25,000: nothing can rank them.
    """
    images, captions = in_package_order(full)
    queries, items = (images, captions) if way == "i2t" else (captions, images)
    known, right = set(items), full.eccv_gts[way]
    rows = [(row, right[q]) for row, q in enumerate(queries) if q in right]
    sims = best_first(rows, items, value, (len(queries), len(items)))
    ranked = eccv_caption.rankings(sims, queries, items, right, "test")
    assert ranked.keys() == right.keys()
    found = full.eccv_metrics({way: ranked}, way)
    there = [len(set(ids) & known) / len(ids) for ids in right.values()]
    assert min(there) < 1 if way == "i2t" else min(there) == 1
    assert found["eccv_r1"][way] == share
    assert found["eccv_map_at_r"][way] == pytest.approx(share * np.mean(there))
    assert found["eccv_rprecision"][way] == pytest.approx(share * np.mean(there))
    assert round(100 * np.mean(there), 2) == (99.99 if way == "i2t" else 100)  # as the manual says


def test_a_case_by_hand(small):
    """Four right answers at places 1, 3, 4 and 6: AP@4 = (1 + 2/3 + 3/4) / 4, R-P = 3/4."""
    images, captions = in_package_order(small)
    right = [captions[7], captions[50], captions[51], captions[3]]
    small.eccv_gts = {
        "i2t": {images[0]: right},
        "t2i": {captions[9]: [images[2], images[8]]},  # at places 2 and 3: AP@2 = 1/4, R-P = 1/2
    }
    sims = np.zeros((N_SMALL, 5 * N_SMALL), np.float32)
    sims[0, [7, 20, 50, 51, 21, 3]] = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    sims[[4, 2, 8], 9] = [0.9, 0.8, 0.7]
    found = eccv_caption.evaluate(sims, images, captions, small)["eccv"]
    assert found["i2t"] == pytest.approx(
        {"map_at_r": 100 * (1 + 2 / 3 + 3 / 4) / 4, "rprecision": 75, "r1": 100}
    )
    assert found["t2i"] == pytest.approx({"map_at_r": 25, "rprecision": 50, "r1": 0})


def test_perfect_scores_are_perfect_in_every_benchmark_of_their_own(small):
    images, captions = in_package_order(small)
    for key, name in (("eccv", "eccv_gts"), ("cxc", "cxc_gts"), ("coco_5k", "coco_gts")):
        for way, queries, items in (("i2t", images, captions), ("t2i", captions, images)):
            right = getattr(small, name)[way]
            rows = [(row, right[q]) for row, q in enumerate(queries) if q in right]
            sims = best_first(rows, items, 1, (len(queries), len(items)))
            sims = sims if way == "i2t" else sims.T
            result = eccv_caption.evaluate(sims, images, captions, small)
            assert set(result[key][way].values()) == {100}, (key, way)
            result = eccv_caption.evaluate(-sims, images, captions, small)
            assert result[key][way]["r1"] == 0, (key, way)


# -- rankings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 700, 2**22])
def test_rankings_are_what_sorting_gives(small, monkeypatch, at_once):
    monkeypatch.setattr(eccv_caption, "AT_ONCE", at_once)
    images, captions = in_package_order(small)
    sims, right = random_scores(), small.eccv_gts
    ranked = eccv_caption.both_ways(sims, images, captions, right, "test")
    for way, scores, queries, items in (
        ("i2t", sims, images, captions), ("t2i", sims.T, captions, images),
    ):  # fmt: skip
        assert ranked[way].keys() == right[way].keys()
        for row, query in enumerate(queries):
            if query in right[way]:
                depth = max(10, len(right[way][query]))
                expected = [items[place] for place in np.argsort(-scores[row])[:depth]]
                assert ranked[way][query] == expected


@pytest.mark.parametrize("score", [0.3, -0.3, 0.0, 1e-45, 3e38])
def test_ties_count_against_the_model_and_no_more_than_ties(score):
    """Of equal scores the right one is last, but before what is lower by as little as can be."""
    score = np.float32(score)
    sims = np.full((1, 30), np.nextafter(score, np.float32(-np.inf)))
    sims[0, :12] = score
    ranked = eccv_caption.rankings(sims, [1], list(range(30)), {1: [0, 5, 25]}, "test")[1]
    assert set(ranked) <= set(range(12)) - {0, 5} and len(ranked) == 10
    right = {1: [0, 5, 25, *range(100, 110)]}  # R is 13
    ranked = eccv_caption.rankings(sims, [1], list(range(30)), right, "test")[1]
    assert set(ranked[10:12]) == {0, 5} and ranked[12] not in {*range(12), 25}


def test_a_collapsed_model_scores_nothing(small):
    images, captions = in_package_order(small)
    sims = np.full((N_SMALL, 5 * N_SMALL), 0.5, np.float32)
    result = eccv_caption.evaluate(sims, images, captions, small)
    # (Of the four images and 20 captions of a fold ten are most: only R@1 and R@5 say something.)
    for key in ("eccv", "cxc", "coco_5k", "coco_1k"):
        assert result[key]["i2t"]["r1"] == result[key]["t2i"]["r1"] == 0


@pytest.mark.parametrize("levels", [None, 3, 20])
def test_the_packages_coco_recalls_are_ours(small, levels, monkeypatch):
    monkeypatch.setattr(eccv_caption, "AT_ONCE", 700)
    images, captions = in_package_order(small)
    sims = random_scores(levels=levels)
    result = eccv_caption.evaluate(sims, images, captions, small)
    whole = retrieval_metrics(sims, np.arange(len(captions)) // 5)
    folds = [
        retrieval_metrics(sims[4 * k : 4 * k + 4, 20 * k : 20 * k + 20], np.arange(20) // 5)
        for k in range(5)
    ]
    for way in ("i2t", "t2i"):
        for name in ("r1", "r5", "r10"):
            mean = np.mean([fold[way][name] for fold in folds])
            assert result["coco_5k"][way][name] == pytest.approx(whole[way][name])
            assert result["ours"]["coco_5k"][way][name] == pytest.approx(whole[way][name])
            assert result["coco_1k"][way][name] == pytest.approx(mean)
            assert result["ours"]["coco_1k"][way][name] == pytest.approx(mean)
    assert 0 < whole["i2t"]["r1"] < 100


def test_the_order_of_images_and_captions_changes_nothing(small):
    images, captions = in_package_order(small)
    sims = random_scores(levels=20)
    rows = np.random.default_rng(1).permutation(N_SMALL)
    columns = (5 * rows[:, None] + [3, 0, 4, 1, 2]).ravel()
    shuffled = sims[np.ix_(rows, columns)]
    result = eccv_caption.evaluate(
        shuffled, [images[row] for row in rows], [captions[column] for column in columns], small
    )
    assert result == eccv_caption.evaluate(sims, images, captions, small)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_no_numbers_are_refused(small, value):
    sims = random_scores()
    sims[0, 99] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        eccv_caption.evaluate(sims, *in_package_order(small), small)


# -- the command line, on the small benchmark -----------------------------------------------------


def fails(monkeypatch, capsys, *arguments):
    """The one line in which a command ends that cannot do what it is asked for."""
    monkeypatch.setattr(sys, "argv", ["eccv_caption.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_status:
        eccv_caption.main()
    lines = capsys.readouterr().err.splitlines()
    assert exit_status.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def text_of(caption):
    return f"It's caption {caption}, a  Déjà-vu."


@pytest.fixture
def folder(small, tmp_path, monkeypatch):
    """A folder with scores and data of the small benchmark, as a user's would be."""
    package = SimpleNamespace(Metrics=lambda: small)
    monkeypatch.setattr(eccv_caption, "package", lambda: package)
    monkeypatch.chdir(tmp_path)
    images, captions = in_package_order(small)
    data = tmp_path / "data" / "coco_precomp"
    data.mkdir(parents=True)
    names = [f"COCO_val2014_{image:012d}.jpg" for image in images]
    (data / "testall_ids.txt").write_text("\n".join(names) + "\n")
    (data / "testall_caps.txt").write_text("".join(f"{text_of(id_)}\n" for id_ in captions))
    np.save("sims.npy", random_scores(levels=20))
    annotations = [
        {"image_id": image, "id": id_, "caption": text_of(id_)}
        for image in images for id_ in sorted(small.coco_gts["i2t"][image])
    ]  # fmt: skip
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": annotations}))
    karpathy = [
        {"cocoid": image, "sentences": [
            {"sentid": id_, "raw": text_of(id_) + "\n"} for id_ in small.coco_gts["i2t"][image]
        ]} for image in images
    ]  # fmt: skip
    (tmp_path / "dataset.json").write_text(json.dumps({"images": karpathy, "dataset": "coco"}))
    return tmp_path


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["eccv_caption.py", *map(str, arguments)])
    eccv_caption.main()
    return capsys.readouterr().out


def test_the_command_prints_and_writes_one_result(small, folder, monkeypatch, capsys):
    output = command(monkeypatch, capsys, "sims.npy", "--json", "eccv.json")
    written = json.loads((folder / "eccv.json").read_text())
    expected = eccv_caption.evaluate(np.load("sims.npy"), *in_package_order(small), small)
    assert {key: written[key] for key in expected} == expected
    assert "unchecked" in output and "unchecked" in written["caption_ids"]
    lines = {line[:16].strip(): line[16:].split() for line in output.splitlines()[2:]}
    eccv, coco = expected["eccv"], expected["coco_1k"]
    assert lines["ECCV mAP@R"] == [f"{eccv[way]['map_at_r']:.1f}" for way in ("i2t", "t2i")]
    assert lines["COCO 1K R@1"] == 2 * [f"{coco[way]['r1']:.1f}" for way in ("i2t", "t2i")]
    assert len(lines) == 12 and not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("source", ["captions.json", "dataset.json"])
@pytest.mark.parametrize("form", ["raw", "tokens"])
def test_captions_are_found_by_their_texts(small, folder, monkeypatch, capsys, source, form):
    """The images and the captions of each in another order than the package's."""
    command(monkeypatch, capsys, "sims.npy", "--json", "straight.json")
    images, captions = in_package_order(small)
    rows = np.random.default_rng(1).permutation(N_SMALL)
    columns = (5 * rows[:, None] + [3, 0, 4, 1, 2]).ravel()
    np.save("sims.npy", np.load("sims.npy")[np.ix_(rows, columns)])
    texts = [text_of(captions[column]) for column in columns]
    if form == "tokens":
        texts = ["".join(c for c in text.lower() if c.isalnum() or c == " ") for text in texts]
    data = folder / "data/coco_precomp"
    (data / "testall_caps.txt").write_text("\n".join(texts) + "\n")
    ids = "".join(f"{images[row]}\n" * 5 for row in rows)  # once a caption: older files
    (folder / "ids.txt").write_text(ids)
    arguments = ("sims.npy", "--ids", "ids.txt")
    command(monkeypatch, capsys, *arguments, "--annotations", source, "--json", "found.json")
    (folder / "own.txt").write_text("".join(f"{captions[column]}\n" for column in columns))
    command(monkeypatch, capsys, *arguments, "--caption_ids", "own.txt", "--json", "given.json")
    straight, found, given = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("straight", "found", "given")
    )
    for result in (straight, found, given):
        del result["caption_ids"]
    assert straight == found == given


def test_the_same_text_wins_over_one_that_differs_in_punctuation(small, tmp_path):
    image = in_package_order(small)[0][0]
    known = small.coco_gts["i2t"]
    texts = dict(zip(known[image], ["A dog.", "a dog", "one", "two", "two"], strict=True))
    annotations = [{"image_id": image, "id": id_, "caption": x} for id_, x in texts.items()]
    sixth = {"image_id": image, "id": 1, "caption": "a dog"}  # COCO has more than five of some
    (tmp_path / "a.json").write_text(json.dumps({"annotations": [sixth, *annotations]}))
    (tmp_path / "caps.txt").write_text("a dog\nTWO\nA dog .\ntwo\none\n")
    paths = (tmp_path / "caps.txt", tmp_path / "a.json")
    found = eccv_caption.match_texts(*paths, [image], known)
    a, b, c, d, e = known[image]
    assert found == [b, e, a, d, c]


def test_plausible_matches(small, folder, monkeypatch, capsys):
    """Half of the right answers in front of all others: R-Precision 50."""
    images, captions = in_package_order(small)
    (folder / "pm").mkdir()
    matches = {
        "pm_image_to_caption": dict.fromkeys(images, captions[:30]),
        "pm_caption_to_image": dict.fromkeys(captions, images[:4]),
    }
    for name, content in matches.items():
        (folder / f"pm/{name}.json").write_text(json.dumps(content))
    sims = np.zeros((N_SMALL, 5 * N_SMALL), np.float32)
    sims[:, :15], sims[:, 40:60] = 2, 1
    np.save("sims.npy", sims)
    output = command(monkeypatch, capsys, "sims.npy", "--pm", "pm", "--json", "eccv.json")
    found = json.loads((folder / "eccv.json").read_text())["pm"]
    assert found["i2t"]["rprecision"] == pytest.approx(50)
    assert found["t2i"]["rprecision"] == 0  # all images score the same: the wrong come first
    assert "PM R-P" in output
    (folder / "pm/pm_caption_to_image.json").write_text("{")
    assert "pm: not the package's" in fails(monkeypatch, capsys, "sims.npy", "--pm", "pm")
    (folder / "pm/pm_caption_to_image.json").write_text('{"7": [1]}')
    error = fails(monkeypatch, capsys, "sims.npy", "--pm", "pm")
    assert "pm_caption_to_image.json" in error
    error = fails(monkeypatch, capsys, "sims.npy", "--pm", "elsewhere")
    assert "elsewhere: pm_image_to_caption.json and" in error and "github.com" in error


def broken(folder, how):
    """One of the files made unusable; the command's arguments, and what it should say."""
    data = folder / "data/coco_precomp"
    ids, caps = data / "testall_ids.txt", data / "testall_caps.txt"
    names, texts = ids.read_text().splitlines(), caps.read_text().splitlines()
    annotated = ("--annotations", "captions.json")
    if how == "no scores":
        return ("nowhere.npy",), ["nowhere.npy"]
    if how == "scores that are text":
        (folder / "sims.npy").write_text("hello")
        return (), ["sims.npy", "not a readable .npy"]
    if how == "truncated scores":
        (folder / "sims.npy").write_bytes((folder / "sims.npy").read_bytes()[:-4])
        return (), ["sims.npy", "not a readable .npy"]
    if how == "an archive":
        with (folder / "sims.npy").open("wb") as file:
            np.savez(file, a=np.zeros(3))
        return (), ["sims.npy", "archive"]
    if how == "scores of objects":
        np.save(folder / "sims.npy", np.array([[{}]]), allow_pickle=True)
        return (), ["sims.npy", "not a readable .npy"]
    if how == "scores of another split":
        np.save(folder / "sims.npy", np.zeros((10, 50), np.float32))
        return (), ["sims.npy", "(10, 50)", "20 images × 100 captions", "--split testall"]
    if how == "whole numbers":
        np.save(folder / "sims.npy", np.zeros((20, 100), int))
        return (), ["sims.npy", "int64", "float32"]
    if how == "NaN":
        np.save(folder / "sims.npy", np.full((20, 100), np.nan, np.float32))
        return (), ["sims.npy", "NaN"]
    if how == "no ids":
        ids.unlink()
        return (), ["testall_ids.txt", "--ids", "prepare_captions.py"]
    if how == "numbers for ids":
        ids.write_text("".join(f"{i}\n" for i in range(20)))
        return (), ["testall_ids.txt", "20 of them others (0, 1, 2 and 17 more)"]
    if how == "too few ids":
        ids.write_text("\n".join(names[:-1]))
        return (), ["testall_ids.txt", "19 ids;", "20 images"]
    if how == "an id twice":
        ids.write_text("\n".join([*names[:-1], names[0]]))
        return (), ["testall_ids.txt", "more than once"]
    if how == "ids not UTF-8":
        ids.write_bytes(b"\xff\n")
        return (), ["testall_ids.txt", "not UTF-8"]
    if how == "a caption of no image":
        caps.write_text("\n".join([*texts[:7], "a dog", *texts[8:]]))
        return annotated, ["testall_caps.txt, line 8", "'a dog'", "captions.json"]
    if how == "captions in another order than the ids":
        caps.write_text("\n".join([*texts[5:], *texts[:5]]))
        return annotated, ["testall_caps.txt, line 1", "order"]
    if how == "too few captions":
        caps.write_text("\n".join(texts[:-1]))
        return annotated, ["testall_caps.txt", "99 captions"]
    if how == "no captions":
        caps.unlink()
        return annotated, ["testall_caps.txt"]
    if how == "no annotations":
        return ("--annotations", "nowhere.json"), ["nowhere.json"]
    for name, content in {
        "annotations that are no JSON": "{",
        "a list": "[]",
        "other JSON": '{"info": 1}',
        "annotations without ids": '{"annotations": [{"image_id": 1, "caption": "a"}]}',
        "ids that are text": '{"annotations": [{"image_id": 1, "id": "2", "caption": "a"}]}',
        "texts that are none": '{"annotations": [{"image_id": 1, "id": 2, "caption": null}]}',
        "images without sentences": '{"images": [{"cocoid": 1, "sentences": null}]}',
    }.items():
        if how == name:
            (folder / "captions.json").write_text(content)
            return annotated, ["captions.json"]
    given = folder / "given.txt"
    own = [text.split()[2].rstrip(",") for text in texts]
    if how == "caption ids of another image":
        given.write_text("\n".join([*own[:4], own[6], *own[5:]]))
    if how == "a caption id twice":
        given.write_text("\n".join([*own[:4], own[0], *own[5:]]))
    if how == "too few caption ids":
        given.write_text("\n".join(own[:-1]))
        return ("--caption_ids", given), ["given.txt", "99 lines"]
    return ("--caption_ids", given), ["given.txt, line 5", "or stands there twice"]


BROKEN = (
    "no scores", "scores that are text", "truncated scores", "an archive", "scores of objects",
    "scores of another split", "whole numbers", "NaN", "no ids", "numbers for ids", "too few ids",
    "an id twice", "ids not UTF-8", "a caption of no image",
    "captions in another order than the ids", "too few captions", "no captions", "no annotations",
    "annotations that are no JSON", "a list", "other JSON", "annotations without ids",
    "ids that are text", "texts that are none", "images without sentences",
    "caption ids of another image", "a caption id twice", "too few caption ids",
)  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_bad_input_ends_in_one_line_and_writes_nothing(folder, monkeypatch, capsys, how):
    arguments, words = broken(folder, how)
    (folder / "eccv.json").write_text("earlier numbers")
    before = sorted(folder.rglob("*"))
    scores = () if how == "no scores" else ("sims.npy",)
    error = fails(monkeypatch, capsys, *scores, *arguments, "--json", "eccv.json")
    for word in words:
        assert word in error, error
    assert (folder / "eccv.json").read_text() == "earlier numbers"
    assert sorted(folder.rglob("*")) == before


# -- the command line, with the whole of COCO's test split ----------------------------------------


@pytest.mark.slow
def test_the_whole_benchmark_from_a_shell(full, tmp_path):
    """Half of the images find all of their captions and are found by them, the others nothing."""
    images, _ = in_package_order(full)
    images = images[::-1]
    sims = np.lib.format.open_memmap(tmp_path / "s.npy", "w+", np.float16, (5000, 25000))  # sparse
    captions = np.arange(25000)
    right = captions // 5 % 2 == 0
    sims[captions[right] // 5, captions[right]] = 1
    sims.flush()
    (tmp_path / "ids.txt").write_text("".join(f"{image}\n" for image in images))
    result = run(
        tmp_path, "scripts/eccv_caption.py", "s.npy", "--ids", "ids.txt", "--json", "eccv.json"
    )
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "eccv.json").read_text())
    half = dict.fromkeys(("r1", "r5", "r10"), 50)
    for recalls in (found, found["ours"]):
        for key in ("coco_5k", "coco_1k"):
            assert recalls[key] == {"i2t": half, "t2i": half}
    first = [
        set(full.coco_gts["i2t"][image]) <= set(full.eccv_gts["i2t"][image])
        for image in images[::2] if image in full.eccv_gts["i2t"]
    ]  # fmt: skip
    # Of five captions that score the same, one that people did not find right comes first.
    assert 0 < len(first) - sum(first) < 20
    share = 100 * sum(first) / len(full.eccv_gts["i2t"])
    assert found["eccv"]["i2t"]["r1"] == pytest.approx(share)


def test_a_mistake_from_a_shell(tmp_path):
    np.save(tmp_path / "s.npy", np.zeros((3, 15), np.float32))
    refused(run(tmp_path, "scripts/eccv_caption.py", "s.npy"), "s.npy", "(3, 15)", "5,000 images")
    assert [path.name for path in tmp_path.iterdir()] == ["s.npy"]
