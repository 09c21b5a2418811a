"""Scoring for inference against the model's own equations and the released loop."""

from types import SimpleNamespace

import pytest
import torch
from reference import ReleasedSimilarity, score_loop

from attention import l2norm
from checkpoint import rename_released
from evaluation import encode_captions, encode_images
from graph_layers import RegionGraph
from model import LHSC
from scoring import BlockSize, Scorer, caption_chunks
from similarity import EncodedCaptions, EncodedImages, SimilarityEncoder

D, S, R = 96, 32, 36
LENGTHS = [2, 9, 40, 3, 3, 17, 81, 5, 12, 2, 30]


@pytest.fixture(scope="module")
def similarity():
    """Random weights, and statistics as after training."""
    torch.manual_seed(1)
    similarity = SimilarityEncoder(D, S, R).eval()
    for name, tensor in similarity.state_dict().items():
        if "bn" in name or "bias" in name:
            tensor.copy_(0.4 * torch.rand(tensor.shape) + 0.2)
    for fc in (similarity.local_fc, similarity.globl_fc):
        fc.weight.data *= 50
    similarity.score_fc.weight.data *= 3
    return similarity


def encoded(similarity, n_images=7, lengths=LENGTHS):
    lengths = torch.tensor(lengths)
    # Regions and words share a direction, as they do in a trained model.
    common = torch.randn(D)
    regions = l2norm(torch.randn(n_images, R, D) + common)
    words = l2norm(torch.randn(int(lengths.sum()), D) + common)
    with torch.no_grad():
        return (
            EncodedImages(regions, similarity.region_pooling(regions)),
            EncodedCaptions(words, similarity.word_pooling(words, lengths), lengths),
        )


def scores(scorer, images, captions):
    sims = torch.full((len(images.region_emb), len(captions.lengths)), torch.nan)
    for chunk, tile in scorer.tiles(images, captions):
        assert tile.dtype == torch.float32
        sims[:, chunk] = tile
    return sims


@pytest.mark.parametrize(
    "block", [(512, 16, 2**20), (1, 1, 1), (50, 3, 2 * 50 * D), (64, 4, 9999), (9999, 99, 2**30)]
)
def test_scoring_is_the_model_whatever_the_blocks(similarity, block):
    images, captions = encoded(similarity)
    with torch.no_grad():
        expected = similarity.score(images, captions)
    ours = scores(Scorer(similarity, block=BlockSize(*block)), images, captions)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    assert expected.std() > 1e-3  # or the comparison says nothing


def test_scoring_is_the_released_loop(similarity):
    reference = ReleasedSimilarity(D, S, R).eval()
    renamed = rename_released({}, {}, reference.state_dict())
    similarity = SimilarityEncoder(D, S, R).eval()
    similarity.load_state_dict({k.removeprefix("similarity."): v for k, v in renamed.items()})
    images, captions = encoded(similarity)
    words = torch.nn.utils.rnn.pad_sequence(
        captions.word_emb.split(captions.lengths.tolist()), batch_first=True
    )
    with torch.no_grad():
        expected = score_loop(reference, images.region_emb, words, captions.lengths)
    ours = scores(Scorer(similarity), images, captions)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    assert (ours.argsort(0) == expected.argsort(0)).all()
    assert (ours.argsort(1) == expected.argsort(1)).all()


def test_bfloat16_products_stay_close(similarity):
    """Eight bits of mantissa: scores move by less than a tenth of their spread."""
    images, captions = encoded(similarity)
    exact = scores(Scorer(similarity), images, captions)
    rounded = scores(Scorer(similarity, torch.bfloat16), images, captions)
    assert not torch.equal(exact, rounded)
    assert (exact - rounded).abs().max() < 0.1 * exact.std()


def test_zero_vectors_score_as_in_the_model(similarity):
    images, captions = encoded(similarity)
    images.region_emb[2] = 0
    captions.word_emb[5:9] = 0
    with torch.no_grad():
        expected = similarity.score(images, captions)
    ours = scores(Scorer(similarity), images, captions)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("n_words", "sizes"), [(1, [1] * 5), (12, [2, 1, 2]), (999, [5])])
def test_chunks_hold_every_caption_once(n_words, sizes):
    chunks = caption_chunks(torch.tensor([5, 6, 30, 4, 8]), n_words)
    assert [chunk.stop - chunk.start for chunk in chunks] == sizes
    assert [i for chunk in chunks for i in range(5)[chunk]] == list(range(5))


def random_graph(dtype):
    graph = RegionGraph(24, 3).to(dtype).eval()
    for name, tensor in graph.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape) - (0 if "var" in name else 0.5))
    return graph


def test_folded_graph_layers_are_the_layers():
    """Two products instead of six, BatchNorm included; in double precision."""
    graph, regions = random_graph(torch.float64), torch.randn(5, 7, 24, dtype=torch.float64)
    with torch.no_grad():
        expected, folded = graph(regions), graph.folded()(regions)
    torch.testing.assert_close(folded, expected, rtol=1e-10, atol=1e-10)
    assert (expected - regions).abs().max() > 0.1  # the layers do something


def test_a_folded_encoder_leaves_the_model_alone():
    model = LHSC(20, img_dim=9, embed_size=8, sim_dim=5, word_dim=7, num_regions=6).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.image_encoder.folded()(torch.randn(2, 6, 9))
    assert isinstance(model.image_encoder.graph, RegionGraph)
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())


class Captions:
    """What encode_captions needs of a data set."""

    def __init__(self, lengths):
        self.words = [torch.randint(4, 20, (n,)) for n in lengths]
        self.lengths = torch.tensor(lengths)

    def __len__(self):
        return len(self.words)

    def caption_blocks(self, order, size):
        for block in order.split(size):
            captions = [self.words[i] for i in block]
            yield torch.nn.utils.rnn.pad_sequence(captions, True), self.lengths[block], block


@pytest.mark.parametrize("padding", ["masked", "released"])
def test_captions_are_encoded_in_file_order_whatever_the_batches(padding):
    """Sorted by length for speed in the default mode; the released padding keeps its batches."""
    lengths = torch.randint(2, 30, (230,)).tolist()
    dataset = Captions(lengths)
    model = LHSC(20, img_dim=9, embed_size=8, sim_dim=5, word_dim=7, padding=padding).eval()
    encoded = encode_captions(model, dataset, torch.device("cpu"))
    start = 0
    for block in torch.arange(230).split(100):
        captions = torch.nn.utils.rnn.pad_sequence([dataset.words[i] for i in block], True)
        with torch.no_grad():
            words = model.text_encoder(captions, dataset.lengths[block])
            pooled = model.similarity.word_pooling(words, dataset.lengths[block])
        torch.testing.assert_close(encoded.word_emb[start : start + len(words)], words)
        torch.testing.assert_close(encoded.caption_global[block], pooled)
        start += len(words)


def test_images_are_encoded_once_each():
    model = LHSC(20, img_dim=9, embed_size=8, sim_dim=5, word_dim=7, num_regions=6).eval()
    for layer in model.image_encoder.graph.layers:
        torch.nn.init.uniform_(layer.bn.weight)
    images = torch.randn(23, 6, 9)
    dataset = SimpleNamespace(n_images=23, image_blocks=lambda size, rows: images[rows].split(size))
    encoded = encode_images(model, dataset, torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(encoded.region_emb, model.image_encoder(images))
