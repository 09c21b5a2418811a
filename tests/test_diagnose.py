"""Accuracy on relations, attributes and counts, against scoring the questions one by one."""

import json

import make_scenes
import pytest
import torch
from diagnose import KINDS, diagnose
from test_commands import refused, run

from data import PrecompDataset
from errors import InputError
from model import LHSC
from vocab import build_from_data, vocab_file


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small data set with its vocabulary, and a model of random weights; their folder."""
    folder = tmp_path_factory.mktemp("made")
    make_scenes.make_scenes(folder / "data", 0, {"train": 60, "dev": 3, "test": 24})
    vocab = build_from_data(folder / "data", "scenes_precomp")
    vocab.save(vocab_file(folder / "vocab", "scenes_precomp"))
    torch.manual_seed(1)
    sizes = {"img_dim": 239, "embed_size": 12, "word_dim": 8, "sim_dim": 6}
    model = LHSC(len(vocab), **sizes).eval()
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.5, 0.5)
    return folder, vocab, model


def literal(folder, vocab, model, split):
    """Every question by itself: one or two images, one or two captions."""
    data = folder / "data/scenes_precomp"
    texts = (data / f"{split}_caps.txt").read_text().splitlines()
    scenes, foils = (
        [json.loads(line) for line in (data / f"{split}_{name}.jsonl").read_text().splitlines()]
        for name in ("scenes", "foils")
    )
    dataset = PrecompDataset(folder / "data", "scenes_precomp", split, vocab)

    @torch.no_grad()
    def sim(image, text):
        words = torch.tensor([vocab.encode(text)])
        return model(dataset.image(image)[None], words, torch.tensor([words.shape[1]])).item()

    right = {kind: [] for kind in KINDS}
    for caption, text in enumerate(texts):
        twin = scenes[caption // 5]["twin"]
        if twin is not None:
            right["relation"].append(sim(caption // 5, text) > sim(twin, text))
    for foil in foils:
        image = foil["caption"] // 5
        right[foil["kind"]].append(sim(image, texts[foil["caption"]]) > sim(image, foil["text"]))
    return dataset, right


@pytest.mark.parametrize("split", ["dev", "test"])
def test_it_counts_what_is_right(made, split):
    folder, vocab, model = made
    dataset, right = literal(folder, vocab, model, split)
    found = diagnose(model, vocab, dataset, folder / "data/scenes_precomp", torch.device("cpu"))
    for kind in KINDS:
        assert found[kind]["questions"] == len(right[kind])
        assert found[kind]["accuracy"] == pytest.approx(100 * sum(right[kind]) / len(right[kind]))
    assert sum(found[kind]["questions"] for kind in KINDS[1:]) > 3 * len(dataset)


def test_scores_alike_are_wrong_answers(made):
    folder, vocab, model = made
    dataset, _ = literal(folder, vocab, model, "dev")
    blind = LHSC(len(vocab), 239, 36, 12, 8, 6).eval()
    torch.nn.init.zeros_(blind.similarity.score_fc.weight)
    found = diagnose(blind, vocab, dataset, folder / "data/scenes_precomp", torch.device("cpu"))
    assert {found[kind]["accuracy"] for kind in KINDS} == {0}


def test_from_the_command_line(made):
    folder, _, _ = made
    train = ["--data_name", "scenes_precomp", "--embed_size", 8, "--sim_dim", 4, "--word_dim", 6,
             "--batch_size", 8, "--num_epochs", 1, "--workers", 0]  # fmt: skip
    assert run(folder, "train.py", *train).returncode == 0
    result = run(folder, "scripts/diagnose.py", "--json", "found.json")
    assert result.returncode == 0, result.stderr
    found = json.loads((folder / "found.json").read_text())
    assert found["data"] == "scenes_precomp test"
    assert f"relation {found['relation']['accuracy']:6.1f} %  of 120" in result.stdout
    (folder / "data/scenes_precomp/dev_foils.jsonl").unlink()
    refused(run(folder, "scripts/diagnose.py", "--split", "dev"), "dev_foils.jsonl", "make_scenes")
    (folder / "data/scenes_precomp/dev_foils.jsonl").write_text("[1\n")
    refused(run(folder, "scripts/diagnose.py", "--split", "dev"), "dev_foils.jsonl", "JSON")
    wrong = [{"caption": 15}, {"caption": "2"}, {"kind": "age"}, {"text": 3}]  # of 15 captions
    for change in wrong:
        line = json.dumps({"caption": 1, "kind": "size", "text": "a"} | change)
        (folder / "data/scenes_precomp/dev_foils.jsonl").write_text(f"{line}\n")
        refused(run(folder, "scripts/diagnose.py", "--split", "dev"), "not those of its dev")


@pytest.mark.parametrize("twin", [3, -1, "0"])
def test_a_twin_that_is_none_of_the_pictures_is_refused(made, tmp_path, twin):
    folder, vocab, model = made
    dataset = PrecompDataset(folder / "data", "scenes_precomp", "dev", vocab)
    (tmp_path / "dev_scenes.jsonl").write_text(3 * f"{json.dumps({'twin': twin})}\n")
    foil = {"caption": 1, "kind": "size", "text": "a"}
    (tmp_path / "dev_foils.jsonl").write_text(json.dumps(foil))
    with pytest.raises(InputError, match="not those of its dev"):
        diagnose(model, vocab, dataset, tmp_path, torch.device("cpu"))


def test_what_is_not_asked_is_left_out(made, tmp_path):
    folder, vocab, model = made
    dataset = PrecompDataset(folder / "data", "scenes_precomp", "dev", vocab)
    (tmp_path / "dev_scenes.jsonl").write_text(3 * '{"twin": null}\n')
    foil = {"caption": 1, "kind": "size", "text": "a"}
    (tmp_path / "dev_foils.jsonl").write_text(json.dumps(foil))
    found = diagnose(model, vocab, dataset, tmp_path, torch.device("cpu"))
    assert list(found) == ["size"] and found["size"]["questions"] == 1
