"""The literal reference gives the released numbers: outputs, gradients, two optimizer steps.

Tolerances leave room for another CPU or BLAS. Measured with PyTorch 2.13 on a CPU, sims are within
5e-7, gradients within 2e-5 of each tensor's largest, parameters and buffers within 4e-6; without
oneDNN, or in float64, 5e-6, 4e-4 and 8e-5: so much is the rounding of the goldens themselves.
"""

import argparse
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import (
    ReleasedLHSC,
    ReleasedSimilarity,
    evaluate_ranks,
    hardest_negative_loss,
    l2norm,
    score_loop,
)
from torch.nn.utils import clip_grad_norm_

GOLDENS = Path(__file__).parent / "goldens"
LEARNING_RATE = 2e-4

# A bias in front of a BatchNorm or a softmax cannot change the output. Its gradient is rounding
# noise, of which Adam makes whole steps: after n steps two runs may be 2 n learning rates apart.
ZERO_GRADIENT = {
    *(f"img_enc.IM_GCN_{i}.W.0.bias" for i in (1, 2, 3, 4)),
    "sim_enc.v_global_w.embedding_global.0.bias",
    "sim_enc.v_global_w.embedding_common.0.bias",
    "sim_enc.t_global_w.embedding_common.0.bias",
    "sim_enc.cal_sim_base_atten.attn_sim_w.bias",
}
# The running means behind those biases move with them (a momentum of 0.1, one step behind).
AFTER_ZERO_GRADIENT = {
    *(f"img_enc.IM_GCN_{i}.W.1.running_mean" for i in (1, 2, 3, 4)),
    "sim_enc.v_global_w.embedding_global.1.running_mean",
    "sim_enc.cal_sim_base_atten.bn.running_mean",
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small only wait for each other on more, and sums keep their order on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDENS / "released_a.npz") as npz:
        return dict(npz)


def golden_model(**options) -> ReleasedLHSC:
    """The golden weights, every dropout at 0."""
    sizes = json.loads(str(golden()["opt"]))
    names = ("img_dim", "embed_size", "sim_dim", "word_dim", "vocab_size", "num_layers")
    model = ReleasedLHSC(
        **{name: sizes[name] for name in names},
        embed_dropout=0.0,
        word_dropout=0.0,
        pooling_dropout=0.0,
        **options,
    )
    model.load_golden(golden())
    return model


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.tensor(golden()[f"in/{name}"]) for name in ("images", "captions", "lengths"))


def golden_name(name: str) -> str:
    """img_enc.fc.weight -> img_enc/fc.weight"""
    return name.replace(".", "/", 1)


def largest_difference(ours: torch.Tensor, theirs: np.ndarray) -> float:
    return float(np.abs(ours.detach().numpy().astype(np.float64) - theirs).max())


