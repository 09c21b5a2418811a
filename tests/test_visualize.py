"""Figures and the report: right answers are framed, attention is where it is."""

import json
import re

import numpy as np
import pytest
import visualize
from conftest import write_split
from PIL import Image
from test_commands import SMALL, refused, run

from data import read_boxes
from errors import InputError
from evaluation import evalrank

CAPTIONS = [f"caption {i}" for i in range(20)]
SIMS = np.random.default_rng(0).random((4, 20)).astype(np.float32)


def framed(fig):
    """(row, column) places of framed pictures."""
    return [
        ax for ax in fig.axes
        if ax.spines["top"].get_edgecolor()[:3] == pytest.approx((0.102, 0.541, 0.373), abs=0.01)
        and ax.spines["top"].get_linewidth() == 4
    ]  # fmt: skip


def test_each_query_frames_its_own_picture():
    """All four pictures are shown to each caption, so that the right one is among them."""
    fig = visualize.retrieval_figure(SIMS, CAPTIONS, list("abcd"), None, n_queries=3, top=4)
    assert len(framed(fig)) == 3
    texts = [text.get_text() for ax in fig.axes for text in ax.texts]
    assert any(text.startswith("✓ ") for text in texts)


def test_queries_of_all_ranks_are_shown():
    ranks = np.array([5, 0, 3, 9, 1])
    assert ranks[visualize.spread(ranks, 3)].tolist() == [0, 3, 9]


@pytest.mark.parametrize("suffix", ["png", "pdf"])
def test_the_command_writes_a_figure(tmp_path, suffix):
    write_split(tmp_path / "data" / "tiny", "test", 4)
    np.save(tmp_path / "sims.npy", SIMS)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (9, 9), "red").save(tmp_path / "pictures" / "test0", "PNG")
    result = run(
        tmp_path, "scripts/visualize.py", "retrieval", "--sims", "sims.npy", "--data_name", "tiny",
        "--pictures", "pictures", "--out", f"out.{suffix}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / f"out.{suffix}").stat().st_size > 5000


def test_scores_that_do_not_fit_are_refused(tmp_path):
    write_split(tmp_path / "data" / "tiny", "test", 4)
    np.save(tmp_path / "sims.npy", SIMS[:, :10])
    arguments = ("scripts/visualize.py", "retrieval", "--data_name", "tiny", "--sims")
    refused(run(tmp_path, *arguments, "sims.npy"), "sims.npy", "(4, 10)")
    refused(run(tmp_path, *arguments, "none.npy"), "none.npy")


# -- attention, curves, report --------------------------------------------------------------------


@pytest.fixture(scope="module")
def looked_at(tmp_path_factory):
    """A trained tiny model, its split with boxes and pictures, and its log."""
    folder = tmp_path_factory.mktemp("looked_at")
    for split, n_images in (("train", 30), ("dev", 10), ("test", 10)):
        write_split(folder / "data" / "tiny", split, n_images)
    result = run(folder, "train.py", *SMALL, "--log_step", 3)
    assert result.returncode == 0, result.stderr
    boxes = np.tile([[0, 0, 0.5, 0.34], [0.5, 0, 1, 0.34]], (3, 1)).astype(np.float32)
    boxes[:, [1, 3]] += np.repeat([0, 0.33, 0.66], 2)[:, None].astype(np.float32)
    np.save(folder / "data/tiny/test_boxes.npy", np.repeat(boxes[None].clip(0, 1), 10, axis=0))
    (folder / "pictures").mkdir()
    for k in range(10):
        Image.new("RGB", (40, 30), (20 * k, 90, 90)).save(folder / "pictures" / f"test{k}.png")
    return folder


MODEL = ("--model_path", "runs/LHSC/checkpoint/model_best.pth.tar")


@pytest.mark.parametrize("suffix", ["png", "pdf"])
@pytest.mark.parametrize("pictures", [(), ("--pictures", "pictures")])
def test_attention_is_drawn_with_and_without_pictures(looked_at, monkeypatch, suffix, pictures):
    monkeypatch.chdir(looked_at)
    draw("attention", *MODEL, *pictures, "--image", "test3", "--out", f"a.{suffix}")
    assert (looked_at / f"a.{suffix}").stat().st_size > 8000


def draw(*arguments):
    """The command in this process; returns what it drew or wrote."""
    opt = visualize.options().parse_args(list(map(str, arguments)))
    made = opt.work(opt)
    if isinstance(made, str):
        opt.out.write_text(made, encoding="utf-8")
    else:
        made.savefig(opt.out)
        visualize.plt.close(made)
    return made


def test_every_word_has_its_own_picture_and_bar(looked_at, monkeypatch):
    monkeypatch.chdir(looked_at)
    sentence = "a red dog near one zeppelin"
    fig = draw("attention", *MODEL, "--image", 2, "--caption", sentence, "--pictures", "pictures")
    titles = " ".join(ax.get_title() for ax in fig.axes)
    assert all(f"{word} · " in titles for word in sentence.split())
    labels = [label.get_text() for ax in fig.axes for label in ax.get_xticklabels()]
    assert {"red", "zeppelin*", "whole"} <= set(labels)


def test_without_boxes_attention_is_a_table(looked_at, monkeypatch):
    monkeypatch.chdir(looked_at)
    boxes = looked_at / "data/tiny/test_boxes.npy"
    moved = boxes.rename(boxes.with_name("elsewhere.npy"))
    fig = draw("attention", *MODEL)
    moved.rename(boxes)
    assert fig.axes[0].get_yticklabels()[0].get_text() == "<start>"
    assert fig.axes[0].images[0].get_array().shape[1] == 6


def test_heat_is_where_the_weight_is():
    boxes = np.array([[0, 0, 0.5, 1], [0.5, 0, 1, 1]])
    heat = visualize.heat_map(np.array([0.2, 0.8]), boxes, side=10)
    assert heat[:, :5] == pytest.approx(0.25) and heat[:, 5:] == pytest.approx(1)
    # Overlapping windows of one size: the mean; detected objects of many sizes: the sum.
    windows = np.array([[0, 0, 0.6, 1], [0.4, 0, 1, 1]])
    assert np.ptp(visualize.heat_map(np.array([0.5, 0.5]), windows, side=10)) < 1e-9
    objects = np.array([[0, 0, 1, 1], [0.4, 0.4, 0.6, 0.6]])
    heat = visualize.heat_map(np.array([0.5, 0.5]), objects, side=10)
    assert heat[5, 5] == 1 and heat[0, 0] == pytest.approx(0.5)


def test_boxes_in_pixels_and_as_shares_are_the_same():
    shares = np.array([[0, 0, 0.5, 1], [0.25, 0.5, 1, 1]])
    pixels = shares * (40, 30, 40, 30)
    assert visualize.shares_of(pixels, (40, 30)) == pytest.approx(shares)
    assert visualize.shares_of(shares, (40, 30)) == pytest.approx(shares)
    assert visualize.shares_of(pixels, None) == pytest.approx(shares)


def test_curves_hold_what_the_log_holds(looked_at, monkeypatch):
    monkeypatch.chdir(looked_at)
    run_folder = "runs/LHSC/checkpoint"
    log = visualize.read_log(looked_at / run_folder)
    fig = draw("curves", run_folder, "--out", "c.pdf")
    loss, rsum, _ = fig.axes
    assert loss.lines[0].get_ydata().tolist() == [line["loss"] for line in log["train"]]
    assert rsum.lines[0].get_ydata().tolist() == [line["rsum"] for line in log["dev"]]
    both = draw("curves", run_folder, f"{run_folder}/metrics.jsonl", "--out", "c.png")
    assert len(both.axes[1].lines) == 2


def test_the_report_is_one_page_that_needs_nothing_else(looked_at, monkeypatch):
    monkeypatch.chdir(looked_at)
    page = draw("report", *MODEL, "--pictures", "pictures", "--queries", 3, "--out", "r.html")
    assert "http" not in page.replace("http://www.w3.org", "").replace("xmlns:xlink", "").replace(
        "https://matplotlib.org", ""
    ).replace("http://purl.org", "").replace("http://creativecommons.org", "")
    assert "src=" in page and page.count('src="data:image/jpeg;base64,') == page.count("src=")
    assert page.count('class="query"') == 6
    words = re.findall(r'data-weights="(\[[^"]*\])"', page)
    assert words and all(max(json.loads(w)) == 1 and len(json.loads(w)) == 6 for w in words)
    metrics = evalrank(MODEL[1], split="test")
    assert f"<b>{metrics['rsum']:.1f}</b>" in page and f"{metrics['i2t']['r5']:.1f}</td>" in page


def test_a_caption_cannot_put_markup_into_the_report(looked_at, monkeypatch):
    monkeypatch.chdir(looked_at)
    caps = looked_at / "data/tiny/test_caps.txt"
    before = caps.read_text()
    caps.write_text(before.replace("look at", "<script>alert(1)</script> & look at"))
    page = draw("report", *MODEL, "--queries", 10, "--out", "r.html")
    caps.write_text(before)
    assert "<script>alert" not in page and "alert" in page
    assert page.count("<script>") == 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("attention", *MODEL, "--image", "none"), ("--image none",)),
        (("attention", *MODEL, "--image", "10"), ("below 10",)),
        (("attention", "--model_path", "no.pth.tar"), ("no.pth.tar",)),
        (("curves", "nowhere"), ("nowhere",)),
        (("curves", "data/tiny/test_caps.txt"), ("test_caps.txt, line 1",)),
        (("report", *MODEL, "--split", "none"), ("none_ims.npy",)),
    ],
)
def test_what_cannot_be_drawn_is_said(looked_at, monkeypatch, arguments, words):
    monkeypatch.chdir(looked_at)
    with pytest.raises(InputError) as error:
        draw(*arguments)
    assert all(word in str(error.value) for word in words), error.value


