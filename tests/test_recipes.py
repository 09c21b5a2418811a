"""What the options of the optimisation do to a training."""

import copy
import shutil

import numpy as np
import pytest
import torch
from conftest import RUN, SMALL, call, refused, succeeded
from torch.testing import assert_close

import train
from checkpoint import load_checkpoint, load_latest, save_checkpoint
from data import Batch
from evaluation import evalrank
from metrics import retrieval_metrics
from model import LHSC, triplet_loss
from train import RECIPES, given_options, options, parse, update_ema
from utils import InputError
from vocab import Vocabulary


def steps_of_a_run(monkeypatch, folder, *arguments):
    """Of each step what reaches it; nothing is trained."""
    found = []

    def noted(model, optimizer, batch, margin, max_violation, clip, dtype, contrastive):
        (group,) = optimizer.param_groups
        parts = model.image_encoder, model.text_encoder, model.similarity
        trained = [{p.requires_grad for p in part.parameters()} for part in parts]
        found.append({"lr": group["lr"], "margin": margin, "hardest": max_violation, "clip": clip,
                      "dtype": dtype, "contrastive": contrastive, "trained": trained})  # fmt: skip
        return 1.0

    monkeypatch.setattr(train, "train_step", noted)
    succeeded(call(folder, train.main, *SMALL, *arguments))
    return found


def test_options_reach_the_steps(tiny, monkeypatch):
    official = {"lr": 0.002, "margin": 0.2, "hardest": True, "clip": 2, "dtype": None,
                "contrastive": False, "trained": [{True}] * 3}  # fmt: skip
    assert steps_of_a_run(monkeypatch, tiny) == [official] * 20  # 150 captions, twice
    others = ["--warmup_epochs", 1, "--grad_clip", 3, "--margin", 1, "--precision", "bf16"]
    changed = official | {"margin": 1, "clip": 3, "dtype": torch.bfloat16}
    expected = [changed | {"hardest": epoch > 0} for epoch in (0, 1) for _ in range(10)]
    assert steps_of_a_run(monkeypatch, tiny, *others) == expected


def test_trained_encoders_are_taken_and_kept(tiny, monkeypatch):
    no_layers = ["--graph_layers", 0, "--text_layers", 0]
    scan = [*SMALL, "--similarity", "scan", *no_layers, "--model_name", "runs/scan/checkpoint"]
    encoders, model = (tiny / run / "model_best.pth.tar" for run in (scan[-1], RUN))
    take = [*SMALL, "--encoders", encoders]
    succeeded(call(tiny, train.main, *scan))
    succeeded(call(tiny, train.main, *take))
    before, after = map(load_checkpoint, (encoders, model))
    old, new = before["model"], after["model"]
    assert all(torch.equal(new[name], weight) for name, weight in old.items())
    for others, word in (
        (["--word_dim", 7], "word_dim is 10 there, 7 here"),
        (["--similarity", "vse", *no_layers], "nothing to train"),
        (["--encoders", model, "--text_layers", 1], "text_layers is 4 there, 1 here"),
    ):
        refused(call(tiny, train.main, *take, *others), word)
    save_checkpoint(before | {"vocab": "other"}, encoders)
    refused(call(tiny, train.main, *take), f"{encoders}: trained with another vocabulary")
    steps = steps_of_a_run(monkeypatch, tiny, "--encoders", model)
    parts = [{False, True}, {False, True}, {True}]  # of the encoders only the layers are trained
    assert [step["trained"] for step in steps] == [parts] * 20


def test_word_vectors_are_the_first_embeddings(tmp_path):
    """In the order of the file; scaled to the spread of the official first values."""
    vocab = Vocabulary(["<pad>", "<start>", "<end>", "<unk>", *(f"w{i}" for i in range(500))])
    vectors = np.random.default_rng(0).normal(size=(300, 5)) * 7
    words = [f"w{2 * i}" for i in range(300)]  # 50 of them unknown
    lines = [f"{word} {' '.join(map(str, v))}\n" for word, v in zip(words, vectors, strict=True)]
    lines.append("w0 and more 1 2 3 4 5\n")  # GloVe's has such words
    (tmp_path / "v.txt").write_text("".join(lines))
    sizes = ["--img_dim", 4, "--num_regions", 3, "--embed_size", 8, "--sim_dim", 4, "--word_dim"]
    opt = parse([*map(str, sizes), "5", "--word_vectors", str(tmp_path / "v.txt")])
    opt.vocab_size = len(vocab)
    model, _, _ = train.build(opt, torch.device("cpu"), vocab)
    weight = model.text_encoder.embed.weight.detach()
    known = weight[4:504:2] / torch.from_numpy(vectors[:250]).float()
    assert_close(known, known.mean().expand_as(known))
    assert 0.9 < weight[4:504:2].std() / weight[5:504:2].std() < 1.1
    for line in ("w1 1 2 3 4", "w1 1 2 3 4 x", "w1 1 2 3 4 nan", "w1 1 2 3 4 5 6", "no 1 2 3 4 5"):
        (tmp_path / "v.txt").write_text(f"{line}\n")
        with pytest.raises(InputError, match="v.txt: "):
            train.build(opt, torch.device("cpu"), vocab)


