"""Search: the index answers as the model scores, from photographs to answers."""

import json
import shutil

import numpy as np
import pytest
import search
import torch
from conftest import write_split
from PIL import Image
from test_commands import refused, run

import index as indexing
from attention import cross_attention
from checkpoint import load_checkpoint, model_from, save_checkpoint
from errors import InputError
from explain import explain
from features import Extractor, Recipe, read_picture
from index import Builder, CandidateMap, Index
from model import LHSC
from vocab import Vocabulary, build_vocab

SENTENCE = "a red dog beside two green cars"
SIZES = {
    "embed_size": 32, "sim_dim": 16, "word_dim": 12, "num_layers": 1, "bi_gru": True,
    "graph_layers": 2, "text_layers": 1, "drop_out": 0.0, "embed_dropout": 0.0,
    "pool_dropout": 0.0, "no_imgnorm": False, "no_txtnorm": False, "padding": "masked",
    "num_regions": 36,
}  # fmt: skip


def write_model(folder, img_dim):
    """A random model that tells images apart, `m.pth.tar`, and its vocabulary."""
    torch.manual_seed(3)
    vocab = build_vocab([SENTENCE, "one blue cat , one tree"], threshold=1)
    vocab.save(folder / "vocab" / "mine_vocab.json")
    sizes = SIZES | {"img_dim": img_dim, "vocab_size": len(vocab)}
    model = LHSC(**sizes)
    with torch.no_grad():
        for parameter in model.similarity.parameters():
            parameter.mul_(3)
    opt = sizes | {"data_name": "mine", "vocab_path": str(folder / "vocab")}
    save_checkpoint({"opt": opt, "model": model.state_dict()}, folder / "m.pth.tar")
    return model.eval(), vocab


