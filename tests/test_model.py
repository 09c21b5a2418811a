"""The model by property, and against the official way of computing it (reference.py)."""

import pytest
import torch
from helpers import grads_of, state_of
from reference import OfficialLHSC, hinge_loss, score_loop
from torch.testing import assert_close

import evaluation
from attention import caption_index_of, l2norm, safe_sqrt, segment_softmax
from data import pad
from evaluation import score
from model import LHSC, EncodedCaptions, EncodedImages, contrastive_loss, triplet_loss

SIZES = {"img_dim": 9, "embed_size": 8, "sim_dim": 5, "word_dim": 7, "vocab_size": 20}
NO_DROPOUT = {"embed_dropout": 0.0, "pool_dropout": 0.0}


def pair(num_regions=6, padding="masked"):
    """The same random double-precision weights in the official loop and in our model."""
    none = {"embed_dropout": 0.0, "pooling_dropout": 0.0}
    official = OfficialLHSC(**SIZES, **none, num_regions=num_regions, masked=padding == "masked")
    for parameter in official.parameters():  # also what starts at zero
        torch.nn.init.uniform_(parameter, -0.6, 0.6)
    for buffer in official.buffers():  # statistics as after training
        if buffer.is_floating_point():
            torch.nn.init.uniform_(buffer, 0.2, 0.6)
    model = LHSC(**SIZES, num_regions=num_regions, padding=padding, **NO_DROPOUT)
    model.load_state_dict(state_of(official))
    return official.double(), model.double()


def batch(lengths, n_images=None, num_regions=6, dtype=torch.float64):
    """Random images and captions; lengths need not be sorted."""
    captions, lengths = pad([torch.randint(4, 20, (n,)) for n in lengths])
    images = torch.randn(n_images or len(lengths), num_regions, 9, dtype=dtype)
    return images, captions, lengths


