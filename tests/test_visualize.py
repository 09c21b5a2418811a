"""Figures, explanations and the report: they show what the model and the log hold."""

import contextlib
import io
import json
import re
import shutil
import sys
from types import SimpleNamespace
from unittest.mock import patch

import compare
import numpy as np
import pytest
import torch
import visualize
from conftest import write_split
from PIL import Image
from test_commands import SMALL, refused, run

from attention import cross_attention
from baselines import build_model
from evaluation import evalrank
from utils import InputError
from vocab import build_from_data

CAPTIONS = [f"caption {i}" for i in range(20)]
SIMS = np.random.default_rng(0).random((4, 20)).astype(np.float32)
MODEL = ("--model_path", "runs/LHSC/checkpoint/model_best.pth.tar")
SIZES = {"img_dim": 8, "num_regions": 6, "embed_size": 16, "word_dim": 10, "sim_dim": 8}


def call(main, *arguments):
    """Run a script's main in this process: exit status, output, errors."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with (
        patch.object(sys, "argv", ["script", *map(str, arguments)]),
        contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
    ):  # fmt: skip
        try:
            main()
        except SystemExit as exit:
            status = exit.code or 0
    return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())


def draw(*arguments):
    """The figure or page of a command line."""
    opt = visualize.options().parse_args(list(map(str, arguments)))
    made = opt.work(opt)
    visualize.plt.close("all")
    return made


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a small trained model, its log, and a data set with boxes and pictures."""
    folder = tmp_path_factory.mktemp("trained")
    for split, n_images in (("train", 30), ("dev", 10), ("test", 10)):
        write_split(folder / "data/tiny", split, n_images)
    result = run(folder, "train.py", *SMALL, "--log_step", 3, "--warmup_epochs", 1)
    assert result.returncode == 0, result.stderr
    corners = [(x, y) for y in (0, 1 / 3, 2 / 3) for x in (0, 1 / 2)]
    boxes = np.array([(x, y, x + 1 / 2, y + 1 / 3) for x, y in corners], dtype=np.float32)
    np.save(folder / "data/tiny/test_boxes.npy", np.repeat(boxes[None].clip(0, 1), 10, axis=0))
    (folder / "pictures").mkdir()
    for k in range(10):
        Image.new("RGB", (40, 30), (20 * k, 90, 90)).save(folder / f"pictures/test{k}.png")
    return folder


@pytest.fixture
def here(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return trained


# -- retrieval ------------------------------------------------------------------------------------


def test_right_answers_are_framed():
    """All four images are shown to each caption, so the right one is among them."""
    fig = visualize.retrieval_figure(SIMS, CAPTIONS, list("abcd"), None, n_queries=3)
    framed = [ax for ax in fig.axes if ax.spines["top"].get_linewidth() == 4]
    texts = [ax.texts[0].get_text() for ax in framed]
    assert sum(text in "abcd" for text in texts) == 3 < len(texts)
    visualize.plt.close(fig)


def test_queries_of_all_ranks_are_shown():
    ranks = np.array([5, 0, 3, 9, 1])
    assert ranks[visualize.spread(ranks, 3)].tolist() == [0, 3, 9]


def test_a_dollar_sign_is_a_dollar_sign(tmp_path):
    """Of captions and file names; a single one, a pair, and a formula that cannot be parsed."""
    captions = ["it costs 5$", "$5 or $6", r"$\frac{"] * 4
    fig = visualize.retrieval_figure(SIMS[:, :12], captions, ["$a", "$b$", "c", "d"], None)
    fig.savefig(tmp_path / "f.png")
    assert not any(text.get_parse_math() for ax in fig.axes for text in ax.texts)
    visualize.plt.close(fig)


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_a_figure_is_written_and_not_overwritten(here, suffix, tmp_path, monkeypatch):
    out = tmp_path / f"f.{suffix}"
    command = visualize.main, "attention", *MODEL, "--pictures", "pictures", "--out", out
    assert call(*command).returncode == 0
    before = out.read_bytes()
    assert len(before) > 8000
    refused(call(*command, "--image", 3), f"f.{suffix}", "--out", "--overwrite")
    assert out.read_bytes() == before
    assert call(*command, "--image", 3, "--overwrite").returncode == 0
    assert out.read_bytes() != before and list(tmp_path.iterdir()) == [out]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "curves.png").write_text("mine")  # the default target
    refused(call(visualize.main, "curves", here / "runs/LHSC/checkpoint"), "curves.png", "--out")
    assert (tmp_path / "curves.png").read_text() == "mine"


