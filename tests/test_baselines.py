"""LHSC and what it is compared with: each against a literal version of its equations."""

import json

import cca
import pytest
import torch
from conftest import RUN, SMALL, call, load_split, log_of, succeeded
from helpers import grads_of, state_of
from reference import OfficialSimilarity, cross_attention, score_loop
from torch.nn.functional import cosine_similarity
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close

import attention
import evaluation
import train
from attention import l2norm
from baselines import SIMILARITIES, build_model
from checkpoint import load_checkpoint, model_from, rename_official
from evaluation import encode_captions, encode_images, score

D, S, R = 8, 5, 6
LENGTHS = torch.tensor([4, 2, 7, 3])
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
        scan = cosine_similarity(cross_attention(words, inputs[0]), words, dim=2).mean(1)
        vse = cosine_similarity(inputs[0].mean(1), caption.mean(0), dim=1)
        columns.append({"scan": scan, "vse": vse}[name])
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


@pytest.mark.parametrize("name, options", [
    *((name, {}) for name in SIMILARITIES),
    ("lhsc", {"graph_layers": 0, "text_layers": 0}),
    ("lhsc", {"padding": "official"}),
])  # fmt: skip
def test_evaluation_is_the_model(tiny, name, options, monkeypatch):
    """Encoding and scoring a split by parts gives what the model gives, in file order."""
    assert evaluation.ENCODE_BATCH == 100  # the official code's
    monkeypatch.setattr(evaluation, "ENCODE_BATCH", 7)
    monkeypatch.setitem(evaluation.SCORE_CHUNK, "cpu", (3, 40))
    (dataset, vocab), cpu = load_split(tiny, "test"), torch.device("cpu")
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
def test_a_run_in_mixed_precision(tiny, name):
    """Its checkpoint is chosen by float32 scores, those that evaluation.py finds."""
    options = ["--num_epochs", 1, "--similarity", name, "--precision", "bf16"]
    succeeded(call(tiny, train.main, *SMALL, *options))
    saved = load_checkpoint(tiny / RUN / "model_best.pth.tar")
    for test, option in (("dev", "--precision=fp32"), ("test", "--precision=bf16")):
        save = "--save_metrics", f"{test}.json"
        succeeded(call(tiny, evaluation.main, "--split", test, option, *save))
    assert json.loads((tiny / "dev.json").read_text())["rsum"] == pytest.approx(saved["best_rsum"])
    model = model_from(saved)
    assert isinstance(model.similarity, SIMILARITIES[name])
    assert log_of(tiny)[0]["parameters"] == sum(p.numel() for p in model.parameters())


# -- the linear baseline, canonical correlation analysis -------------------------------------------


def test_projections_are_uncorrelated_but_for_their_partner(tiny, monkeypatch):
    """Of the pairs x (C, img_dim), y (C, V)."""
    monkeypatch.setattr(cca, "BLOCK", 7)  # several, the last a smaller one
    dataset, vocab = load_split(tiny, "train")
    fitted = cca.CCA(dataset, len(vocab))
    x = torch.stack([dataset[k][0].mean(0).double() for k in range(len(dataset))])
    counts = [dataset.words(k).bincount(minlength=len(vocab)) for k in range(len(dataset))]
    y = torch.stack(counts).double().log1p() * fitted.idf
    y = y / y.norm(dim=1, keepdim=True)
    x_map, y_map = fitted.maps(1e-9)
    found, k = torch.corrcoef(torch.cat([x @ x_map, y @ y_map], 1).T), x.shape[1]
    assert_close(found[:k, :k], torch.eye(k).double(), rtol=0, atol=1e-4)
    correlations = found[:k, k:].diagonal()
    assert_close(found[:k, k:], correlations.diag(), rtol=0, atol=1e-4)
    assert 0.8 < correlations[0] < 1 and (correlations.diff() <= 0).all()


@pytest.mark.parametrize("beta", [0, 20])
def test_the_command_tests_what_is_best_on_dev(tiny, beta):
    options = ["--data_name", "tiny", "--json", "cca.json", "--qb_norm", beta]
    lines = succeeded(call(tiny, cca.main, *options))
    found = json.loads((tiny / "cca.json").read_text())
    tried = [float(line.split()[-1]) for line in lines.splitlines() if "shrink" in line]
    assert found["dev_rsum"] == pytest.approx(max(tried), abs=0.05)
    low, high = found["bootstrap"]["rsum"]
    assert 100 < low <= found["rsum"] <= high
