"""What --recipe and its options do to a training."""

import copy
import itertools
import json

import pytest
import torch
from test_commands import SMALL, refused, run

import train
from checkpoint import load_checkpoint, load_newest, load_whole
from model import LHSC, triplet_loss
from train import RECIPES, learning_rate, options, parse, train_step, update_average


def rates(*arguments, epochs=6, steps_an_epoch=5):
    opt = parse(["--learning_rate", "1", "--num_epochs", str(epochs), *arguments])
    return [
        learning_rate(opt, step // steps_an_epoch, step, steps_an_epoch)
        for step in range(epochs * steps_an_epoch)
    ]


def test_by_default_the_learning_rate_is_the_released_one():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    released = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
    expected = []
    for _ in range(6):
        expected += released.get_last_lr() * 5
        optimizer.step()
        released.step()
    assert rates("--lr_update", "2") == pytest.approx(expected)


def test_a_cosine_falls_to_zero_by_the_end():
    found = rates("--lr_schedule", "cosine")
    assert found[0] == 1 and found[15] == pytest.approx(0.5) and 0 < found[-1] < 0.01
    assert all(a > b for a, b in itertools.pairwise(found))


def test_a_constant_rate_stays():
    assert set(rates("--lr_schedule", "constant", "--lr_update", "1")) == {1}


def test_a_warm_up_rises_to_the_schedule_and_then_leaves_it_alone():
    plain, warm = rates(), rates("--lr_warmup", "9")
    assert warm[:9] == pytest.approx([(k + 1) / 10 for k in range(9)])
    assert warm[9:] == plain[9:]


def steps_of_a_run(monkeypatch, folder, *arguments):
    """Of each step the options that reach it; nothing is trained."""
    found = []

    def noted(model, optimizer, batch, margin, hardest, grad_clip, same_image):
        (group,) = optimizer.param_groups
        found.append({"rate": group["lr"], "decay": group["weight_decay"], "hardest": hardest,
                      "clip": grad_clip, "margin": margin, "same_image": same_image,
                      "mixed": model.similarity.product_dtype is not None})  # fmt: skip
        return 1.0

    monkeypatch.chdir(folder)
    monkeypatch.setattr(train, "train_step", noted)
    train.train(parse([*SMALL, *arguments]))
    return found


def test_options_reach_the_steps(tiny, monkeypatch):
    released = {"decay": 0, "hardest": True, "clip": 2, "margin": 0.2, "same_image": "negative",
                "mixed": False}  # fmt: skip
    plain = steps_of_a_run(monkeypatch, tiny)
    assert plain == [{"rate": 0.002} | released] * 20  # 150 captions, twice
    others = ["--weight_decay", "0.5", "--warmup_epochs", "1", "--grad_clip", "3", "--margin", "1",
              "--same_image", "ignored", "--precision", "bf16", "--lr_schedule", "cosine",
              "--lr_warmup", "3"]  # fmt: skip
    found = steps_of_a_run(monkeypatch, tiny, *others)
    changed = {"decay": 0.5, "clip": 3, "margin": 1, "same_image": "ignored", "mixed": True}
    assert all(step.items() >= changed.items() for step in found)
    assert [step["hardest"] for step in found] == [False] * 10 + [True] * 10
    cosine = rates("--lr_schedule", "cosine", "--lr_warmup", "3", epochs=2, steps_an_epoch=10)
    assert [step["rate"] for step in found] == pytest.approx([0.002 * rate for rate in cosine])


def test_without_decay_the_optimizer_is_adam():
    """Bitwise, over steps with gradients of all sizes."""
    a = [torch.nn.Parameter(torch.randn(50, generator=torch.Generator().manual_seed(0)))]
    b = copy.deepcopy(a)
    adam, ours = torch.optim.Adam(a, lr=1e-2), torch.optim.AdamW(b, lr=1e-2, weight_decay=0)
    for _ in range(20):
        gradient = torch.randn(50) * 10 ** torch.randint(-6, 3, (50,))
        for parameters, optimizer in ((a, adam), (b, ours)):
            parameters[0].grad = gradient.clone()
            optimizer.step()
    assert torch.equal(a[0], b[0])


def test_the_average_is_exponential_and_forgets_the_start():
    model = LHSC(20, 4, 3, 8, 5, 4)
    average = copy.deepcopy(model)
    name = "similarity.score_fc.weight"
    first = average.state_dict()[name].clone()
    expected, decays = first.clone(), []
    for step in range(1, 41):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(step)
            model.similarity.gate_bn.running_mean.fill_(step)
            model.similarity.gate_bn.num_batches_tracked.fill_(step)
        update_average(average, model, 0.9, step)
        decays.append(min(0.9, (1 + step) / (10 + step)))
        expected = decays[-1] * expected + (1 - decays[-1]) * step
    torch.testing.assert_close(average.state_dict()[name], expected)
    torch.testing.assert_close(average.similarity.gate_bn.running_mean, expected[0, :1])
    assert average.similarity.gate_bn.num_batches_tracked == 40
    assert decays[0] < 0.2 and decays[-1] < 0.9 and 30 < expected.min() < 40


def test_weight_decay_pulls_weights_towards_zero():
    from data import Batch

    sizes = []
    for decay in (0.0, 0.5):
        torch.manual_seed(0)
        model = LHSC(20, 4, 3, 8, 5, 4)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=decay)
        captions, lengths = torch.randint(4, 20, (6, 5)), torch.tensor([5, 5, 4, 3, 2, 2])
        batch = Batch(torch.randn(6, 3, 4), captions, lengths, torch.arange(6), torch.arange(6))
        for _ in range(10):
            train_step(model, optimizer, batch)
        sizes.append(model.text_encoder.embed.weight.norm().item())
    assert sizes[1] < 0.97 * sizes[0]


