"""The model by property, and against the released way of computing it (tests/reference.py)."""

import pytest
import torch
from reference import ReleasedLHSC, hardest_negative_loss, score_loop
from torch.nn.functional import normalize

from attention import l2norm, owner_of, safe_sqrt, segment_softmax
from checkpoint import rename_released
from graph_layers import GraphLayer, RegionGraph
from model import LHSC, triplet_loss

SIZES = {"img_dim": 9, "embed_size": 8, "sim_dim": 5, "word_dim": 7, "vocab_size": 20}
NO_DROPOUT = {"embed_dropout": 0.0, "pool_dropout": 0.0}


def pair(num_regions=6, padding="masked"):
    """The same random double-precision weights in the reference and in our model."""
    reference = ReleasedLHSC(
        **SIZES, num_regions=num_regions, embed_dropout=0.0, pooling_dropout=0.0,
        masked=padding == "masked",
    )  # fmt: skip
    for parameter in reference.parameters():  # also what starts at zero
        torch.nn.init.uniform_(parameter, -0.6, 0.6)
    model = LHSC(**SIZES, num_regions=num_regions, padding=padding, **NO_DROPOUT)
    parts = (reference.img_enc, reference.txt_enc, reference.sim_enc)
    model.load_state_dict(rename_released(*(part.state_dict() for part in parts)))
    return reference.double(), model.double()


def batch(lengths, n_images=None, num_regions=6):
    """Random images and captions; lengths need not be sorted."""
    lengths = torch.tensor(lengths)
    captions = torch.randint(4, 20, (len(lengths), int(lengths.max())))
    captions[torch.arange(captions.shape[1]) >= lengths[:, None]] = 0
    images = torch.randn(n_images or len(lengths), num_regions, 9, dtype=torch.float64)
    return images, captions, lengths


def grads(module):
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("padding", ["masked", "released"])
@pytest.mark.parametrize(
    ("lengths", "n_images"),
    [
        ([40, 31, 22, 13, 9, 4, 2, 2], 8), ([5, 5, 5], 3), ([2], 4), ([7, 40], 2), ([3, 11, 6], 5),
    ],
)  # fmt: skip
def test_all_at_once_is_one_caption_at_a_time_in_training(lengths, n_images, padding):
    """Scores, every gradient and every BatchNorm buffer, in double precision."""
    reference, model = pair(padding=padding)
    images, captions, lengths = batch(lengths, n_images)
    expected = reference.train()(images, captions, lengths)
    ours = model.train()(images, captions, lengths)
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)
    weight = torch.randn_like(ours)
    (expected * weight).sum().backward()
    (ours * weight).sum().backward()
    parts = (reference.img_enc, reference.txt_enc, reference.sim_enc)
    expected_grads = rename_released(*(grads(part) for part in parts))
    assert set(expected_grads) == set(grads(model))
    for name, grad in grads(model).items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-8, atol=1e-11, msg=name)
    state = rename_released(*(part.state_dict() for part in parts))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-11, atol=1e-12, msg=name)


@pytest.mark.parametrize(("lengths", "n_images"), [([40, 2, 17], 4), ([6], 1), ([2, 2], 1)])
def test_all_at_once_is_one_caption_at_a_time_in_evaluation(lengths, n_images):
    reference, model = pair(num_regions=3)
    data = batch(lengths, n_images, num_regions=3)
    with torch.no_grad():
        ours, expected = model.eval()(*data), reference.eval()(*data)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-11)


def test_score_loop_and_score_agree_on_given_embeddings():
    reference, model = pair()
    lengths = torch.tensor([5, 3, 9])
    region_emb = l2norm(torch.randn(4, 6, 8, dtype=torch.float64))
    words = l2norm(torch.randn(3, 9, 8, dtype=torch.float64))
    packed = torch.cat([row[:n] for row, n in zip(words, lengths, strict=True)])
    with torch.no_grad():
        ours = model.similarity.eval()(region_emb, packed, lengths)
        expected = score_loop(reference.sim_enc.eval(), region_emb, words, lengths)
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)


