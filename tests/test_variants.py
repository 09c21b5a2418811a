"""The variants of the model and what it is compared with: each against a literal version of it."""

import json

import pytest
import torch
from conftest import GOLDENS, write_split
from test_commands import SMALL, refused, run
from torch.nn.functional import cosine_similarity, leaky_relu

import alignment
import similarity as similarity_module
from attention import l2norm, owner_of
from checkpoint import load_checkpoint, model_from
from data import PrecompDataset
from evaluation import encode_captions, encode_images, score
from explain import explain
from index import CandidateMap
from model import CHOICES, LHSC, triplet_loss
from scoring import Scorer, scorer
from similarity import AttendedCosine, MeanCosine, SimilarityEncoder
from vocab import build_from_data

D, S, R = 8, 5, 6
LENGTHS = torch.tensor([4, 2, 7, 3])
VARIANTS = {
    "both": {},
    "local": {"alignment": "local"},
    "global": {"alignment": "global"},
    "attended": {"global_image": "attended"},
    "attended, global": {"global_image": "attended", "alignment": "global"},
}


def encoder(**variant):
    """Random weights in double precision, no dropout."""
    encoder = SimilarityEncoder(D, S, R, 0.0, **variant).double()
    for parameter in encoder.parameters():
        torch.nn.init.uniform_(parameter, -0.6, 0.6)
    return encoder


def embeddings(n_images=5):
    regions = l2norm(torch.randn(n_images, R, D, dtype=torch.float64))
    words = l2norm(torch.randn(int(LENGTHS.sum()), D, dtype=torch.float64))
    return regions.requires_grad_(), words.requires_grad_()


def attended_regions(regions, words):
    """m_l of one image and one caption, by the equations: (L, D)."""
    affinity = leaky_relu(words @ regions.T, 0.1)  # (L, R)
    affinity = affinity / (affinity.norm(dim=0, keepdim=True) + 1e-8)
    return l2norm((9 * affinity).softmax(dim=1) @ regions)


def pooled(pooling, vectors):
    """The global vector of some vectors (n, D), without BatchNorm."""
    local, mean = torch.tanh(pooling.local(vectors)), torch.tanh(pooling.globl(vectors.mean(0)))
    return l2norm(pooling.common(local * mean).squeeze(1).softmax(0) @ vectors)


def literal(encoder, regions, words, alignment, global_image):
    """Image by image and caption by caption; BatchNorm of the gates one caption at a time."""
    image_global = encoder.region_pooling(regions) if encoder.region_pooling else None
    columns = []
    for caption in words.split(LENGTHS.tolist()):
        rows = []
        for i, image in enumerate(regions):
            m, parts = attended_regions(image, caption), []
            if alignment != "global":
                parts.append(l2norm(encoder.local_fc((m - caption).square())))
            if alignment != "local":
                attended = global_image == "attended"
                vector = pooled(encoder.attended_pooling, m) if attended else image_global[i]
                difference = vector - pooled(encoder.word_pooling, caption)
                parts.append(l2norm(encoder.globl_fc(difference.square()))[None])
            rows.append(torch.cat(parts))
        aligned = torch.stack(rows)  # (B, n, S)
        logits = encoder.gate_fc(aligned)
        gates = torch.nn.BatchNorm1d.forward(encoder.gate_bn, logits.view(-1, 1)).view_as(logits)
        gates = gates.sigmoid()
        gates = gates / (gates.sum(1, keepdim=True) + 1e-8)
        sim = l2norm((gates * aligned).sum(1))
        columns.append(torch.sigmoid(encoder.score_fc(sim)).squeeze(1))
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("training", [True, False])
def test_a_variant_is_its_equations(variant, training, monkeypatch):
    """Scores, every gradient, and BatchNorm's buffers; in several blocks of images."""
    monkeypatch.setitem(alignment.BLOCK_NUMEL, "cpu", 300)
    ours = encoder(**VARIANTS[variant]).train(training)
    plain = encoder(**VARIANTS[variant]).train(training)
    plain.load_state_dict(ours.state_dict())
    regions, words = embeddings()
    options = {"alignment": "both", "global_image": "regions"} | VARIANTS[variant]
    expected = literal(plain, regions, words, **options)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    grads = [regions.grad.clone(), words.grad.clone()]
    regions.grad = words.grad = None
    sims = ours(regions, words, LENGTHS)
    torch.testing.assert_close(sims, expected, rtol=1e-10, atol=1e-11)
    (sims * weight).sum().backward()
    torch.testing.assert_close([regions.grad, words.grad], grads, rtol=1e-7, atol=1e-9)
    theirs = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, theirs[name].grad, rtol=1e-7, atol=1e-9, msg=name
        )
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, dict(plain.named_buffers())[name], msg=name)


def test_an_attended_global_vector_depends_on_the_caption():
    model = encoder(global_image="attended").eval()
    regions, words = embeddings()
    weights = model.attention_weights(regions, words, owner_of(LENGTHS), len(LENGTHS))
    pooled_by, of = model.global_regions(weights, regions, regions.mean(1), LENGTHS)
    vectors = pooled_by @ of  # (B, C, D)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(5, 4, dtype=torch.float64))
    assert (vectors[:, 0] - vectors[:, 1]).norm(dim=-1).min() > 1e-3