# -- explanations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", ["lhsc", "local", "attended"])
def test_an_explanation_adds_up(tiny, similarity):
    """Weights sum to 1, gates with the global one too, and the score is the model's."""
    vocab, regions = build_from_data(tiny / "data", "tiny"), torch.randn(6, 8)
    model = build_model(similarity, vocab_size=len(vocab), **SIZES).eval()
    why = visualize.explain(model, vocab, regions, "a red zebra")
    assert why.words == ["<start>", "a", "red", "zebra", "<end>"]
    assert why.unknown == [word == "zebra" for word in why.words]
    assert why.attention.sum(1) == pytest.approx(np.ones(5), abs=1e-5)
    assert why.gates.sum() + why.global_gate == pytest.approx(1, abs=1e-5)
    for weights, n in ((why.region_weights, 6), (why.word_weights, 5)):
        assert weights.shape == (n,)
        assert weights.sum() == pytest.approx(float(similarity != "local"), abs=1e-5)
    ids = torch.tensor([vocab.encode("a red zebra")])
    with torch.inference_mode():
        score = model(regions[None], ids, torch.tensor([5]))
        words = model.text_encoder(ids, torch.tensor([5]))
        index = torch.zeros(5, dtype=torch.long)
        weights = cross_attention(model.image_encoder(regions[None]), words, index, 1)[0]
    assert why.score == pytest.approx(score.item(), abs=1e-6)
    weights = weights / weights.sum(1, keepdim=True)
    assert why.attention == pytest.approx(weights.numpy(), abs=1e-6)


@pytest.mark.parametrize("similarity", ["scan", "vse", "global"])
def test_models_without_local_alignments_are_not_explained(tiny, similarity):
    vocab = build_from_data(tiny / "data", "tiny")
    model = build_model(similarity, vocab_size=len(vocab), **SIZES).eval()
    with pytest.raises(InputError, match="local alignments"):
        visualize.explain(model, vocab, torch.randn(6, 8), "a dog")


def test_every_word_has_its_own_picture_and_bar(here):
    sentence = "a red dog near one zeppelin"
    fig = draw("attention", *MODEL, "--image", "test2", "--caption", sentence)
    titles = " ".join(ax.get_title() for ax in fig.axes)
    assert all(f"{word} · " in titles for word in sentence.split())
    labels = {label.get_text() for ax in fig.axes for label in ax.get_xticklabels()}
    assert {"red", "zeppelin*", "whole image"} <= labels


