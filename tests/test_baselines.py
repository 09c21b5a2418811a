"""LHSC and what it is compared with: each against a literal version of its equations."""

import json

import pytest
import torch
from conftest import RUN, SMALL, call, succeeded
from helpers import WITHOUT_GRADIENT, grads_of, state_of
from reference import OfficialSimilarity, cross_attention, score_loop
from torch.nn.functional import cosine_similarity
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close

import attention
import evaluation
import train
from attention import l2norm
from baselines import SIMILARITIES, build_model, with_local_alignments
from checkpoint import load_checkpoint, model_from, rename_official
from data import PrecompDataset
from evaluation import encode_captions, encode_images, score
from model import EncodedCaptions, EncodedImages, triplet_loss
from utils import InputError
from vocab import build_from_data

D, S, R = 8, 5, 6
LENGTHS = torch.tensor([4, 2, 7, 3])
ALIGNING = ("lhsc", "local", "attended")
SIZES = {"img_dim": 8, "num_regions": 6, "embed_size": 16, "word_dim": 10, "sim_dim": 8}


def randomised(module, bound=0.6):
    """The same with random weights, in double precision."""
    for parameter in module.parameters():
        torch.nn.init.uniform_(parameter, -bound, bound)
    return module.double()


def similarity(name, pool_dropout=0.0):
    return randomised(SIMILARITIES[name](D, S, R, pool_dropout))


def embeddings(n_images=5):
    """Regions of length 1; words of any length (--no_txtnorm)."""
    regions = l2norm(torch.randn(n_images, R, D, dtype=torch.float64))
    words = torch.randn(int(LENGTHS.sum()), D, dtype=torch.float64)
    return regions.requires_grad_(), words.requires_grad_()


def ours(values):
    """Parameters or gradients of tests/reference.py's similarity under our names."""
    values = rename_official({}, {}, values)
    return {name.removeprefix("similarity."): value for name, value in values.items()}


@pytest.mark.parametrize("name", ["lhsc", "local", "global", "attended"])
@pytest.mark.parametrize("training", [True, False])
def test_lhsc_and_its_ablations_are_the_official_loop(name, training, monkeypatch):
    """Scores, every gradient, and BatchNorm's buffers; in several chunks."""
    monkeypatch.setitem(attention.CHUNK_NUMEL, "cpu", 300)
    official = randomised(OfficialSimilarity(D, S, R, 0.0, name)).train(training)
    model = similarity(name).train(training)
    model.load_state_dict({n: ours(official.state_dict())[n] for n in model.state_dict()})
    inputs = regions, words = embeddings()
    padded = pad_sequence(words.split(LENGTHS.tolist()), batch_first=True)
    sims = model(regions, words, LENGTHS), score_loop(official, regions, padded, LENGTHS)
    assert_close(*sims, rtol=1e-10, atol=1e-11)
    weight = torch.randn_like(sims[0])
    losses = [(x * weight).sum() for x in sims]
    grads = [torch.autograd.grad(loss, inputs, retain_graph=True) for loss in losses]
    assert_close(*grads, rtol=1e-7, atol=1e-9)
    for loss in losses:
        loss.backward()
    assert_close(grads_of(model), ours(grads_of(official)), rtol=1e-7, atol=1e-9)
    assert_close(state_of(model), {n: ours(official.state_dict())[n] for n in state_of(model)})


@pytest.mark.parametrize("name", ["scan", "vse"])
def test_scan_and_vse_are_cosines(name, monkeypatch):
    """SCAN: the mean over words of that with the attended regions; VSE++: that of the means."""
    monkeypatch.setitem(attention.CHUNK_NUMEL, "cpu", 300)
    inputs, columns = embeddings(), []
    for caption in inputs[1].split(LENGTHS.tolist()):
        words = caption.expand(5, -1, -1)  # (B, L, D)
        columns.append({
            "scan": cosine_similarity(cross_attention(words, inputs[0]), words, dim=2).mean(1),
            "vse": cosine_similarity(inputs[0].mean(1), caption.mean(0), dim=1),
        }[name])  # fmt: skip
    sims = similarity(name)(*inputs, LENGTHS), torch.stack(columns, dim=1)
    assert_close(*sims, rtol=1e-6, atol=1e-7)
    weight = torch.randn_like(sims[0])
    grads = [torch.autograd.grad((x * weight).sum(), inputs) for x in sims]
    assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_dropout_of_attended_pooling_draws_the_same_again_in_the_backward_pass(monkeypatch):
    """The gradient is that of the scores of this seed, by finite differences."""
    monkeypatch.setitem(attention.CHUNK_NUMEL, "cpu", 300)
    model = similarity("attended", pool_dropout=0.5).train()
    regions, words = embeddings()
    direction = 1e-6 * torch.randn_like(regions)

    def total(regions):
        torch.manual_seed(5)
        return model(regions, words, LENGTHS).sum()

    total(regions).backward()
    found = (regions.grad * direction).sum()
    difference = (total(regions + direction) - total(regions - direction)) / 2
    assert_close(found, difference, rtol=1e-4, atol=0)
    torch.manual_seed(6)
    assert abs(model(regions, words, LENGTHS).sum() - total(regions)) > 1e-6


