"""Figures, explanations and the report: they show what the model and the log hold."""

import copy
import json
import re
import shutil
from pathlib import Path

import compare
import numpy as np
import pytest
import torch
import visualize
from conftest import ROOT, RUN, call, load_split, refused, succeeded
from PIL import Image

from attention import cross_attention
from baselines import LocalSimilarity, build_model
from evaluation import evalrank
from utils import InputError

SIMS = np.random.default_rng(0).random((10, 50)).astype(np.float32)
MODEL = ("--model_path", RUN / "model_best.pth.tar")
RETRIEVAL = ("retrieval", "--data_name", "tiny", "--sims", "sims.npy")
SIZES = {"img_dim": 8, "num_regions": 6, "embed_size": 16, "word_dim": 10, "sim_dim": 8}
MARKUP = f"<script>alert(1)</script> & $\\frac{{ {'long' * 40} "


def command(*arguments):
    return call(".", visualize.main, *arguments)


def draw(*arguments):
    """The figure or page of a command line."""
    opt = visualize.options().parse_args(list(map(str, arguments)))
    return opt.work(opt)


@pytest.fixture(autouse=True)
def closed():
    yield
    visualize.plt.close("all")


@pytest.fixture(scope="module")
def drawable(trained, tmp_path_factory):
    """A trained model, its data set with boxes and pictures, and scores of its test split."""
    folder = shutil.copytree(trained[0], tmp_path_factory.mktemp("drawable") / "copy")
    corners = [(x / 2, y / 3, (x + 1) / 2, (y + 1) / 3) for y in range(3) for x in range(2)]
    np.save(folder / "data/tiny/test_boxes.npy", np.array([corners] * 10, dtype=np.float32))
    np.save(folder / "sims.npy", SIMS)
    (folder / "pictures").mkdir()
    for k in range(10):
        Image.new("RGB", (40, 30), (20 * k, 90, 90)).save(folder / f"pictures/test{k}.png")
    return folder


@pytest.fixture
def here(drawable, monkeypatch):
    monkeypatch.chdir(drawable)


@pytest.fixture
def markup(drawable, tmp_path, monkeypatch):
    """A copy without pictures, whose captions and ids hold markup, one of them long."""
    monkeypatch.chdir(shutil.copytree(drawable, tmp_path / "copy"))
    for name, old in (("test_caps.txt", "look at"), ("test_ids.txt", "test1")):
        path = tmp_path / "copy/data/tiny" / name
        path.write_text(path.read_text().replace(old, MARKUP + old))


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_a_figure_is_written_and_not_overwritten(here, suffix, tmp_path):
    out = tmp_path / f"f.{suffix}"
    arguments = ("attention", *MODEL, "--pictures", "pictures", "--out", out)
    succeeded(command(*arguments))
    assert len(before := out.read_bytes()) > 8000
    refused(command(*arguments, "--image", 3), f"f.{suffix}", "--out", "--overwrite")
    assert out.read_bytes() == before
    succeeded(command(*arguments, "--image", 3, "--overwrite"))
    assert out.read_bytes() != before and list(tmp_path.iterdir()) == [out]
    assert "--overwrite" in (ROOT / "scripts/demo.sh").read_text()  # which may be run again


@pytest.mark.parametrize("arguments, word", [
    (("attention", *MODEL, "--image", "10"), "--image 10"),
    (("attention", "--model_path", "no.pth.tar"), "no.pth.tar"),
    (("attention", "--pictures", "nowhere"), "nowhere"),
    (("curves", "nowhere"), "nowhere"),
    (("curves", "x", "--out", "c.docx"), ".pdf"),
    (("report", *MODEL, "--split", "none"), "none_ims.npy"),
    ((*RETRIEVAL, "--split", "train"), "do not fit 150 captions"),
])  # fmt: skip
def test_what_cannot_be_drawn_is_said(here, arguments, word):
    refused(command(*arguments), word)