def test_a_recipe_sets_defaults_and_what_is_given_wins():
    released, plain = vars(parse(["--recipe", "released"])), vars(options().parse_args([]))
    assert released == plain and RECIPES["released"] == {}
    modern = vars(parse(["--recipe", "modern"]))
    changed = {name for name, value in modern.items() if value != plain[name]}
    assert changed == {"recipe", *RECIPES["modern"]}
    name, value = next(iter(RECIPES["modern"].items()))
    assert vars(parse(["--recipe", "modern", f"--{name}", str(plain[name])]))[name] != value


def test_the_averaged_weights_are_evaluated_and_resumed(tiny):
    """Stopped after an epoch and gone on with, the average ends where it would have, bitwise."""
    arguments = [*SMALL, "--recipe", "modern", "--num_epochs", "3", "--save_step", "4"]
    whole = ["--model_name", "runs/whole/checkpoint", "--logger_name", "runs/whole/log"]
    assert run(tiny, "train.py", *arguments, *whole, "--keep", "99").returncode == 0
    part = ["--model_name", "runs/part/checkpoint", "--logger_name", "runs/part/log"]
    assert run(tiny, "train.py", *arguments, *part, "--keep", "99").returncode == 0
    for file in (tiny / "runs/part/checkpoint").glob("checkpoint_*"):
        if file.name != "checkpoint_16.pth.tar":
            file.unlink()
    # To name what is the run's already is allowed.
    again = run(tiny, "train.py", "--resume", "runs/part/checkpoint", "--recipe", "modern")
    assert again.returncode == 0, again.stderr
    assert "batch 6" in again.stdout
    _, one = load_newest(tiny / "runs/whole/checkpoint")
    _, other = load_newest(tiny / "runs/part/checkpoint")
    assert one["Eiters"] == other["Eiters"] == 30
    for kind in ("model", "average"):
        for name, value in one[kind].items():
            assert torch.equal(value, other[kind][name]), name
    assert any(not torch.equal(v, one["model"][k]) for k, v in one["average"].items())
    best = tiny / "runs/whole/checkpoint/model_best.pth.tar"
    weights = load_checkpoint(best)
    then = load_whole(tiny / f"runs/whole/checkpoint/checkpoint_{weights['Eiters']}.pth.tar")
    assert all(torch.equal(v, then["average"][k]) for k, v in weights["model"].items())
    dev = run(tiny, "evaluation.py", "--model_path", best, "--split", "dev", "--save_metrics", "m")
    assert dev.returncode == 0, dev.stderr
    rsum = json.loads((tiny / "m").read_text())["rsum"]
    assert rsum == pytest.approx(weights["best_rsum"])
    refused(run(tiny, "train.py", "--resume", "runs/part/checkpoint", "--ema", "0.5"), "--ema 0.5")


