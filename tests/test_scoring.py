"""Scoring for inference: as the official loop, whatever the chunks."""

import pytest
import torch
from helpers import state_of
from reference import OfficialLHSC, score_loop
from torch.testing import assert_close

import evaluation
from attention import l2norm
from evaluation import score
from model import LHSC, EncodedCaptions, EncodedImages

SIZES = {"vocab_size": 20, "img_dim": 9, "embed_size": 96, "sim_dim": 32, "word_dim": 7}
LENGTHS = torch.tensor([2, 9, 40, 3, 3, 17, 81, 5, 12, 2, 30])


@pytest.fixture(scope="module")
def official():
    """Random weights that tell images and captions apart, and statistics as after training."""
    torch.manual_seed(1)
    official = OfficialLHSC(**SIZES).eval()
    for name, tensor in official.state_dict().items():
        if tensor.dtype == torch.float32 and ("running" in name or "bias" in name):
            tensor.uniform_(0.2, 0.6)
    for fc in (official.sim_enc.sim_tranloc_w, official.sim_enc.sim_tranglo_w):
        fc.weight.data *= 50
    official.sim_enc.sim_eval_w.weight.data *= 3
    return official


@pytest.fixture
def model(official):
    model = LHSC(**SIZES).eval()
    model.load_state_dict(state_of(official))
    return model


@pytest.fixture
def encoded(model):
    """Seven images, eleven captions; a region and some words are zero.

    Regions and words share a direction, as they do in a trained model.
    """
    common = torch.randn(96)
    regions = l2norm(torch.randn(7, 36, 96) + common)
    words = l2norm(torch.randn(int(LENGTHS.sum()), 96) + common)
    regions[2, 5] = words[5:9] = 0
    with torch.no_grad():
        return (
            EncodedImages(regions, model.similarity.image_global(regions)),
            EncodedCaptions(words, model.similarity.caption_global(words, LENGTHS), LENGTHS),
        )


@pytest.mark.parametrize("chunk", [(16, 512), (1, 1), (3, 50), (99, 9999)])
def test_scoring_is_the_official_loop_whatever_the_chunks(
    official, model, encoded, chunk, monkeypatch
):
    monkeypatch.setitem(evaluation.SCORE_CHUNK, "cpu", chunk)
    images, captions = encoded
    words = captions.word_emb.split(LENGTHS.tolist())
    words = torch.nn.utils.rnn.pad_sequence(list(words), batch_first=True)
    with torch.no_grad():
        expected = score_loop(official.sim_enc, images.region_emb, words, LENGTHS)
    sims = score(model, images, captions)
    assert_close(torch.from_numpy(sims), expected, rtol=0, atol=1e-6)
    assert expected.std() > 1e-2  # or the comparison says nothing


def test_products_in_bfloat16_stay_close(model, encoded):
    """Eight bits of mantissa: scores move by less than a tenth of their spread."""
    exact, rounded = score(model, *encoded), score(model, *encoded, torch.bfloat16)
    assert exact.dtype == rounded.dtype == "float32"
    assert 0 < abs(exact - rounded).max() < 0.1 * exact.std()


def test_memory_is_that_of_one_chunk(model, encoded, monkeypatch):
    """No more images and words than allowed are scored at once, unless a caption is longer."""
    monkeypatch.setitem(evaluation.SCORE_CHUNK, "cpu", (3, 50))
    sizes, scored = [], model.similarity.score

    def noted(images, captions, dtype):
        sizes.append((len(images.region_emb), len(captions.word_emb)))
        assert len(captions.word_emb) <= 50 or len(captions.lengths) == 1
        return scored(images, captions, dtype)

    monkeypatch.setattr(model.similarity, "score", noted)
    score(model, *encoded)
    assert max(n_images for n_images, _ in sizes) == 3
    assert sum(n_images * n_words for n_images, n_words in sizes) == 7 * LENGTHS.sum()