def test_queries_of_all_ranks_are_shown_and_right_answers_are_framed(here):
    """With scores that find one image of a caption, and all five captions of an image."""
    ranks = np.array([5, 0, 3, 9, 1])
    assert ranks[visualize.spread(ranks, 3)].tolist() == [0, 3, 9]
    np.save("right.npy", np.where(np.arange(50) // 5 == np.arange(10)[:, None], 1.0, SIMS / 2))
    fig = draw(*RETRIEVAL[:-1], "right.npy", "--queries", 3)
    framed = [ax for ax in fig.axes if ax.spines["top"].get_linewidth() == 4]
    texts = [ax.texts[0].get_text() for ax in framed]
    assert sum(text.startswith("test") for text in texts) == 3 and len(texts) == 3 + 3 * 5


def test_a_dollar_sign_is_a_dollar_sign(markup, tmp_path):
    """Of captions and file names, also in a formula that cannot be parsed."""
    fig = draw(*RETRIEVAL, "--queries", 9)
    fig.savefig(tmp_path / "f.png")
    assert any("$" in text.get_text() for ax in fig.axes for text in ax.texts)


@pytest.mark.parametrize("array", [
    np.zeros((0, 20)), SIMS[:, :45], SIMS[0], np.full((4, 20), np.nan), np.full((4, 20), "a"),
    np.zeros((4, 20), dtype=[("x", "f4")]), np.zeros((4, 20), dtype=complex),
])  # fmt: skip
def test_arrays_that_are_no_scores_are_refused(tmp_path, array):
    np.save(tmp_path / "sims.npy", array)
    with pytest.raises(InputError, match=r"sims\.npy"):
        compare.load_sims(tmp_path / "sims.npy")


@pytest.mark.parametrize("options", [(), ("--fold5",)])
def test_runs_are_compared_on_the_same_images(tmp_path, options):
    """The difference is that of the rsums; of a run with itself it is 0, and surely so."""
    np.save(tmp_path / "worse.npy", SIMS)
    np.save(tmp_path / "better.npy", SIMS + np.eye(10).repeat(5, axis=1))
    np.save(tmp_path / "half.npy", SIMS[:5, :25])

    def compared(*files):
        return succeeded(call(tmp_path, compare.main, *files, *options)).splitlines()

    first, second, last = compared("worse.npy", "better.npy")
    worse, better = (float(line.split()[-1]) for line in (first, second))
    assert better == 600 > worse
    difference, low, high = (float(x) for x in re.findall(r"[+-]\d+\.\d", last))
    assert difference == pytest.approx(better - worse, abs=0.11) and 0 < low <= difference <= high
    assert "+0.0, 95 % interval +0.0 … +0.0" in compared("worse.npy", "worse.npy")[2]
    refused(call(tmp_path, compare.main, "worse.npy", "half.npy"), "(10, 50) and (5, 25)")


@pytest.fixture
def described(tiny, request):
    """A model of the similarity that a test names, its vocabulary, and an encoded image."""
    _, vocab = load_split(tiny, "test")
    model = build_model(request.param, vocab_size=len(vocab), **SIZES).eval()
    with torch.inference_mode():
        return model, vocab, model.image_encoder(torch.randn(1, 6, 8))


@pytest.mark.parametrize("described", ["lhsc", "local", "attended"], indirect=True)
def test_an_explanation_adds_up(described):
    """Weights sum to 1, gates with the global one too, and the score is the model's."""
    model, vocab, region_emb = described
    why = visualize.explain(model, vocab, region_emb, "a red zebra")
    assert why.words == ["<start>", "a", "red", "zebra", "<end>"]
    assert why.unknown == [word == "zebra" for word in why.words]
    assert why.attention.sum(1) == pytest.approx(np.ones(5), abs=1e-5)
    assert why.gates.sum() + why.global_gate == pytest.approx(1, abs=1e-5)
    has_global = not isinstance(model.similarity, LocalSimilarity)
    assert why.region_weights.shape == (6,)
    assert why.region_weights.sum() == pytest.approx(float(has_global), abs=1e-5)
    lengths = torch.tensor([5])
    with torch.inference_mode():
        words = model.text_encoder(torch.tensor([vocab.encode("a red zebra")]), lengths)
        score = model.similarity(region_emb, words, lengths)
        weights = cross_attention(region_emb, words, torch.zeros(5, dtype=torch.long), 1)[0]
    assert why.score == pytest.approx(score.item(), abs=1e-6)
    weights = weights / weights.sum(1, keepdim=True)
    assert why.attention == pytest.approx(weights.numpy(), abs=1e-6)


@pytest.mark.parametrize("described", ["scan", "vse", "global"], indirect=True)
def test_models_without_local_alignments_are_not_explained(described):
    with pytest.raises(InputError, match="--similarity lhsc, local or attended"):
        visualize.explain(*described, "a dog")


def test_every_word_has_its_own_picture(here):
    sentence = "a red dog in one zeppelin"
    fig = draw("attention", *MODEL, "--image", "test2", "--caption", sentence)
    titles = [ax.get_title().split(" · ")[0] for ax in fig.axes]
    expected = ["whole image", "<start>", *sentence.split()[:-1], "zeppelin*", "<end>"]
    assert titles[:9] == expected
    opt = visualize.options().parse_args(["attention"])
    why = visualize.Split(MODEL[1], opt).explain(2, sentence)
    for row, ax in enumerate(fig.axes[1:9]):
        opacity = [patch.get_alpha() for patch in ax.patches]
        assert np.argsort(opacity).tolist() == np.argsort(why.attention[row]).tolist()
        assert max(opacity) == 0.75


def test_without_boxes_attention_is_a_table(markup):
    Path("data/tiny/test_boxes.npy").unlink()
    table = draw("attention", *MODEL).axes[0]
    assert table.get_yticklabels()[1].get_text().startswith("<start> · ")
    assert table.images[0].get_array().shape[1] == 6


def test_boxes_in_pixels_and_as_shares_are_the_same():
    shares = np.array([[0, 0, 0.5, 1], [0.25, 0.5, 1, 1]])
    pixels = shares * (40, 30, 40, 30)
    picture = Image.new("RGB", (40, 30))
    for boxes, known in ((pixels, picture), (shares, picture), (pixels, None)):
        assert visualize.shares_of(boxes, known) == pytest.approx(shares)


def test_curves_hold_what_the_log_holds(here):
    log = visualize.read_log(RUN)
    loss, rsum, _ = draw("curves", RUN).axes
    assert loss.lines[0].get_ydata().tolist() == [line["loss"] for line in log["train"]]
    assert rsum.lines[0].get_ydata().tolist() == [line["rsum"] for line in log["dev"]]
    warm = copy.deepcopy(log)
    warm["run"][0]["arguments"]["warmup_epochs"] = 1
    loss, rsum, _ = visualize.curves_figure({"a": log, "b": warm}).axes
    *_, switch = loss.lines
    assert len(loss.lines) == 3 and len(rsum.lines) == 2  # two runs, one has a switch
    assert switch.get_xdata() == [10, 10]  # one epoch: 150 captions in batches of 16
    assert "hardest negatives" in loss.get_title()


def test_updates_of_layers_are_those_of_single_images_and_captions(here, tmp_path):
    succeeded(command("layers", MODEL[1], "--out", tmp_path / "l.png"))
    split = visualize.Split(MODEL[1], visualize.options().parse_args(["attention"]))
    model, data, means = split.model, split.data, visualize.layer_updates(split)
    images = [model.image_encoder.fc(data.image(k)[None]) for k in range(data.n_images)]
    captions = [model.text_encoder.embed(data.words(k)) for k in range(len(data))]
    masks = [torch.ones(1, len(words), dtype=torch.bool) for words in captions]
    for kind, layers, inputs, others in (
        ("graph", model.image_encoder.graph.layers, images, ()),
        ("word", model.text_encoder.self_attention, captions, (masks,)),
    ):
        for k, layer in enumerate(layers):
            outputs = [*map(layer, inputs, *others)]
            ratios = [((y - x).norm(dim=-1) / x.norm(dim=-1)).flatten()
                      for x, y in zip(inputs, outputs, strict=True)]  # fmt: skip
            assert means[kind][k] == pytest.approx(torch.cat(ratios).mean().item(), rel=1e-4)
            inputs = outputs


def test_the_report_needs_nothing_else(here):
    page = draw("report", *MODEL, "--pictures", "pictures", "--queries", 3)
    assert "http" not in page and page.count("src=") == page.count('src="data:image/') > 30
    assert page.count('class="query"') == 6
    words = re.findall(r'data-weights="(\[[^"]*\])"', page)
    assert words and all(max(json.loads(w)) == 1 and len(json.loads(w)) == 6 for w in words)
    metrics = evalrank(MODEL[1], split="test")
    assert f"<b>{metrics['rsum']:.1f}</b>" in page and f"{metrics['i2t']['r5']:.1f}</td>" in page


def test_captions_and_ids_cannot_put_markup_into_the_report(markup):
    page = draw("report", *MODEL, "--queries", 10)
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    assert page.count("<script>") == 1


@pytest.mark.slow
def test_the_report_fits_a_narrow_screen(markup, chromium, tmp_path):
    page = draw("report", *MODEL, "--queries", 10)
    (tmp_path / "r.html").write_text(page, encoding="utf-8")
    page = chromium.new_page(viewport={"width": 360, "height": 800})
    page.goto((tmp_path / "r.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.locator(".words span").nth(1).hover()
    strongest = "Math.max(...[...document.querySelectorAll('i')].map(i => i.style.opacity))"
    assert page.evaluate(strongest) == 0.75