@cache
def two_steps(dtype: torch.dtype = torch.float32) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Two steps of training as released: what each gave, and the state after both."""
    model = golden_model().to(dtype).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    images, captions, lengths = inputs()
    steps = []
    for _ in range(2):
        sims = model(images.to(dtype), captions, lengths)
        loss = hardest_negative_loss(sims, margin=0.2)
        optimizer.zero_grad()
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        # The golden norm is of all parameters together, before clipping.
        grad_norm = clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        steps.append(
            {"sims": sims, "loss": loss.item(), "grad_norm": grad_norm.item(), "grads": grads}
        )
    return steps, model.state_dict()


def test_golden_names_are_all_used():
    model = golden_model()
    ours = {f"init/{golden_name(name)}" for name in model.state_dict()}
    assert ours == {name for name in golden() if name.startswith("init/")}
    ours = {f"train1/grad/{golden_name(name)}" for name, _ in model.named_parameters()}
    assert ours == {name for name in golden() if name.startswith("train1/grad/")}


def test_eval_embeddings_and_sims_are_the_released_ones():
    model = golden_model().eval()
    images, captions, lengths = inputs()
    with torch.no_grad():
        region_emb = model.img_enc(images)
        word_emb = model.txt_enc(captions, lengths)
        sims = model(images, captions, lengths)
    assert largest_difference(region_emb, golden()["eval/img_emb"]) < 2e-6
    for ours, theirs, n in zip(word_emb, golden()["eval/cap_emb"], lengths, strict=True):
        assert largest_difference(ours[:n], theirs[:n]) < 2e-6
        assert not ours[n:].any()
    # 1e-5 would pass a normalised mean of words in the global pooling (8.6e-6 here); this does not.
    assert largest_difference(sims, golden()["eval/sims"]) < 2e-6


@pytest.mark.parametrize(("step", "tolerance"), [(1, 4e-6), (2, 1e-5)])
def test_training_sims_loss_and_norm_are_the_released_ones(step, tolerance):
    ours = two_steps()[0][step - 1]
    assert largest_difference(ours["sims"], golden()[f"train{step}/sims"]) < tolerance
    assert ours["loss"] == pytest.approx(float(golden()[f"train{step}/loss"]), rel=1e-5)
    assert ours["grad_norm"] == pytest.approx(float(golden()[f"train{step}/grad_norm"]), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_the_released_ones(dtype):
    for name, grad in two_steps(dtype)[0][0]["grads"].items():
        theirs = golden()[f"train1/grad/{golden_name(name)}"]
        if name in ZERO_GRADIENT:
            noise = 1e-4 if dtype == torch.float32 else 1e-10
            assert grad.abs().max() < noise, name
            assert np.abs(theirs).max() < 1e-4, name
        else:
            assert largest_difference(grad, theirs) < 1e-3 * np.abs(theirs).max(), name


def test_state_after_two_steps_is_the_released_one():
    for name, ours in two_steps()[1].items():
        theirs = golden()[f"after/{golden_name(name)}"]
        difference = np.abs(ours.numpy().astype(np.float64) - theirs)
        if name in ZERO_GRADIENT:
            assert difference.max() < 4.1 * LEARNING_RATE, name
        elif name in AFTER_ZERO_GRADIENT:
            # The bias is up to 2 rates apart in the second step, of which one update takes 0.1
            # and the gate's 24 updates, one a caption, take nearly all.
            part = 1 - 0.9**24 if "bn" in name else 0.1
            assert difference.max() < 2 * LEARNING_RATE * part + 1e-5, name
        elif name.endswith("num_batches_tracked"):
            assert ours == theirs, name
        else:
            assert difference.max() < 1e-4 * max(1.0, np.abs(theirs).max()), name
            assert difference.mean() < 1e-5 * max(1.0, np.abs(theirs).max()), name


def test_released_checkpoint_file_holds_the_same_weights():
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(
            GOLDENS / "legacy_py2_a.pth.tar", map_location="cpu", weights_only=True
        )
    assert set(checkpoint) == {"epoch", "model", "best_rsum", "opt", "Eiters"}
    model = golden_model()
    states = zip((model.img_enc, model.txt_enc, model.sim_enc), checkpoint["model"], strict=True)
    for module, state in states:  # image, text, similarity: in this order
        for name, value in module.state_dict().items():
            # A file may lack num_batches_tracked, which older versions did not store.
            if name in state or not name.endswith("num_batches_tracked"):
                assert torch.equal(state[name], value), name
        assert set(state) <= set(module.state_dict())


def test_ranks_are_the_released_ones():
    with np.load(GOLDENS / "metrics_a.npz") as npz:
        report = evaluate_ranks(npz["sims"])
        for way in ("i2t", "t2i"):
            ours = [report[way][name] for name in ("r1", "r5", "r10", "medr", "meanr")]
            assert ours == pytest.approx(npz[way].tolist(), abs=1e-9)
        assert report["rsum"] == pytest.approx(npz["i2t"][:3].sum() + npz["t2i"][:3].sum())


def test_ranks_by_hand_and_ties_count_against():
    sims = np.array(
        [
            [0.9, 0.1, 0.2, 0.3],  # best of captions 0 and 1 is first
            [0.8, 0.1, 0.5, 0.5],  # caption 0, wrong, is ahead of both right ones
        ]
    )
    report = evaluate_ranks(sims, per=2)
    assert report["i2t"] == {"r1": 50.0, "r5": 100.0, "r10": 100.0, "medr": 1.0, "meanr": 1.5}
    # Caption 1 scores both images 0.1: a tie, so its image is second.
    assert report["t2i"] == {"r1": 75.0, "r5": 100.0, "r10": 100.0, "medr": 1.0, "meanr": 1.25}
    collapsed = evaluate_ranks(np.zeros((12, 24)), per=2)
    assert collapsed["rsum"] == 0.0
    assert collapsed["i2t"]["meanr"] == 23.0 and collapsed["t2i"]["meanr"] == 12.0


def test_loss_by_hand():
    sims = torch.tensor([[0.6, 0.5, 0.1], [0.2, 0.9, 0.8], [0.3, 0.1, 0.7]])
    # Images: 0.1, 0.1, 0. Captions: 0, 0, 0.3.
    assert hardest_negative_loss(sims, margin=0.2).item() == pytest.approx(0.5)


def test_l2norm_adds_eps_to_the_length_and_has_no_nan():
    x = torch.tensor([[0.0, 0.0], [3e-8, 4e-8]], dtype=torch.float64, requires_grad=True)
    y = l2norm(x)
    assert torch.allclose(y[1], torch.tensor([3.0, 4.0], dtype=torch.float64) / 6)
    y.sum().backward()
    assert torch.isfinite(x.grad).all()


def test_released_padding_depends_on_the_batch_and_masked_does_not():
    _, captions, lengths = inputs()
    released, masked = golden_model().eval(), golden_model(masked=True).eval()
    with torch.no_grad():
        padded_emb = released.txt_enc(captions, lengths)
        masked_emb = masked.txt_enc(captions, lengths)
        for row, n in enumerate(lengths.tolist()):
            alone = released.txt_enc(captions[row : row + 1, :n], [n])[0]
            assert torch.allclose(masked_emb[row, :n], alone, atol=1e-6)
            assert not masked_emb[row, n:].any()
    assert lengths[0] == captions.shape[1]  # the longest caption has no pads
    assert torch.allclose(masked_emb[0], padded_emb[0], atol=1e-6)
    assert (masked_emb[-1] - padded_emb[-1]).abs().max() > 1e-2


def test_pad_embedding_is_trained_only_by_the_released_padding():
    images, captions, lengths = inputs()
    for masked in (False, True):
        model = golden_model(masked=masked).train()
        hardest_negative_loss(model(images, captions, lengths)).backward()
        assert bool(model.txt_enc.embed.weight.grad[0].any()) is not masked


def test_score_loop_moves_the_gate_statistics_once_a_caption_in_order():
    torch.manual_seed(0)
    similarity = ReleasedSimilarity(8, 4, num_regions=5, pooling_dropout=0.0)
    region_emb = l2norm(torch.randn(3, 5, 8))
    word_emb, lengths = l2norm(torch.randn(4, 6, 8)), [6, 2, 4, 3]
    gate = similarity.cal_sim_base_atten
    seen = []
    gate.bn.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))

    similarity.eval()
    score_loop(similarity, region_emb, word_emb, lengths)
    assert gate.bn.num_batches_tracked == 0 and gate.bn.running_mean == 0

    seen.clear()
    similarity.train()
    score_loop(similarity, region_emb, word_emb, lengths)
    mean, var = 0.0, 1.0
    assert [gates.shape for gates in seen] == [(3, 1, n + 1) for n in lengths]
    for gates in seen:
        mean = 0.9 * mean + 0.1 * gates.mean()
        var = 0.9 * var + 0.1 * gates.var(unbiased=True)
    assert gate.bn.num_batches_tracked == 4
    assert gate.bn.running_mean.item() == pytest.approx(mean.item(), rel=1e-5)
    assert gate.bn.running_var.item() == pytest.approx(var.item(), rel=1e-5)


def test_scores_of_a_caption_do_not_depend_on_the_others():
    model = golden_model().eval()
    images, captions, lengths = inputs()
    with torch.no_grad():
        region_emb, word_emb = model.img_enc(images), model.txt_enc(captions, lengths)
        sims = score_loop(model.sim_enc, region_emb, word_emb, lengths)
        word_emb[0, lengths[0] :] = 7.0  # what stands in the pads is not read
        some = score_loop(model.sim_enc, region_emb, word_emb[[5, 1]], lengths[[5, 1]])
    assert torch.allclose(some, sims[:, [5, 1]], atol=1e-6)


def test_fresh_model_has_the_released_initial_values():
    torch.manual_seed(0)
    model = ReleasedLHSC(48, 32, 16, 20, 60)
    glorot = {
        model.img_enc.fc: (48, 32),
        model.txt_enc.W_att1.embedding_v[0]: (20, 20),
        model.txt_enc.W_att4.embedding_local[0]: (20, 20),
        model.sim_enc.v_global_w.embedding_local[0]: (32, 32),
        model.sim_enc.t_global_w.embedding_common[0]: (32, 1),
        model.sim_enc.sim_tranloc_w: (32, 16),
        model.sim_enc.sim_eval_w: (16, 1),
        model.sim_enc.cal_sim_base_atten.attn_sim_w: (16, 1),
    }
    for linear, sizes in glorot.items():
        bound = (6 / sum(sizes)) ** 0.5
        assert 0.7 * bound < linear.weight.abs().max() <= bound
        assert not linear.bias.any()
    assert 0.099 < model.txt_enc.embed.weight.abs().max() <= 0.1
    assert model.txt_enc.embed.weight[0].any()
    layer = model.img_enc.IM_GCN_3
    for conv in (layer.theta2, layer.phi, layer.g, layer.W[0], layer.fc1, layer.fc2):
        assert 0.95 * 32**-0.5 < conv.weight.abs().max() <= 32**-0.5  # PyTorch's default
        assert conv.bias.any()
    v = torch.randn(4, 32, 36)
    assert torch.equal(layer.train()(v), v)  # a graph layer starts as the identity
    assert model.txt_enc.dropout.p == 0.4
    assert model.txt_enc.W_att2.embedding_global[2].p == 0.0
    assert model.sim_enc.v_global_w.embedding_global[3].p == 0.4
    assert model.sim_enc.t_global_w.embedding_local[2].p == 0.4
