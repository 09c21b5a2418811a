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
    make_scenes.make_scenes(folder, 0, {"train": 60, "dev": 4, "test": 24})
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


def test_it_counts_what_is_right(made):
    folder, vocab, model = made
    texts, scenes, foils = (
        (folder / "scenes_precomp" / f"test_{name}").read_text().splitlines()
        for name in ("caps.txt", "scenes.jsonl", "foils.jsonl")
    )
    dataset = PrecompDataset(folder, "scenes_precomp", "test", vocab)

    @torch.no_grad()
    def sim(image, text):
        words = torch.tensor([vocab.encode(text)])
        return model(dataset.image(image)[None], words, torch.tensor([words.shape[1]])).item()

    right = {kind: [] for kind in KINDS}
    for caption, text in enumerate(texts):
        twin = json.loads(scenes[caption // 5])["twin"]
        right["relation"].append(sim(caption // 5, text) > sim(twin, text))
    for foil in map(json.loads, foils):
        image, text = foil["caption"] // 5, texts[foil["caption"]]
        right[foil["kind"]].append(sim(image, text) > sim(image, foil["text"]))
    assert answers(made, "test") == {
        kind: {"questions": len(expected), "accuracy": 100 * sum(expected) / len(expected)}
        for kind, expected in right.items()
    }


def test_equal_scores_are_wrong_answers(made):
    blind = LHSC(len(made[1]), **SIZES).eval()
    torch.nn.init.zeros_(blind.similarity.score_fc.weight)
    assert {found["accuracy"] for found in answers(made, "dev", blind).values()} == {0}


def test_questions_fit_the_data_set(made, tmp_path):
    def ask(n_scenes, caption):
        scenes = [json.dumps({"twin": k ^ 1}) for k in range(n_scenes)]
        (tmp_path / "dev_scenes.jsonl").write_text("\n".join(scenes))
        foil = {"caption": caption, "kind": "size", "text": "a"}
        (tmp_path / "dev_foils.jsonl").write_text(json.dumps(foil))
        return answers(made, "dev", questions=tmp_path)

    assert list(ask(4, 1)) == ["relation", "size"]  # kinds without questions are left out
    for wrong in ((5, 1), (4, 20)):
        with pytest.raises(InputError, match="not those of its dev"):
            ask(*wrong)