def test_dropout_of_attended_pooling_draws_the_same_again_in_the_backward_pass(monkeypatch):
    model = SimilarityEncoder(D, S, R, 0.5, global_image="attended").double().train()
    regions, words = embeddings()

    def gradient():
        regions.grad = None
        torch.manual_seed(5)
        model(regions, words, LENGTHS).sum().backward()
        return regions.grad.clone()

    again = gradient()
    monkeypatch.setattr(similarity_module, "checkpoint", lambda f, *others, **options: f(*others))
    torch.testing.assert_close(again, gradient())


def test_scan_is_the_mean_cosine_of_words_and_what_they_attend_to(monkeypatch):
    monkeypatch.setitem(alignment.BLOCK_NUMEL, "cpu", 300)
    regions, words = embeddings()
    words = 3 * words.detach()  # --no_txtnorm: a cosine all the same
    expected = torch.tensor([
        [cosine_similarity(attended_regions(image, caption), caption).mean().item()
         for caption in words.split(LENGTHS.tolist())]
        for image in regions
    ], dtype=torch.float64)  # fmt: skip
    sims = AttendedCosine()(regions, words, LENGTHS)
    torch.testing.assert_close(sims, expected, rtol=1e-7, atol=1e-8)
    sims.sum().backward()
    assert torch.isfinite(regions.grad).all() and regions.grad.any()


def test_vse_is_the_cosine_of_means():
    regions, words = embeddings()
    means = torch.stack([caption.mean(0) for caption in words.split(LENGTHS.tolist())])
    expected = cosine_similarity(regions.mean(1)[:, None], means[None], dim=-1)
    sims = MeanCosine()(regions, words, LENGTHS)
    torch.testing.assert_close(sims, expected, rtol=1e-6, atol=1e-7)


MODELS = [
    *({"similarity": name} for name in CHOICES["similarity"]),
    *({"alignment": name} for name in ("local", "global")),
    {"global_image": "attended"},
    {"graph_layers": 0, "text_layers": 0},
]


@pytest.mark.parametrize("variant", MODELS, ids=lambda v: "-".join(map(str, v.values())))
def test_evaluation_is_the_model(tiny, variant):
    """Encoding and scoring a split by blocks gives what the model gives in one piece."""
    vocab = build_from_data(tiny / "data", "tiny")
    dataset = PrecompDataset(tiny / "data", "tiny", "test", vocab)
    model = LHSC(len(vocab), 8, 6, 16, 10, 8, **variant).eval()
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.4, 0.4)
    cpu = torch.device("cpu")
    images, captions = (f(model, dataset, cpu) for f in (encode_images, encode_captions))
    sims = torch.from_numpy(score(model, images, captions))
    (block,) = dataset.caption_blocks(torch.arange(len(dataset)), len(dataset))
    (regions,) = dataset.image_blocks(dataset.n_images)
    with torch.no_grad():
        torch.testing.assert_close(sims, model(regions, *block[:2]), rtol=0, atol=2e-6)
    assert sims.std() > 1e-4


def test_only_the_whole_model_has_the_fast_scorer():
    cpu = torch.device("cpu")
    kinds = [type(scorer(LHSC(20, 8, 6, 16, 10, 8, **v).similarity, cpu, torch.float32)) is Scorer
             for v in MODELS]  # fmt: skip
    assert kinds == [True, False, False, False, False, False, True]


@pytest.mark.parametrize("name", list(CHOICES))
def test_an_unknown_choice_is_refused(name):
    with pytest.raises(ValueError, match=name):
        LHSC(20, 8, 6, 16, 10, 8, **{name: "other"})


@pytest.mark.parametrize("variant", MODELS[1:], ids=lambda v: "-".join(map(str, v.values())))
def test_a_variant_has_no_parameter_it_does_not_use(variant):
    """But for the gate of one lone alignment, which is divided by itself."""
    model = LHSC(20, 8, 6, 16, 10, 8, **variant).train()
    for layer in model.image_encoder.graph.layers:
        torch.nn.init.ones_(layer.bn.weight)
    captions = torch.randint(4, 20, (5, 6))
    sims = model(torch.randn(5, 6, 8), captions, torch.tensor([6, 5, 3, 3, 2]))
    triplet_loss(sims, max_violation=False).backward()
    silent = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert {name for name in silent if "gate" not in name} == set()


# -- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_violation", [True, False])
def test_captions_of_one_image_can_be_left_out_as_negatives(max_violation):
    sims, index = torch.rand(6, 6, dtype=torch.float64), [3, 1, 3, 0, 1, 3]
    total = 0.0
    for i in range(6):
        for scores in (sims[i], sims[:, i]):
            costs = [max(0.0, 0.2 + scores[j].item() - sims[i, i].item())
                     for j in range(6) if index[j] != index[i]]  # fmt: skip
            total += max(costs) if max_violation else sum(costs)
    loss = triplet_loss(sims, 0.2, max_violation, torch.tensor(index))
    assert loss.item() == pytest.approx(total)
    assert loss < triplet_loss(sims, 0.2, max_violation=False)


