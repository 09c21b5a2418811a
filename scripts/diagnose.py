"""What a model has learned on the drawn scenes: relations, attributes, counts.

    python scripts/diagnose.py --model_path runs/demo/checkpoint/model_best.pth.tar

Every question has two choices, so guessing gets 50 %. Equal scores count as wrong.

    relation    for a caption: its image, or the twin (the same objects in another relation)?
    shape, colour, size, count
                for an image: its caption, or the same caption with one wrong word
                ({split}_foils.jsonl, written by make_scenes.py)?
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
from evaluation import DEFAULT_MODEL, encode_captions, encode_images, load, score
from model import LHSC, EncodedCaptions, EncodedImages
from utils import InputError, check_targets, one_line, select_device, write_json
from vocab import Vocabulary

KINDS = ("relation", "shape", "colour", "size", "count")
IMAGES = 20  # scored at a time with their own captions


def read_lines(path: Path) -> list:
    """The JSON values in a file, one per line. Raises InputError naming an invalid line."""
    values = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            values.append(json.loads(line))
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not JSON: {error}") from error
    return values


def own_scores(
    model: LHSC, images: EncodedImages, captions: EncodedCaptions, image_of_caption: np.ndarray
) -> np.ndarray:
    """Each caption's score with its own image: (n_captions,); image_of_caption is sorted."""
    own = np.empty(len(image_of_caption), dtype=np.float32)
    for start in range(0, len(images.image_global), IMAGES):
        first, last = np.searchsorted(image_of_caption, (start, start + IMAGES))
        if first < last:
            rows, columns = slice(start, start + IMAGES), slice(int(first), int(last))
            sims = score(model, images.rows(rows), captions.rows(columns))
            own[columns] = sims[image_of_caption[columns] - start, np.arange(last - first)]
    return own


def diagnose(
    model: LHSC, vocab: Vocabulary, dataset: PrecompDataset, folder: Path, device: torch.device
) -> dict[str, dict]:
    """Accuracy in percent and number of questions of each kind that has any.

    Raises InputError if the folder's scenes or foils are missing, or belong to another data set.
    """
    scenes = read_lines(folder / f"{dataset.split}_scenes.jsonl")
    foils = read_lines(folder / f"{dataset.split}_foils.jsonl")
    caption_of_foil = np.array([foil["caption"] for foil in foils])
    kinds = np.array([foil["kind"] for foil in foils])
    if len(scenes) != dataset.n_images or caption_of_foil.max() >= len(dataset):
        raise InputError(f"{folder}: its scenes or foils are not those of its {dataset.split}")
    images, captions = (f(model, dataset, device) for f in (encode_images, encode_captions))
    image_of_caption = dataset.image_of_caption
    own = own_scores(model, images, captions, image_of_caption)

    twin = [scene["twin"] for scene in scenes]
    twins = EncodedImages(images.region_emb[twin], images.image_global[twin])
    answers = {"relation": own > own_scores(model, twins, captions, image_of_caption)}

    texts = encode_captions(model, Captions([foil["text"] for foil in foils], vocab), device)
    of_foils = own_scores(model, images, texts, image_of_caption[caption_of_foil])
    right = own[caption_of_foil] > of_foils
    answers |= {kind: right[kinds == kind] for kind in KINDS[1:]}
    return {
        kind: {"accuracy": 100 * float(right.mean()), "questions": len(right)}
        for kind, right in answers.items()
        if len(right)
    }


@one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--model_path", default=DEFAULT_MODEL, metavar="CKPT")
    parser.add_argument("--data_path", default=None, help="folder of the data sets")
    parser.add_argument("--data_name", default=None, help="the data set's folder in data_path")
    parser.add_argument("--vocab_path", default=None, help="folder of the vocabularies")
    parser.add_argument("--split", default="test", choices=["dev", "test"])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--json", default=None, type=Path, help="write the results")
    opt = parser.parse_args()
    check_targets(opt.json)
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
    if opt.json:
        write_json(opt.json, {"data": f"{dataset.name} {dataset.split}"} | result)


if __name__ == "__main__":
    main()