@pytest.mark.parametrize("name", ALIGNING)
def test_gates_of_a_caption_sum_to_1(name):
    model = similarity(name).eval()
    regions, words = embeddings()
    images = EncodedImages(regions, model.image_global(regions))
    captions = EncodedCaptions(words, model.caption_global(words, LENGTHS), LENGTHS)
    found = model.alignments(images, captions)
    gates = torch.stack([x.sum(1) for x in found.local_gate.split(LENGTHS.tolist(), 1)], dim=1)
    assert (found.global_ is None) == (found.global_gate is None) == (name == "local")
    if name != "local":
        gates = gates + found.global_gate
    assert_close(gates, torch.ones_like(gates))
    norm = (found.weights @ regions).norm(dim=-1)
    assert_close(norm, torch.ones_like(norm))


@pytest.mark.parametrize("name, options", [
    *((name, {}) for name in SIMILARITIES),
    ("lhsc", {"graph_layers": 0, "text_layers": 0}),
    ("lhsc", {"padding": "official"}),
])  # fmt: skip
def test_evaluation_is_the_model(tiny, name, options, monkeypatch):
    """Encoding and scoring a split by parts gives what the model gives, in file order.

    By default captions are encoded sorted by length. With the official padding it matters which
    captions share a batch: they stay as in the file.
    """
    monkeypatch.setattr(evaluation, "ENCODE_BATCH", 7)
    monkeypatch.setitem(evaluation.SCORE_CHUNK, "cpu", (3, 40))
    vocab, cpu = build_from_data(tiny / "data", "tiny"), torch.device("cpu")
    dataset = PrecompDataset(tiny / "data", "tiny", "test", vocab)
    model = build_model(name, vocab_size=len(vocab), **SIZES, **options).eval()
    model = randomised(model, 0.4).float()
    images, captions = (f(model, dataset, cpu) for f in (encode_images, encode_captions))
    sims = torch.from_numpy(score(model, images, captions))
    (regions,) = dataset.image_blocks(dataset.n_images)
    blocks = dataset.caption_blocks(torch.arange(len(dataset)), 7)
    with torch.no_grad():
        expected = [model(regions, words, lengths) for words, lengths, _ in blocks]
    assert_close(sims, torch.cat(expected, dim=1), rtol=0, atol=3e-6)
    assert sims.std() > 1e-3


@pytest.mark.parametrize("name", SIMILARITIES)
def test_every_parameter_gets_a_gradient(name):
    """But for the gate of one lone alignment, which is divided by itself."""
    model = build_model(name, vocab_size=20, **SIZES).train()
    for layer in model.image_encoder.graph.layers:  # they start at zero, which stops gradients
        torch.nn.init.ones_(layer.bn.weight)
    sims = model(torch.randn(5, 6, 8), torch.randint(4, 20, (5, 6)), torch.tensor([6, 5, 3, 3, 2]))
    triplet_loss(sims, max_violation=False).backward()
    found = {n for n, grad in grads_of(model).items() if grad.any()}
    silent = {n for n, _ in model.named_parameters() if not n.endswith(WITHOUT_GRADIENT)} - found
    assert {n for n in silent if name != "global" or "gate" not in n} == set()


@pytest.mark.parametrize("name", SIMILARITIES)
def test_what_needs_local_alignments_says_so(name):
    model = similarity(name)
    if name in ALIGNING:
        assert with_local_alignments(model) is model
        return
    with pytest.raises(InputError, match="--similarity lhsc, local or attended"):
        with_local_alignments(model)


@pytest.mark.parametrize("name", SIMILARITIES)
def test_a_run_in_mixed_precision(tiny, name):
    """Its checkpoint is chosen by float32 scores, those that evaluation.py finds."""
    options = ["--num_epochs", 1, "--similarity", name, "--precision", "bf16"]
    succeeded(call(tiny, train.main, *SMALL, *options))
    path = tiny / RUN / "model_best.pth.tar"
    saved = load_checkpoint(path)
    for test, option in (("dev", "--precision=fp32"), ("test", "--precision=bf16")):
        save = "--save_metrics", f"{test}.json"
        succeeded(call(tiny, evaluation.main, "--split", test, option, *save))
    assert json.loads((tiny / "dev.json").read_text())["rsum"] == pytest.approx(saved["best_rsum"])
    header = json.loads(path.with_name("metrics.jsonl").read_text().splitlines()[0])
    model = model_from(saved)
    assert isinstance(model.similarity, SIMILARITIES[name])
    assert header["parameters"] == sum(p.numel() for p in model.parameters())


# -- checkpoints ----------------------------------------------------------------------------------

@pytest.fixture
def opt():
    return SIZES | {
        "vocab_size": 20, "num_layers": 1, "bi_gru": True, "graph_layers": 2, "text_layers": 2,
        "drop_out": 0.0, "embed_dropout": 0.4, "pool_dropout": 0.4, "no_imgnorm": False,
        "no_txtnorm": False,
    }  # fmt: skip


@pytest.mark.parametrize("option, value", [("similarity", "sgr"), ("padding", "none")])
def test_unknown_choices_in_a_checkpoint_are_refused(opt, option, value):
    state = build_model("vse", **opt).state_dict()
    opt = opt | {"similarity": "vse", "padding": "masked"}
    model_from({"model": state, "opt": opt})
    with pytest.raises(InputError, match=f"unknown .*{value}"):
        model_from({"model": state, "opt": opt | {option: value}})
