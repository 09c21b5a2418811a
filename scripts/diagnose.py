"""What a model has learned on the drawn scenes: relations, attributes, counts.

    python scripts/diagnose.py --model_path runs/demo/checkpoint/model_best.pth.tar

Each is a choice of two, so that guessing gets 50 %:

    relation    a caption: its picture, or the twin (the same objects in another relation)?
    shape, colour, size, count
                a picture: its caption, or the same with one word made wrong
                ({split}_foils.jsonl, written by make_scenes.py)?

Both of a pair scoring alike is a wrong answer.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import Captions, PrecompDataset
from errors import InputError, one_line
from evaluation import (
    DEFAULT_MODEL,
    encode_captions,
    encode_images,
    load,
    score,
    select_device,
    write_whole,
)
from model import LHSC
from similarity import EncodedCaptions, EncodedImages
from vocab import Vocabulary

KINDS = ("relation", "shape", "colour", "size", "count")
IMAGES = 20  # scored at a time with their own captions


def read_lines(path: Path, keys: set[str]) -> list[dict]:
    """The objects of a file of make_scenes.py.

    Raises:
        InputError: if there is none, or it is another file.
    """
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise InputError(
            f"{path}: not found; it is written by scripts/make_scenes.py, for the drawn scenes only"
        ) from None
    except ValueError as error:
        raise InputError(f"{path}: not lines of JSON: {error}") from error
    if not lines or not all(isinstance(line, dict) and keys <= line.keys() for line in lines):
        raise InputError(f"{path}: expected lines with {', '.join(sorted(keys))}")
    return lines


def own_scores(
    model: LHSC, images: EncodedImages, captions: EncodedCaptions, image_of_caption: np.ndarray
) -> np.ndarray:
    """Each caption's score with its own image: (n_captions,); image_of_caption is sorted."""
    own = np.empty(len(image_of_caption), dtype=np.float32)
    for start in range(0, len(images.image_global), IMAGES):
        stop = min(start + IMAGES, len(images.image_global))
        first, last = np.searchsorted(image_of_caption, (start, stop))
        if first < last:
            rows, columns = slice(start, stop), slice(int(first), int(last))
            sims = score(model, images.rows(rows), captions.rows(columns))
            mine = image_of_caption[columns] - start
            own[columns] = sims[mine, np.arange(len(mine))]
    return own


def diagnose(
    model: LHSC, vocab: Vocabulary, dataset: PrecompDataset, folder: Path, device: torch.device
) -> dict:
    """Accuracy in percent of each of KINDS, and of how many questions: {"relation": {…}, …}.

    A kind of which nothing is asked is left out.

    Raises:
        InputError: if the folder's scenes or foils are missing, or those of another data set.
    """
    scenes = read_lines(folder / f"{dataset.split}_scenes.jsonl", {"twin"})
    foils = read_lines(folder / f"{dataset.split}_foils.jsonl", {"caption", "kind", "text"})
    fit = len(scenes) == dataset.n_images and all(
        scene["twin"] is None or scene["twin"] in range(dataset.n_images) for scene in scenes
    )
    if not fit or not all(
        foil["caption"] in range(len(dataset))
        and foil["kind"] in KINDS[1:]
        and isinstance(foil["text"], str)
        for foil in foils
    ):
        raise InputError(f"{folder}: its scenes or foils are not those of its {dataset.split}")
    images, captions = (f(model, dataset, device) for f in (encode_images, encode_captions))
    image = dataset.image_of_caption
    own = own_scores(model, images, captions, image)

    twin = np.array([-1 if scene["twin"] is None else scene["twin"] for scene in scenes])
    with_twin = twin >= 0
    swapped = EncodedImages(images.region_emb[twin], images.image_global[twin])
    of_twin = own_scores(model, swapped, captions, image)
    right = {"relation": (own > of_twin)[with_twin[image]]}

    of = np.array([foil["caption"] for foil in foils])
    order = np.argsort(of, kind="stable")
    wrong = Captions([foils[i]["text"] for i in order], vocab)
    encoded = encode_captions(model, wrong, device)
    beaten = own[of[order]] > own_scores(model, images, encoded, image[of[order]])
    kinds = np.array([foils[i]["kind"] for i in order])
    right |= {kind: beaten[kinds == kind] for kind in KINDS[1:]}
    return {
        kind: {"accuracy": 100 * float(answers.mean()), "questions": len(answers)}
        for kind, answers in right.items()
        if len(answers)
    }


@one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--model_path", default=DEFAULT_MODEL, metavar="CKPT")
    parser.add_argument("--data_path", default=None, help="folder of the data sets")
    parser.add_argument("--data_name", default=None, help="its folder in data_path")
    parser.add_argument("--vocab_path", default=None, help="folder of the vocabularies")
    parser.add_argument("--split", default="test", choices=["dev", "test"])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--json", default=None, type=Path, help="write the figures")
    opt = parser.parse_args()
    device = select_device(opt.device)
    model, settings, vocab = load(opt.model_path, opt)
    dataset = PrecompDataset(
        settings["data_path"], settings["data_name"], opt.split, vocab,
        settings["img_dim"], settings["num_regions"],
    )  # fmt: skip
    folder = Path(settings["data_path"]) / settings["data_name"]
    result = diagnose(model.to(device), vocab, dataset, folder, device)
    for kind, answers in result.items():
        print(f"{kind:9}{answers['accuracy']:6.1f} %  of {answers['questions']:,}")
    if opt.json is not None:
        text = json.dumps({"data": f"{dataset.name} {dataset.split}"} | result, indent=1) + "\n"
        write_whole(opt.json, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main()