def test_a_caption_does_not_depend_on_its_neighbours():
    _, model = pair()
    images, captions, lengths = batch([6, 30, 2])
    model.eval()
    with torch.no_grad():
        alone_emb = model.text_encoder(captions[:1, :6], lengths[:1])
        beside_emb = model.text_encoder(captions, lengths)[:6]
        alone = model(images, captions[:1, :6], lengths[:1])
        beside = model(images, captions, lengths)[:, :1]
    torch.testing.assert_close(alone_emb, beside_emb, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(alone, beside, rtol=1e-12, atol=1e-13)


def test_with_released_padding_it_does_and_as_released():
    reference, model = pair(padding="released")
    images, captions, lengths = batch([30, 6, 2])
    model.eval()
    reference.eval()
    with torch.no_grad():
        alone = model(images, captions[1:2, :6], lengths[1:2])
        beside = model(images, captions, lengths)[:, 1:2]
        assert (alone - beside).abs().max() > 1e-4
        torch.testing.assert_close(alone, reference(images, captions[1:2, :6], lengths[1:2]))
        torch.testing.assert_close(beside, reference(images, captions, lengths)[:, 1:2])


def test_permuting_captions_permutes_columns_and_images_rows():
    _, model = pair()
    images, captions, lengths = batch([9, 4, 12, 2, 7])
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        sims = model.eval()(images, captions, lengths)
        torch.testing.assert_close(model(images, captions[order], lengths[order]), sims[:, order])
        torch.testing.assert_close(model(images[order], captions, lengths), sims[order])


def test_scores_lie_between_0_and_1():
    _, model = pair()
    with torch.no_grad():
        sims = model.eval()(*batch([9, 4, 12]))
    assert sims.shape == (3, 3) and (sims > 0).all() and (sims < 1).all()


def test_every_parameter_gets_a_gradient():
    model = LHSC(**SIZES, num_regions=6).train()
    images, captions, lengths = batch([9, 4, 12, 2, 7])
    for layer in model.image_encoder.graph.layers:  # they start at zero, which stops gradients
        torch.nn.init.ones_(layer.bn.weight)
    triplet_loss(model(images.float(), captions, lengths), max_violation=False).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@pytest.mark.parametrize("layers", [0, 1, 6])
def test_any_number_of_layers_and_regions(layers):
    model = LHSC(
        **SIZES, num_regions=3, graph_layers=layers, text_layers=layers, num_layers=2, bi_gru=False
    )
    images, captions, lengths = batch([4, 2], num_regions=3)
    assert model(images.float(), captions, lengths).shape == (2, 2)
    assert len(model.image_encoder.graph.layers) == len(model.text_encoder.self_attention) == layers


def test_a_graph_layer_starts_as_the_identity():
    regions = torch.randn(3, 6, 8)
    assert torch.equal(GraphLayer(8)(regions), regions)
    assert torch.equal(RegionGraph(8, 4)(regions), regions)


def test_initial_values():
    model = LHSC(vocab_size=500, img_dim=64, embed_size=48, word_dim=30, sim_dim=16)
    bound = (6 / (64 + 48)) ** 0.5
    weight = model.image_encoder.fc.weight
    assert 0.95 * bound < weight.abs().max() <= bound
    assert not model.image_encoder.fc.bias.any()
    assert 0.095 < model.text_encoder.embed.weight.abs().max() <= 0.1
    for name, module in model.similarity.named_modules():
        if isinstance(module, torch.nn.Linear):
            bound = (6 / (module.in_features + module.out_features)) ** 0.5
            assert module.weight.abs().max() <= bound and not module.bias.any(), name
    theta = model.image_encoder.graph.layers[0].theta
    assert theta.bias.any() and theta.weight.abs().max() <= 48**-0.5  # PyTorch's default


def test_released_dropout_rates_are_the_defaults():
    model = LHSC(vocab_size=20)
    rates = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert sorted(rates) == [0.0] * 4 + [0.4] * 3


def test_unknown_padding_is_refused():
    with pytest.raises(ValueError, match="padding"):
        LHSC(**SIZES, padding="none")


# -- the small functions --------------------------------------------------------------------------


def test_l2norm_adds_eps_to_the_length():
    x = torch.tensor([3e-8, 4e-8], dtype=torch.float64)
    torch.testing.assert_close(l2norm(x), x / 6e-8)
    assert not torch.allclose(l2norm(x), normalize(x, dim=0, eps=1e-8))


def test_l2norm_and_root_of_zero_have_gradient_zero():
    x = torch.zeros(2, 3, requires_grad=True)
    (l2norm(x).sum() + safe_sqrt(x).sum()).backward()
    assert torch.equal(x.grad, torch.zeros(2, 3))
    assert torch.equal(l2norm(x), torch.zeros(2, 3))


def test_zero_regions_and_equal_words_give_finite_gradients():
    """Images with fewer boxes come padded with zero rows; l2norm keeps them zero."""
    model = LHSC(**SIZES, num_regions=6, **NO_DROPOUT).train()
    images, captions, lengths = batch([5, 3, 3])
    images[0, 4:] = 0
    captions[1] = captions[2]
    triplet_loss(model(images.float(), captions, lengths)).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_segment_softmax_is_softmax_within_each_caption():
    lengths = torch.tensor([3, 1, 4])
    logits = 100 * torch.randn(8, dtype=torch.float64)  # would overflow without the peak
    ours = segment_softmax(logits, owner_of(lengths), 3)
    expected = torch.cat([part.softmax(0) for part in logits.split(lengths.tolist())])
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("max_violation", [True, False])
def test_loss_is_the_sum_over_both_directions(max_violation):
    sims = torch.rand(6, 6, dtype=torch.float64)
    total = 0.0
    for i in range(6):
        for scores in (sims[i], sims[:, i]):
            costs = [max(0.0, 0.2 + scores[j].item() - sims[i, i].item()) for j in range(6)]
            del costs[i]
            total += max(costs) if max_violation else sum(costs)
    assert triplet_loss(sims, 0.2, max_violation).item() == pytest.approx(total)
    if max_violation:
        assert triplet_loss(sims).item() == pytest.approx(hardest_negative_loss(sims).item())