@pytest.mark.parametrize("padding", ["masked", "official"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("lengths, n_images, num_regions", [
    ([40, 31, 22, 13, 9, 4, 2, 2], 8, 6), ([5, 5, 5], 3, 2), ([2], 4, 6), ([3, 11, 6], 2, 1),
])  # fmt: skip
def test_the_model_is_the_official_loop(lengths, n_images, num_regions, training, padding):
    """Scores, every gradient and every buffer, in double precision."""
    official, model = (part.train(training) for part in pair(num_regions, padding))
    data = batch(lengths, n_images, num_regions)
    expected, ours = official(*data), model(*data)
    assert_close(ours, expected, rtol=1e-11, atol=1e-12)
    weight = torch.randn_like(ours)
    for sims in (expected, ours):
        (sims * weight).sum().backward()
    assert_close(grads_of(model), grads_of(official), rtol=1e-8, atol=1e-11)
    assert set(grads_of(model)) == {name for name, _ in model.named_parameters()}
    assert_close(state_of(model), state_of(official), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("padding", ["masked", "official"])
def test_a_caption_depends_on_its_neighbours_only_with_the_official_padding(padding):
    _, model = pair(padding=padding)
    images, captions, lengths = batch([30, 6, 2])
    alone = images, captions[1:2, :6], lengths[1:2]
    with torch.no_grad():
        difference = model.eval()(*alone) - model(images, captions, lengths)[:, 1:2]
    largest = difference.abs().max()
    assert largest < 1e-12 if padding == "masked" else largest > 1e-4


@pytest.mark.parametrize("layers", [0, 1, 6])
@pytest.mark.parametrize("normalised", [True, False])
def test_any_number_of_layers_and_regions(layers, normalised):
    model = LHSC(
        **SIZES, num_regions=3, graph_layers=layers, text_layers=layers, num_layers=2, bi_gru=False,
        no_imgnorm=not normalised, no_txtnorm=not normalised,
    )  # fmt: skip
    images, captions, lengths = batch([4, 2], num_regions=3, dtype=torch.float32)
    assert model(images, captions, lengths).shape == (2, 2)
    assert len(model.image_encoder.graph.layers) == len(model.text_encoder.self_attention) == layers
    for vectors in (model.image_encoder(images), model.text_encoder(captions, lengths)):
        norm = vectors.norm(dim=-1)
        assert torch.allclose(norm, torch.ones_like(norm)) == normalised


def test_a_fresh_model_has_the_official_initial_values_and_dropout():
    sizes = {"img_dim": 64, "embed_size": 48, "sim_dim": 64, "word_dim": 30, "vocab_size": 500}
    model, official = LHSC(**sizes), OfficialLHSC(**sizes)
    weight, bound = model.image_encoder.fc.weight, (6 / (64 + 48)) ** 0.5
    assert 0.95 * bound < weight.abs().max() <= bound
    expected = state_of(official)
    for name, tensor in model.state_dict().items():
        if tensor.numel() < 10 or tensor.std() == 0:  # constants, or too few to compare
            assert tensor.any() == expected[name].any(), name
        for found, other in ((tensor, expected[name]), (expected[name], tensor)):
            assert found.abs().max() <= 1.2 * other.abs().max(), name
    rates = [
        sorted({m.p for m in part.modules() if isinstance(m, torch.nn.Dropout)})
        for part in (model.text_encoder, official.txt_enc, model.similarity, official.sim_enc)
    ]
    assert rates == [[0.0, 0.4], [0.0, 0.4], [0.4], [0.4]]


def test_l2norm_adds_eps_to_the_length_and_has_gradient_0_at_0():
    x = torch.tensor([3e-8, 4e-8], dtype=torch.float64)
    assert_close(l2norm(x), x / 6e-8)  # F.normalize would divide by 5e-8
    zero = torch.zeros(2, 3, requires_grad=True)
    (l2norm(zero).sum() + safe_sqrt(zero).sum()).backward()
    assert not zero.grad.any() and not l2norm(zero).any()


def test_zero_regions_and_equal_words_give_finite_gradients():
    """Images with fewer boxes come padded with zero rows; l2norm keeps them zero."""
    model = LHSC(**SIZES, num_regions=6, **NO_DROPOUT).train()
    images, captions, lengths = batch([5, 3, 3], dtype=torch.float32)
    images[0, 4:] = 0
    captions[1] = captions[2]
    triplet_loss(model(images, captions, lengths)).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_alignments_alone_get_the_same_gradients():
    """With frozen encoders the backward leaves out what only they need."""
    model = LHSC(**SIZES, num_regions=6, **NO_DROPOUT).train()
    data, grads = batch([5, 3, 3], dtype=torch.float32), []
    for frozen in (False, True):
        model.requires_grad_(not frozen).similarity.requires_grad_(True)
        model.zero_grad()
        triplet_loss(model(*data)).backward()
        grads.append({name: p.grad for name, p in model.similarity.named_parameters()})
    assert_close(*grads, rtol=0, atol=0)
    assert all(p.grad is None for p in model.image_encoder.parameters())


def test_segment_softmax_is_softmax_within_each_caption():
    lengths = torch.tensor([3, 1, 4])
    logits = 1000 * torch.randn(8, dtype=torch.float64)  # would overflow without the peak
    ours = segment_softmax(logits, caption_index_of(lengths), 3)
    assert_close(ours, torch.cat([part.softmax(0) for part in logits.split(lengths.tolist())]))


@pytest.mark.parametrize("max_violation", [True, False])
def test_the_triplet_loss_is_the_loop_over_wrong_answers(max_violation):
    sims = torch.rand(6, 6, dtype=torch.float64)
    expected = hinge_loss(sims, 0.3, max_violation)
    assert_close(triplet_loss(sims, 0.3, max_violation), expected)


def test_the_contrastive_loss_is_cross_entropy_over_other_images():
    sims, images = torch.rand(5, 5, dtype=torch.float64), [3, 1, 3, 0, 1]
    expected = 0.0
    for i in range(5):
        wrong = [j for j in range(5) if images[j] != images[i]]
        for scores in (sims[i, [i, *wrong]], sims[[i, *wrong], i]):
            expected -= (scores / 0.1).log_softmax(0)[0]
    assert_close(contrastive_loss(sims, torch.tensor(images), 0.1), expected)


# -- scoring for inference -------------------------------------------------------------------------

LENGTHS = torch.tensor([2, 9, 40, 3, 3, 17, 81, 5, 12, 2, 30])


@pytest.mark.parametrize("chunk", [(16, 512), (1, 1), (3, 50), (99, 9999)])
def test_scoring_is_the_official_loop_in_any_chunks(chunk, monkeypatch):
    """Seven images, eleven captions; a region and some words are zero.

    No more images and words than a chunk has are scored at once, unless a caption is longer.
    """
    monkeypatch.setitem(evaluation.SCORE_CHUNK, "cpu", chunk)
    official, model = (part.float().eval() for part in pair(num_regions=36))
    similarity, sizes, scored = model.similarity, [], model.similarity.score
    regions, words = l2norm(torch.randn(7, 36, 8)), l2norm(torch.randn(int(LENGTHS.sum()), 8))
    regions[2, 5] = words[5:9] = 0

    def noted(images, captions, dtype):
        sizes.append((len(images.region_emb), len(captions.word_emb)))
        assert len(captions.word_emb) <= chunk[1] or len(captions.lengths) == 1
        return scored(images, captions, dtype)

    monkeypatch.setattr(similarity, "score", noted)
    padded = torch.nn.utils.rnn.pad_sequence(words.split(LENGTHS.tolist()), batch_first=True)
    with torch.no_grad():
        expected = score_loop(official.sim_enc, regions, padded, LENGTHS)
        images = EncodedImages(regions, similarity.image_global(regions))
        captions = EncodedCaptions(words, similarity.caption_global(words, LENGTHS), LENGTHS)
    sims = torch.from_numpy(score(model, images, captions))
    assert_close(sims, expected, rtol=0, atol=1e-6)
    assert expected.std() > 1e-2  # or the comparison says nothing
    assert max(n_images for n_images, _ in sizes) == min(chunk[0], 7)
    assert sum(n_images * n_words for n_images, n_words in sizes) == 7 * LENGTHS.sum()