def test_boxes_of_another_data_set_are_refused(looked_at, tmp_path):
    np.save(tmp_path / "b.npy", np.zeros((10, 5, 4), dtype=np.float32))
    with pytest.raises(InputError, match=r"\(10, 6, 4\)"):
        read_boxes(tmp_path / "b.npy", 10, 6)
    (tmp_path / "b.npy").write_bytes(b"nothing")
    with pytest.raises(InputError, match="not a readable"):
        read_boxes(tmp_path / "b.npy", 10, 6)
    with (tmp_path / "b.npy").open("wb") as file:
        np.savez(file, boxes=np.zeros((10, 6, 4), dtype=np.float32))
    with pytest.raises(InputError, match="archive"):
        read_boxes(tmp_path / "b.npy", 10, 6)
    assert read_boxes(tmp_path / "none.npy", 10, 6) is None


@pytest.mark.parametrize("kind", ["archive", "empty", "text", "object"])
def test_a_file_that_holds_no_scores_is_refused(tmp_path, kind):
    path = tmp_path / "sims.npy"
    with path.open("wb") as file:
        if kind == "archive":
            np.savez(file, sims=SIMS)
        elif kind == "empty":
            np.save(file, np.zeros((0, 20), dtype=np.float32))
        elif kind == "object":
            np.save(file, np.array([[{}] * 20] * 4), allow_pickle=True)
        else:
            file.write(b"no scores")
    with pytest.raises(InputError, match=r"sims\.npy"):
        visualize.load_sims(path, 20)