@pytest.mark.parametrize("lr_update", [0, 1, 2, 30])
def test_the_learning_rate_falls_as_officially(tiny, monkeypatch, lr_update):
    expected = [0.002 * 0.1 ** (epoch // (lr_update or 99)) for epoch in range(5)]
    arguments = ["--batch_size", 150, "--num_epochs", 5, "--lr_update", lr_update]
    found = steps_of_a_run(monkeypatch, tiny, *arguments)
    assert [step["lr"] for step in found] == pytest.approx(expected)


def test_the_learning_rate_rises_over_the_first_steps(tiny, monkeypatch):
    arguments = ["--batch_size", 30, "--num_epochs", 2, "--lr_warmup", 7, "--learning_rate", 0.8]
    found = [step["lr"] for step in steps_of_a_run(monkeypatch, tiny, *arguments)]
    assert found == pytest.approx([min(0.1 * step, 0.8) for step in range(1, 11)])


def test_feature_dropout_leaves_out_numbers_of_regions():
    images = torch.rand(20, 6, 50) + 1
    before = Batch(images, *torch.ones(4, 20, 1, dtype=torch.long))
    found = train.augment(before, 0.0, 0.3)
    assert 0.25 < (found.images == 0).float().mean() < 0.35
    assert found[1:] == before[1:] and train.augment(before, 0.0, 0.0) is before


def test_patience_ends_a_run_after_epochs_without_a_rise(tiny, monkeypatch):
    rsums = iter([10, 30, 20, 30])  # no fifth epoch
    metrics = retrieval_metrics(np.eye(2), np.arange(2))
    monkeypatch.setattr(train, "evaluate", lambda *_: (metrics | {"rsum": next(rsums)}, None))
    arguments = ["--batch_size", 150, "--num_epochs", 9, "--patience", 2]
    assert len(steps_of_a_run(monkeypatch, tiny, *arguments)) == 4


def test_averaged_weights_are_exponential_and_forget_the_start():
    model = LHSC(20, 4, 3, 8, 5, 4)
    ema_model = copy.deepcopy(model)
    expected = model.similarity.score_fc.weight.detach().clone()
    for step in range(1, 41):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(step)
            model.similarity.gate_bn.running_mean.fill_(step)
            model.similarity.gate_bn.num_batches_tracked.fill_(step)
        update_ema(ema_model, model, 0.9, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    similarity = ema_model.similarity
    assert_close(similarity.score_fc.weight.detach(), expected)
    assert_close(similarity.gate_bn.running_mean, expected[0, :1])
    assert similarity.gate_bn.num_batches_tracked == 40


def test_averaged_weights_are_evaluated_and_resumed(tiny):
    """A run that was stopped ends where it would have, bitwise, its encoders' file gone or not."""
    whole, part = tiny / RUN, tiny / "runs/part/checkpoint"
    arguments = [*SMALL, "--recipe", "modern", "--save_step", 4, "--keep", 99]
    succeeded(call(tiny, train.main, *arguments, "--model_name", "runs/first"))
    encoders = tiny / "runs/first/model_best.pth.tar"
    succeeded(call(tiny, train.main, *arguments, "--encoders", encoders))
    encoders.unlink()
    part.mkdir(parents=True)
    for name in ("checkpoint_16.pth.tar", "metrics.jsonl"):
        shutil.copy(whole / name, part / name)
    # To name what is the run's already is allowed.
    assert "batch 6" in succeeded(call(tiny, train.main, "--resume", part, "--recipe", "modern"))
    one, other = (load_latest(folder)[1] for folder in (whole, part))
    assert one["Eiters"] == other["Eiters"] == 20
    for kind in ("model", "ema_model"):
        assert_close(dict(one[kind]), dict(other[kind]), rtol=0, atol=0)
    assert any(not torch.equal(x, one["model"][name]) for name, x in one["ema_model"].items())
    best = load_checkpoint(whole / "model_best.pth.tar")
    then = load_checkpoint(whole / f"checkpoint_{best['Eiters']}.pth.tar")
    assert_close(dict(best["model"]), dict(then["ema_model"]), rtol=0, atol=0)
    where = {"vocab_path": tiny / "vocab", "device": "cpu"}
    rsum = evalrank(whole / "model_best.pth.tar", tiny / "data", **where)["rsum"]
    assert rsum == pytest.approx(best["best_rsum"])
    refused(call(tiny, train.main, "--resume", part, "--ema", 0.5), "--ema 0.5")


def test_a_recipe_sets_defaults_and_what_is_given_wins():
    official, plain = vars(parse(["--recipe", "official"])), vars(options().parse_args([]))
    assert official == plain and RECIPES["official"] == {}
    modern = vars(parse(["--recipe", "modern"]))
    changed = {name for name, value in modern.items() if value != plain[name]}
    assert changed == {"recipe", *RECIPES["modern"]}
    for name in RECIPES["modern"]:
        given = parse(["--recipe", "modern", f"--{name}", str(plain[name])])
        assert vars(given)[name] == plain[name]
    assert given_options(["--seed", "0", "--no-bi_gru"]) == {"seed": 0, "bi_gru": False}


def test_mixed_precision_keeps_weights_and_scores_in_float32():
    """Loss and gradients are close to those of float32, and not the same."""
    torch.manual_seed(3)
    model = LHSC(50, 64, 36, 64, 32, 32, embed_dropout=0, pool_dropout=0).train()
    captions, lengths = torch.randint(4, 50, (8, 9)), torch.tensor([9, 9, 8, 7, 7, 5, 4, 3])
    images = torch.randn(8, 36, 64)
    results = []
    for dtype in (None, torch.bfloat16):
        model.zero_grad()
        sims = model(images, captions, lengths, dtype)
        triplet_loss(sims, max_violation=False).backward()
        tensors = [sims, *model.parameters(), *(p.grad for p in model.parameters())]
        assert {tensor.dtype for tensor in tensors} == {torch.float32}
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((sims.detach(), grads))
    (exact, exact_grads), (rounded, grads) = results
    assert 0 < (exact - rounded).std() < 0.1 * exact.std()
    assert 0.98 < torch.cosine_similarity(exact_grads, grads, dim=0) < 1