def demo_index(folder):
    """Twelve photographs, their regions, a model and an index in `folder`."""
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    for k in range(12):
        small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
        small.resize((96, 96)).save(folder / "photos" / f"picture{k}.png")
    result = run(
        folder, "scripts/extract_features.py", "photos", "--data_name", "mine",
        "--backbone", "scenes",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    img_dim = np.load(folder / "data/mine/test_ims.npy", mmap_mode="r").shape[2]
    write_model(folder, img_dim)
    result = run(
        folder, "scripts/search.py", "index", "--model_path", "m.pth.tar", "--pictures", "photos",
        "--out", "index",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "12 images" in result.stdout
    return folder


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    return demo_index(tmp_path_factory.mktemp("search"))


def scores(folder, sentence):
    """The model's own scores of all pictures with a sentence."""
    model = model_from(load_checkpoint(folder / "m.pth.tar"))
    vocab = Vocabulary.load(folder / "vocab/mine_vocab.json")
    ids = vocab.encode(sentence)
    images = torch.from_numpy(np.load(folder / "data/mine/test_ims.npy"))
    with torch.inference_mode():
        return model(images, torch.tensor([ids]), torch.tensor([len(ids)]))[:, 0].numpy()


def query(folder, *arguments):
    result = run(folder, "scripts/search.py", "query", "--index", "index", "--json", *arguments)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_a_sentence_is_answered_in_the_order_of_the_models_scores(searched):
    expected = scores(searched, SENTENCE)
    names = (searched / "data/mine/test_ids.txt").read_text().split()
    answers = query(searched, SENTENCE, "--top", 12)["images"]
    assert [a["id"] for a in answers] == [names[k] for k in np.argsort(-expected)]
    # Encodings are kept as float16.
    assert [a["score"] for a in answers] == pytest.approx(sorted(expected)[::-1], abs=2e-3)
    assert all(a["file"].endswith(f"photos/{a['id']}") for a in answers)
    assert set(answers[0]["words"]) <= set(SENTENCE.split())


def test_few_candidates_are_still_ordered_by_the_model(searched):
    expected = scores(searched, SENTENCE)
    names = (searched / "data/mine/test_ids.txt").read_text().split()
    answers = query(searched, SENTENCE, "--candidates", 5)["images"]
    assert len({a["id"] for a in answers}) == 5
    got = [expected[names.index(a["id"])] for a in answers]
    assert got == sorted(got, reverse=True)


def test_a_picture_finds_itself(searched):
    answers = query(searched, "--image", "photos/picture7.png")
    assert answers["images"][0]["id"] == "picture7.png"
    assert answers["images"][0]["score"] == pytest.approx(1, abs=1e-3)
    assert answers["captions"] == []


def test_a_picture_is_answered_with_captions_where_the_index_has_some(tmp_path):
    write_split(tmp_path / "data" / "mine", "test", 8, num_regions=36, img_dim=10)
    model, vocab = write_model(tmp_path, 10)
    result = run(tmp_path, "scripts/search.py", "index", "--model_path", "m.pth.tar", "--out", "i")
    assert "8 images and 40 captions" in result.stdout, result.stderr
    found = Index(tmp_path / "i", model, vocab)
    regions = torch.from_numpy(np.load(tmp_path / "data/mine/test_ims.npy"))
    image = found.encode_image(regions[2])
    captions = found.captions_for(image, top=40)
    with torch.inference_mode():
        encoded = [vocab.encode(text) for text in found.texts]
        expected = [
            model(regions[2:3], torch.tensor([ids]), torch.tensor([len(ids)])).item()
            for ids in encoded
        ]
    assert sorted(a.place for a in captions) == list(range(40))
    for answer in captions:
        assert answer.score == pytest.approx(expected[answer.place], abs=2e-3)
    assert [a.score for a in captions] == sorted((a.score for a in captions), reverse=True)


def test_candidates_are_the_inner_product_they_are_said_to_be():
    """w · P (v − q)² up to what does not depend on the image."""
    model = LHSC(vocab_size=9, img_dim=4, **SIZES).double().eval()
    s, means = model.similarity, torch.randn(7, 32, dtype=torch.double)
    word = torch.randn(32, dtype=torch.double)
    c = CandidateMap.of(s)
    product = torch.cat([means, means.square() @ c.c[:, None]], 1) @ torch.cat(
        [-2 * c.c * word, word.new_ones(1)]
    )
    assert torch.allclose(c.stored(means) @ torch.cat([-2 * c.c * word, word.new_ones(1)]), product)
    with torch.inference_mode():
        exact = s.local_fc((means - word).square()) @ s.score_fc.weight[0]
    difference = exact - product
    assert torch.allclose(difference, difference[0].expand(7), atol=1e-10)


def test_the_inverted_file_finds_what_comparing_all_finds(tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(indexing, "FLAT", 500)
    model, vocab = write_model(tmp_path, 4)
    regions = torch.nn.functional.normalize(torch.randn(2000, 36, 32), dim=-1)
    regions = torch.nn.functional.normalize(regions + torch.randn(2000, 1, 32), dim=-1)
    for name in ("flat", "inverted"):
        monkeypatch.setattr(indexing, "FLAT", 5000 if name == "flat" else 500)
        builder = Builder(tmp_path / name, 2000, 36, 32)
        for block in regions.split(700):
            builder.add(block, model.similarity.region_pooling(block).detach())
        builder.finish([str(k) for k in range(2000)], model, {"model": "m"})
    flat, inverted = (Index(tmp_path / name, model, vocab) for name in ("flat", "inverted"))
    assert inverted._inverted is not None and flat._inverted is None
    caption = flat.encode(SENTENCE)
    inverted._inverted.nprobe = inverted._inverted.nlist
    assert set(inverted.candidates(caption, 50)) == set(flat.candidates(caption, 50))
    assert inverted.images_for(caption, 5, 50) == flat.images_for(caption, 5, 50)
    # With a share of the lists, most of them.
    inverted._inverted.nprobe = inverted._inverted.nlist // 4
    assert len(set(inverted.candidates(caption, 50)) & set(flat.candidates(caption, 50))) > 25


def test_only_the_candidates_regions_are_read(searched, monkeypatch):
    model = model_from(load_checkpoint(searched / "m.pth.tar"))
    found = Index(searched / "index", model, Vocabulary.load(searched / "vocab/mine_vocab.json"))
    assert isinstance(found.regions, np.memmap)
    read = []

    class Watched:
        shape = found.regions.shape

        def __len__(self):
            return len(self.shape)

        def __getitem__(self, places):
            read.extend(places.tolist())
            return np.asarray(np.load(searched / "index/region_emb.npy")[places])

    found.regions = Watched()
    found.images_for(found.encode(SENTENCE), top=3, candidates=4)
    assert len(read) == 4


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), ("sentence",)),
        (("  ",), ("empty query",)),
        (("dog", "--image", "photos/picture1.png"), ("--image",)),
        (("dog", "--index", "nowhere"), ("nowhere", "no index")),
        (("--image", "nothing.png"), ("nothing.png",)),
        (("--image", "m.pth.tar"), ("m.pth.tar", "not a readable picture")),
        (
            ("--image", "photos/picture1.png", "--backbone", "./nonsense"),
            ("nonsense", "no such folder"),
        ),
        (("--image", "photos/picture1.png", "--grid", "3"), ("--grid 3",)),
        (("dog", "--model_path", "other.pth.tar"), ("another model",)),
    ],
)
def test_what_cannot_be_answered_is_said_in_one_line(searched, monkeypatch, arguments, words):
    monkeypatch.chdir(searched)
    other = torch.load("m.pth.tar", weights_only=True)
    other["model"]["image_encoder.fc.bias"] += 1
    torch.save(other, "other.pth.tar")
    opt = search.options().parse_args(["query", "--index", "index", *arguments])
    with pytest.raises(InputError) as error:
        opt.work(opt)
    assert all(word in str(error.value) for word in words), error.value