# -- the command lines ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    ("--similarity", "scan", "--graph_layers", "0", "--text_layers", "0"),
    ("--similarity", "vse"),
    ("--alignment", "local", "--same_image", "ignored"),
    ("--global_image", "attended", "--recipe", "modern"),
], ids=lambda o: o[1])  # fmt: skip
def test_a_variant_is_trained_and_evaluated(tiny, options):
    result = run(tiny, "train.py", *SMALL, "--num_epochs", 1, "--log_step", 3, *options)
    assert result.returncode == 0, result.stderr
    test = run(tiny, "evaluation.py", "--save_metrics", "test.json", "--bootstrap", 100)
    assert test.returncode == 0, test.stderr
    metrics = json.loads((tiny / "test.json").read_text())
    assert metrics["rsum"] > 0 and "bootstrap" in metrics
    header = json.loads((tiny / "runs/LHSC/checkpoint/metrics.jsonl").read_text().splitlines()[0])
    model = model_from(load_checkpoint(tiny / "runs/LHSC/checkpoint/model_best.pth.tar"))
    assert header["parameters"] == sum(p.numel() for p in model.parameters())


def test_what_needs_local_alignments_says_so(tiny):
    result = run(tiny, "train.py", *SMALL, "--num_epochs", 1, "--similarity", "vse")
    assert result.returncode == 0, result.stderr
    refused(run(tiny, "evaluation.py", "--precision", "bf16"), "--precision")
    refused(run(tiny, "scripts/search.py", "index", "--out", "index"), "local alignments")
    assert not (tiny / "index").exists()
    vocab = build_from_data(tiny / "data", "tiny")
    for variant in ({"similarity": "scan"}, {"alignment": "global"}):
        model = LHSC(len(vocab), 8, 6, 16, 10, 8, **variant).eval()
        with pytest.raises(ValueError, match="local alignments"):
            explain(model, vocab, torch.randn(6, 8), "a dog")
        with pytest.raises(ValueError, match="local alignments"):
            CandidateMap.of(model.similarity)


@pytest.mark.parametrize("variant", [{"alignment": "local"}, {"global_image": "attended"}, {}],
                         ids=["local", "attended", "both"])  # fmt: skip
def test_explanations_add_up_for_variants(tiny, variant):
    vocab = build_from_data(tiny / "data", "tiny")
    model = LHSC(len(vocab), 8, 6, 16, 10, 8, **variant).eval()
    why = explain(model, vocab, torch.randn(6, 8), "a red dog")
    assert why.gates.sum() + why.globl_gate == pytest.approx(1, abs=1e-5)
    has_global = variant.get("alignment") != "local"
    assert why.region_weights.sum() == pytest.approx(float(has_global), abs=1e-5)
    assert why.word_weights.sum() == pytest.approx(float(has_global), abs=1e-5)


def test_checkpoints_from_before_the_variants_load(tiny):
    released = load_checkpoint(GOLDENS / "legacy_py2_a.pth.tar")
    assert released["opt"]["similarity"] == "lhsc" and released["opt"]["alignment"] == "both"
    run(tiny, "train.py", *SMALL, "--num_epochs", 1)
    path = tiny / "runs/LHSC/checkpoint/model_best.pth.tar"
    saved = torch.load(path, weights_only=True)
    for name in ("similarity", "alignment", "global_image"):
        del saved["opt"][name]
    torch.save(saved, path)
    assert model_from(load_checkpoint(path)).similarity.globl_fc is not None


def test_ablations_go_on_where_they_were(tmp_path):
    """The commands are real, their logs are kept, and what is done is left out."""
    for split, n_images in (("train", 30), ("dev", 10), ("test", 10)):
        write_split(tmp_path / "data" / "f8k_precomp", split, n_images)
    options = ("flickr8k", "--only", "vse", "--seeds", "4", "--results", "results")
    listed = run(tmp_path, "scripts/ablations.py", *options, "--list")
    assert "--similarity vse" in listed.stdout and "--seed 4" in listed.stdout
    done = run(tmp_path, "scripts/ablations.py", *options)
    assert done.returncode == 0, done.stderr
    kept = tmp_path / "results/flickr8k/vse-s4"
    assert sorted(file.name for file in kept.iterdir()) == ["metrics.jsonl", "test.json"]
    assert "0 of 0 runs" in run(tmp_path, "scripts/ablations.py", *options).stdout
    (kept / "test.json").unlink()  # as if stopped here
    again = run(tmp_path, "scripts/ablations.py", *options)
    assert again.returncode == 0 and "1 of 1 runs" in again.stdout, again.stderr
    assert "going on from" in (tmp_path / "runs/ablations/flickr8k/vse-s4/output.txt").read_text()
    refused(run(tmp_path, "scripts/ablations.py", "flickr8k", "--only", "sgr"), "sgr")