@pytest.mark.parametrize("options, words", [
    (("--ema", "1"), "--ema"),
    (("--weight_decay", "-1"), "--weight_decay"),
    (("--lr_warmup", "-1"), "--lr_warmup"),
    (("--recipe", "best"), "--recipe"),
    (("--same_image", "no"), "--same_image"),
    (("--similarity", "sgr"), "--similarity"),
    (("--similarity", "scan", "--alignment", "local"), "alignment"),
    (("--alignment", "local", "--global_image", "attended"), "global"),
])  # fmt: skip
def test_options_that_make_no_sense_are_refused(tiny, options, words):
    refused(run(tiny, "train.py", *SMALL, *options), words)


def test_mixed_precision_keeps_weights_and_scores_in_float32():
    """Loss and gradients are close to those of float32, and not the same."""
    torch.manual_seed(3)
    model = LHSC(50, 64, 36, 64, 32, 32, embed_dropout=0, pool_dropout=0).train()
    captions, lengths = torch.randint(4, 50, (8, 9)), torch.tensor([9, 9, 8, 7, 7, 5, 4, 3])
    images = torch.randn(8, 36, 64)

    def gradient():
        model.zero_grad()
        sims = model(images, captions, lengths)
        assert sims.dtype == torch.float32
        triplet_loss(sims, max_violation=False).backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        return sims.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])

    (sims, exact), (rounded, found) = gradient(), (model.mixed_precision(), gradient())[1]
    assert 0 < (sims - rounded).std() < 0.1 * sims.std()
    assert 0.98 < torch.cosine_similarity(exact, found, dim=0) < 1
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("options", [(), ("--similarity", "scan"), ("--global_image", "attended")])
def test_a_run_in_mixed_precision(tiny, options):
    """Its checkpoints are chosen by float32 scores, those that evaluation.py finds."""
    arguments = [*SMALL, "--num_epochs", "1", *options]
    models = {}
    for precision in ("bf16", "fp32"):
        result = run(tiny, "train.py", *arguments, "--precision", precision)
        assert result.returncode == 0, result.stderr
        models[precision] = load_checkpoint(tiny / "runs/LHSC/checkpoint/model_best.pth.tar")
        test = ["--split", "dev", "--save_metrics", "m.json"]
        assert run(tiny, "evaluation.py", *test).returncode == 0
        rsum = json.loads((tiny / "m.json").read_text())["rsum"]
        assert rsum == pytest.approx(models[precision]["best_rsum"])
    weights = "text_encoder.embed.weight"
    assert not torch.equal(models["bf16"]["model"][weights], models["fp32"]["model"][weights])


@pytest.mark.parametrize("variant", [
    {}, {"alignment": "local"}, {"global_image": "attended"}, {"similarity": "scan"},
])  # fmt: skip
def test_every_similarity_is_mixed_in_training_alone(variant):
    torch.manual_seed(3)
    model = LHSC(50, 64, 36, 64, 32, 32, embed_dropout=0, pool_dropout=0, **variant)
    lengths = torch.tensor([9, 9, 8, 7])
    regions, words = torch.randn(4, 36, 64), torch.randn(33, 64)
    regions, words = (x / x.norm(dim=-1, keepdim=True) for x in (regions, words))
    for training in (True, False):
        model.train(training)
        model.similarity.mixed = False
        exact = model.similarity(regions, words, lengths)
        found = model.mixed_precision().similarity(regions, words, lengths)
        assert torch.equal(exact, found) == (not training)
        torch.testing.assert_close(found, exact, rtol=0, atol=0.05)


def test_the_number_of_epochs_that_a_cosine_falls_over_is_fixed(tiny):
    assert run(tiny, "train.py", *SMALL, "--lr_schedule", "cosine").returncode == 0
    refused(run(tiny, "train.py", "--resume", "--num_epochs", "3"), "--num_epochs 3")