def test_a_refused_query_exits_with_2(searched):
    result = run(searched, "scripts/search.py", "query", "--index", "nowhere", "dog")
    refused(result, "nowhere", "no index")


@pytest.mark.parametrize(
    "name, content", [("index.json", b"{"), ("image_global.npy", b"no"), ("ids.txt", b"a\n")]
)
def test_a_damaged_index_is_refused(searched, tmp_path, name, content):
    shutil.copytree(searched / "index", tmp_path / "index")
    (tmp_path / "index" / name).write_bytes(content)
    model = model_from(load_checkpoint(searched / "m.pth.tar"))
    with pytest.raises(InputError):
        Index(tmp_path / "index", model, Vocabulary.load(searched / "vocab/mine_vocab.json"))


def test_an_index_that_is_there_is_not_overwritten(searched):
    before = (searched / "index/index.json").read_bytes()
    result = run(
        searched, "scripts/search.py", "index", "--model_path", "m.pth.tar", "--out", "index"
    )  # fmt: skip
    refused(result, "index", "is there already")
    assert (searched / "index/index.json").read_bytes() == before


def test_an_explanation_adds_up(searched):
    """Weights sum to 1, gates with the global one too, and the score is the model's."""
    model = model_from(load_checkpoint(searched / "m.pth.tar"))
    vocab = Vocabulary.load(searched / "vocab/mine_vocab.json")
    regions = torch.from_numpy(np.load(searched / "data/mine/test_ims.npy")[4])
    why = explain(model, vocab, regions, SENTENCE + " zebra")
    assert why.words == ["<start>", *SENTENCE.split(), "zebra", "<end>"]
    assert why.unknown == [word == "zebra" for word in why.words]
    assert why.attention.shape == (len(why.words), 36)
    assert why.attention.sum(1) == pytest.approx(np.ones(len(why.words)), abs=1e-5)
    assert why.gates.sum() + why.globl_gate == pytest.approx(1, abs=1e-5)
    assert why.region_weights.sum() == pytest.approx(1, abs=1e-5)
    assert why.word_weights.sum() == pytest.approx(1, abs=1e-5)
    assert why.score == pytest.approx(scores(searched, SENTENCE + " zebra")[4], abs=1e-5)


def test_attention_is_cross_attention(searched):
    model = model_from(load_checkpoint(searched / "m.pth.tar"))
    vocab = Vocabulary.load(searched / "vocab/mine_vocab.json")
    regions = torch.from_numpy(np.load(searched / "data/mine/test_ims.npy")[:1])
    why = explain(model, vocab, regions[0], SENTENCE)
    ids = vocab.encode(SENTENCE)
    with torch.inference_mode():
        words = model.text_encoder(torch.tensor([ids]), torch.tensor([len(ids)]))
        owner = torch.zeros(len(ids), dtype=torch.long)
        expected = cross_attention(model.image_encoder(regions), words, owner, 1)[0]
    assert why.attention == pytest.approx(expected.numpy(), abs=1e-6)


def test_extracted_and_stored_regions_are_one(searched):
    extractor = Extractor(Recipe("scenes", 6, None, None))
    regions = extractor([read_picture(searched / "photos/picture3.png")])[0]
    names = (searched / "data/mine/test_ids.txt").read_text().split()
    stored = np.load(searched / "data/mine/test_ims.npy")[names.index("picture3.png")]
    assert regions.numpy() == pytest.approx(stored, abs=1e-6)
