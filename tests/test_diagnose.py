"""Accuracy on relations, attributes and counts, against scoring the questions one by one."""

import json

import make_scenes
import pytest
import torch
from diagnose import KINDS, diagnose

from data import PrecompDataset
from model import LHSC
from utils import InputError
from vocab import build_from_data

SIZES = {"img_dim": 239, "embed_size": 12, "word_dim": 8, "sim_dim": 6}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The parent folder of a small data set, its vocabulary, and a model of random weights."""
    folder = tmp_path_factory.mktemp("made")
    make_scenes.make_scenes(folder, 0, {"train": 60, "dev": 3, "test": 10})
    vocab = build_from_data(folder, "scenes_precomp")
    torch.manual_seed(1)
    model = LHSC(len(vocab), **SIZES).eval()
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.5, 0.5)
    return folder, vocab, model


def answers(made, split, model=None, questions=None):
    """What diagnose finds; its questions are in the data set's folder, unless told otherwise."""
    folder, vocab, usual = made
    dataset = PrecompDataset(folder, "scenes_precomp", split, vocab)
    questions = questions or folder / "scenes_precomp"
    return diagnose(model or usual, vocab, dataset, questions, torch.device("cpu"))


@pytest.mark.parametrize("split", ["dev", "test"])
def test_it_counts_what_is_right(made, split):
    folder, vocab, model = made
    texts, scenes, foils = (
        (folder / "scenes_precomp" / f"{split}_{name}").read_text().splitlines()
        for name in ("caps.txt", "scenes.jsonl", "foils.jsonl")
    )
    dataset = PrecompDataset(folder, "scenes_precomp", split, vocab)

    @torch.no_grad()
    def sim(image, text):
        words = torch.tensor([vocab.encode(text)])
        return model(dataset.image(image)[None], words, torch.tensor([words.shape[1]])).item()

    right = {kind: [] for kind in KINDS}
    for caption, text in enumerate(texts):
        twin = json.loads(scenes[caption // 5])["twin"]
        if twin is not None:
            right["relation"].append(sim(caption // 5, text) > sim(twin, text))
    for foil in map(json.loads, foils):
        image, text = foil["caption"] // 5, texts[foil["caption"]]
        right[foil["kind"]].append(sim(image, text) > sim(image, foil["text"]))
    found = answers(made, split)
    for kind, expected in right.items():
        assert found[kind]["questions"] == len(expected)
        assert found[kind]["accuracy"] == pytest.approx(100 * sum(expected) / len(expected))


def test_equal_scores_are_wrong_answers(made):
    blind = LHSC(len(made[1]), **SIZES).eval()
    torch.nn.init.zeros_(blind.similarity.score_fc.weight)
    assert {found["accuracy"] for found in answers(made, "dev", blind).values()} == {0}


def write_questions(folder, twins, caption):
    scenes = "".join(json.dumps({"twin": twin}) + "\n" for twin in twins)
    (folder / "dev_scenes.jsonl").write_text(scenes)
    foil = {"caption": caption, "kind": "size", "text": "a"}
    (folder / "dev_foils.jsonl").write_text(json.dumps(foil))


def test_kinds_without_questions_are_left_out(made, tmp_path):
    write_questions(tmp_path, [None] * 3, 1)
    assert list(answers(made, "dev", questions=tmp_path)) == ["size"]


@pytest.mark.parametrize("twins, caption", [([None] * 4, 1), ([3] * 3, 1), ([0] * 3, 15)])
def test_questions_of_another_data_set_are_refused(made, tmp_path, twins, caption):
    write_questions(tmp_path, twins, caption)
    with pytest.raises(InputError, match="not those of its dev"):
        answers(made, "dev", questions=tmp_path)