def test_without_boxes_attention_is_a_table(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    (tmp_path / "copy/data/tiny/test_boxes.npy").unlink()
    table = next(ax for ax in draw("attention", *MODEL).axes if ax.images)
    assert table.get_yticklabels()[0].get_text() == "<start>"
    assert table.images[0].get_array().shape[1] == 6


def test_heat_is_where_the_weight_is():
    boxes = np.array([[0, 0, 0.5, 1], [0.5, 0, 1, 1]])
    heat = visualize.heat_map(np.array([0.2, 0.8]), boxes, side=10)
    assert heat[:, :5] == pytest.approx(0.25) and heat[:, 5:] == pytest.approx(1)
    overlapping = np.array([[0, 0, 0.6, 1], [0.4, 0, 1, 1]])
    assert np.ptp(visualize.heat_map(np.array([0.5, 0.5]), overlapping, side=10)) < 1e-9


def test_boxes_in_pixels_and_as_shares_are_the_same():
    shares = np.array([[0, 0, 0.5, 1], [0.25, 0.5, 1, 1]])
    pixels = shares * (40, 30, 40, 30)
    for boxes, size in ((pixels, (40, 30)), (shares, (40, 30)), (pixels, None)):
        assert visualize.shares_of(boxes, size) == pytest.approx(shares)


# -- curves and layers ----------------------------------------------------------------------------


def test_curves_hold_what_the_log_holds(here, tmp_path):
    log = visualize.read_log(here / "runs/LHSC/checkpoint")
    loss, rsum, _ = draw("curves", "runs/LHSC/checkpoint").axes
    curve, switch = loss.lines
    assert curve.get_ydata().tolist() == [line["loss"] for line in log["train"]]
    assert rsum.lines[0].get_ydata().tolist() == [line["rsum"] for line in log["dev"]]
    assert switch.get_xdata() == [10, 10]  # one epoch: 150 captions in batches of 16
    assert "hardest negatives" in loss.texts[0].get_text()
    text = (here / "runs/LHSC/checkpoint/metrics.jsonl").read_text()
    other = tmp_path / "metrics.jsonl"
    other.write_text(text.replace('"warmup_epochs": 1', '"warmup_epochs": 0'))
    loss, rsum, _ = draw("curves", "runs/LHSC/checkpoint", other).axes
    assert len(loss.lines) == 3 and len(rsum.lines) == 2  # two runs, one of them has a switch


@pytest.mark.parametrize("line", [b"{", b"[1]", b"3", b'{"loss": 1}', b"\xff\xfe", b""])
def test_a_damaged_log_is_named_with_its_line(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"type": "run", "arguments": {}}\n' + line + b"\n")
    refused(call(visualize.main, "curves", path, "--out", tmp_path / "c.png"), f"{path}, line 2")


def test_updates_of_layers_are_those_of_single_images_and_captions(here, tmp_path):
    out, numbers = tmp_path / "l.png", tmp_path / "l.json"
    result = call(visualize.main, "layers", MODEL[1], "--out", out, "--json", numbers)
    assert result.returncode == 0 and out.is_file(), result.stderr
    opt = visualize.options().parse_args(["layers", MODEL[1]])
    model, _, data, *_ = visualize.Split.open(MODEL[1], opt)
    images = [model.image_encoder.fc(data.image(k)[None]) for k in range(data.n_images)]
    captions = [model.text_encoder.embed(data.words(k)[None]) for k in range(len(data))]
    means = json.loads(numbers.read_text())["LHSC"]
    for kind, layers, inputs, mask in (
        ("graph", model.image_encoder.graph.layers, images, ()),
        ("word", model.text_encoder.self_attention, captions, (None,)),
    ):
        for k, layer in enumerate(layers):
            outputs = [layer(x, *mask) for x in inputs]
            ratios = [((y - x).norm(dim=-1) / x.norm(dim=-1)).flatten()
                      for x, y in zip(inputs, outputs, strict=True)]  # fmt: skip
            assert means[kind][k] == pytest.approx(torch.cat(ratios).mean().item(), rel=1e-4)
            inputs = outputs


# -- report ---------------------------------------------------------------------------------------


def test_the_report_needs_nothing_else(here):
    page = draw("report", *MODEL, "--pictures", "pictures", "--queries", 3)
    assert "http" not in page and page.count("src=") == page.count('src="data:image/') > 30
    assert page.count('class="query"') == 6
    words = re.findall(r'data-weights="(\[[^"]*\])"', page)
    assert words and all(max(json.loads(w)) == 1 and len(json.loads(w)) == 6 for w in words)
    metrics = evalrank(MODEL[1], split="test")
    assert f"<b>{metrics['rsum']:.1f}</b>" in page and f"{metrics['i2t']['r5']:.1f}</td>" in page


@pytest.fixture
def page_of_markup(trained, tmp_path, monkeypatch):
    """A report without pictures, of captions and ids with markup, one of them long."""
    shutil.copytree(trained, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    for name, old in (("test_caps.txt", "look at"), ("test_ids.txt", "test1")):
        path = tmp_path / "copy/data/tiny" / name
        markup = f"<script>alert(1)</script> & {'long' * 40} "
        path.write_text(path.read_text().replace(old, markup + old))
    return draw("report", *MODEL, "--queries", 10)


def test_captions_and_ids_cannot_put_markup_into_the_report(page_of_markup):
    assert "<script>alert" not in page_of_markup and "&lt;script&gt;alert" in page_of_markup
    assert page_of_markup.count("<script>") == 1


@pytest.mark.slow
def test_the_report_fits_a_narrow_screen(page_of_markup, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("needs Chromium: apt install chromium")
    (tmp_path / "r.html").write_text(page_of_markup, encoding="utf-8")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 360, "height": 800})
        page.goto((tmp_path / "r.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        page.locator(".words span").nth(1).hover()
        strongest = "Math.max(...[...document.querySelectorAll('i')].map(i => i.style.opacity))"
        assert page.evaluate(strongest) == 0.75
        browser.close()


# -- what cannot be drawn -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("attention", *MODEL, "--image", "none"), ("--image none",)),
        (("attention", *MODEL, "--image", "10"), ("below 10",)),
        (("attention", "--model_path", "no.pth.tar"), ("no.pth.tar",)),
        (("attention", "--pictures", "nowhere"), ("nowhere",)),
        (("curves", "nowhere"), ("nowhere",)),
        (("curves", "x", "--out", "c.docx"), ("c.docx", ".pdf")),
        (("report", *MODEL, "--split", "none"), ("none_ims.npy",)),
        (("retrieval", "--data_name", "tiny", "--sims", "none.npy"), ("none.npy",)),
    ],
)
def test_what_cannot_be_drawn_is_said(here, arguments, words):
    refused(call(visualize.main, *arguments), *words)


@pytest.mark.parametrize("array", [
    np.zeros((0, 20)), SIMS[:, :10], SIMS[0], np.full((4, 20), np.nan), np.full((4, 20), "a"),
    np.zeros((4, 20), dtype=[("x", "f4")]), np.zeros((4, 20), dtype=complex),
])  # fmt: skip
def test_arrays_that_are_no_scores_are_refused(tmp_path, array):
    """By the figure and by compare.py."""
    write_split(tmp_path / "data/tiny", "test", 4)
    path = tmp_path / "sims.npy"
    np.save(path, array)
    options = "--data_path", tmp_path / "data", "--data_name", "tiny"
    out = tmp_path / "r.png"
    refused(call(visualize.main, "retrieval", "--sims", path, "--out", out, *options), "sims.npy")
    refused(call(compare.main, path, path, *options), "sims.npy")


# -- compare.py -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--fold5",)])
def test_runs_are_compared_on_the_same_images(tmp_path, options):
    """The difference is that of the rsums; of a run with itself it is 0, and surely so."""
    write_split(tmp_path / "data/tiny", "test", 10)
    sims = np.random.default_rng(0).random((10, 50))
    np.save(tmp_path / "worse.npy", sims)
    np.save(tmp_path / "better.npy", sims + np.repeat(np.eye(10), 5, axis=1))
    command = lambda *names: call(  # noqa: E731
        compare.main, *(tmp_path / name for name in names), *options,
        "--data_path", tmp_path / "data", "--data_name", "tiny",
    ).stdout.splitlines()  # fmt: skip
    first, second, last = command("worse.npy", "better.npy")
    worse, better = (float(line.split()[-1]) for line in (first, second))
    assert better == 600 > worse
    difference, low, high = (float(x) for x in re.findall(r"[+-]\d+\.\d", last))
    assert difference == pytest.approx(better - worse, abs=0.11) and 0 < low <= difference <= high
    assert "+0.0, 95 % interval +0.0 … +0.0" in command("worse.npy", "worse.npy")[2]
