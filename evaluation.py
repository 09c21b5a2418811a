"""Encode, score, rank, report.

    python evaluation.py                                        # ./runs/LHSC, test split
    python evaluation.py --model_path runs/coco/checkpoint/model_best.pth.tar \\
        --data_name coco_precomp --split testall --fold5        # COCO 1K, five folds
    python evaluation.py --model_path A.pth.tar B.pth.tar       # an ensemble: mean of the scores
    python evaluation.py --bootstrap 1000                       # with 95 % intervals

    torchrun --nproc_per_node 4 evaluation.py …                 # several GPUs: distributed.py

Everything not named is taken from the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

import distributed
from attention import owner_of
from checkpoint import load_checkpoint, model_from
from data import Captions, PrecompDataset
from errors import InputError, one_line
from metrics import bootstrap_intervals, image_hits, mean_metrics, retrieval_metrics
from model import LHSC
from scoring import scorer
from similarity import EncodedCaptions, EncodedImages
from vocab import Vocabulary, vocab_file

DEFAULT_MODEL = "./runs/LHSC/checkpoint/model_best.pth.tar"
ENCODE_BATCH = 100  # the released code's; with its padding a caption's embedding depends on it
N_FOLDS = 5
COLLAPSED = 1e-6  # scores this close together are one score
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of the scoring's products


def select_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:1`.

    Raises:
        InputError: if there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {name}: this PyTorch sees no CUDA; use --device cpu or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices")
    return device


def progress(items: Iterable, total: int, what: str) -> Iterator:
    """A bar on a terminal; elsewhere a plain line at every quarter of work over 10 seconds."""
    if not distributed.is_first():
        yield from items
        return
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, total=total, desc=what, leave=False)
        return
    start, told = time.monotonic(), 0
    for done, item in enumerate(items, start=1):
        yield item
        quarter, elapsed = 4 * done // max(total, 1), time.monotonic() - start
        if quarter > told and elapsed > 10:
            told = quarter
            print(f"{what}: {done}/{total}, {elapsed:.0f} s", file=sys.stderr, flush=True)


@torch.inference_mode()
def encode_images(model: LHSC, dataset: PrecompDataset, device: torch.device) -> EncodedImages:
    """Every image of the split, each once; of several processes each has its share of them."""
    rows = distributed.share(dataset.n_images)
    blocks = dataset.image_blocks(ENCODE_BATCH, rows)
    total = -(-(rows.stop - rows.start) // ENCODE_BATCH)
    encoder = model.image_encoder.folded()
    D = model.image_encoder.fc.out_features
    regions = [torch.empty(0, model.num_regions, D, device=device)]  # a share may be empty
    images = [torch.empty(0, D, device=device)]
    for block in progress(blocks, total, "encoding images"):
        regions.append(encoder(block.to(device)))
        images.append(model.similarity.image_global(regions[-1]))
    return EncodedImages(torch.cat(regions), torch.cat(images))


@torch.inference_mode()
def encode_captions(model: LHSC, dataset: Captions, device: torch.device) -> EncodedCaptions:
    """Every caption, 100 at a time: similar lengths together, which pads little.

    With the released padding, where it matters which captions share a batch, in file order. Of
    several processes each encodes its share of the batches, and all have all captions.
    """
    lengths = dataset.lengths
    in_file_order = model.text_encoder.padding == "released"
    order = torch.arange(len(lengths)) if in_file_order else lengths.argsort(stable=True)
    start = (lengths.cumsum(0) - lengths).to(device)  # of each caption's words
    size = model.image_encoder.fc.out_features
    word_emb = torch.zeros(int(lengths.sum()), size, device=device)
    caption_global = torch.zeros(len(lengths), size, device=device)
    n_blocks = -(-len(order) // ENCODE_BATCH)
    mine = distributed.share(n_blocks)
    order = order[mine.start * ENCODE_BATCH : mine.stop * ENCODE_BATCH]
    blocks = dataset.caption_blocks(order, ENCODE_BATCH) if len(order) else ()
    for captions, n, block in progress(blocks, mine.stop - mine.start, "encoding captions"):
        captions, n, block = captions.to(device), n.to(device), block.to(device)
        words = model.text_encoder(captions, n)
        within = torch.arange(len(words), device=device) - (n.cumsum(0) - n)[owner_of(n)]
        word_emb[start[block][owner_of(n)] + within] = words
        caption_global[block] = model.similarity.caption_global(words, n)
    word_emb, caption_global = distributed.total(word_emb), distributed.total(caption_global)
    return EncodedCaptions(word_emb, caption_global, lengths.to(device))


def score(
    model: LHSC,
    images: EncodedImages,
    captions: EncodedCaptions,
    dtype: torch.dtype = torch.float32,
) -> np.ndarray:
    """Scores of all images × all captions: float32 (n_images, n_captions) on the CPU.

    Time grows with images × words; memory beyond the result is one block's.
    """
    scores = scorer(model.similarity, images.image_global.device, dtype)
    sims = np.empty((len(images.image_global), len(captions.lengths)), dtype=np.float32)
    if not sims.size:
        return sims
    n_tiles = len(scores.chunks(captions))
    for chunk, tile in progress(scores.tiles(images, captions), n_tiles, "scoring"):
        sims[:, chunk] = tile.cpu().numpy()
    return sims


def fold_slices(dataset: PrecompDataset) -> list[tuple[slice, slice]]:
    """Five equal, consecutive folds: the images and the captions of each.

    Raises:
        InputError: if the images cannot be divided so.
    """
    n_images, per_image = dataset.n_images, dataset.captions_per_image
    if n_images % N_FOLDS or len(dataset) != n_images * per_image:
        raise InputError(f"--fold5: {n_images} images do not make {N_FOLDS} equal folds")
    size = n_images // N_FOLDS
    return [
        (slice(k * size, (k + 1) * size), slice(k * size * per_image, (k + 1) * size * per_image))
        for k in range(N_FOLDS)
    ]


def evaluate(
    models: list[LHSC],
    dataset: PrecompDataset,
    device: torch.device,
    fold5: bool = False,
    whole: bool = True,
    precision: str = "fp32",
    bootstrap: int = 0,
) -> tuple[dict, np.ndarray | None]:
    """Metrics of one model, or of several by the mean of their scores, and the score matrix.

    With `fold5` only the folds' own blocks are scored, a fifth of the work, unless `whole`; then
    no matrix is returned. Of several processes each scores its share of the images; the first ranks
    them and has the matrix, all return the metrics.

    Raises:
        InputError: if a score is not finite, or a model cannot be scored in this precision.
    """
    folds = fold_slices(dataset) if fold5 else []
    everything = (slice(0, dataset.n_images), slice(0, len(dataset)))
    wanted = folds if fold5 and not whole else [everything]
    totals: list[np.ndarray] = []
    for model in models:  # what cannot be scored so is refused before anything is encoded
        scorer(model.similarity, device, PRECISIONS[precision])
    for model in models:
        images, captions = (f(model, dataset, device) for f in (encode_images, encode_captions))
        sims = [
            score(model, images.rows(mine(i, dataset)), captions.rows(c), PRECISIONS[precision])
            for i, c in wanted
        ]
        totals = sims if not totals else [a + b for a, b in zip(totals, sims, strict=True)]
        del images, captions
    blocks = [distributed.to_first(total / np.float32(len(models))) for total in totals]
    if not distributed.is_first():
        return distributed.from_first(None), None
    matrix = blocks[0] if wanted == [everything] else None
    if fold5 and matrix is not None:
        blocks = [matrix[i, c] for i, c in folds]
    if any(np.ptp(block) < COLLAPSED for block in blocks):
        print(
            f"warning: all scores lie within {COLLAPSED:g}: the model has collapsed. Ties count "
            "against it, so these recalls are not above chance",
            file=sys.stderr,
        )
    image_of_caption = dataset.image_of_caption
    try:
        if not fold5:
            metrics = retrieval_metrics(blocks[0], image_of_caption)
        else:
            first = image_of_caption[folds[0][1]]
            metrics = mean_metrics([retrieval_metrics(block, first) for block in blocks])
        if bootstrap:
            owner = first if fold5 else image_of_caption
            hits = [image_hits(block, owner) for block in blocks]
            metrics["bootstrap"] = bootstrap_intervals(hits, bootstrap)
    except ValueError as error:
        raise InputError(f"{dataset.name} {dataset.split}: {error}") from error
    return distributed.from_first(metrics), matrix


def mine(rows: slice, dataset: PrecompDataset) -> slice:
    """Those of some images that this process has encoded, counted from its first."""
    own = distributed.share(dataset.n_images)
    start = min(max(rows.start, own.start), own.stop)
    return slice(start - own.start, max(start, min(rows.stop, own.stop)) - own.start)


def protocol(data_name: str, split: str, n_images: int, fold5: bool) -> str:
    """The name of the protocol that a number belongs to."""
    if fold5:
        known = data_name.startswith("coco") and split == "testall" and n_images == 5000
        name = "COCO 1K" if known else f"{data_name} {split}"
        return f"{name}, mean of five folds of {n_images // N_FOLDS:,} images"
    if data_name.startswith("coco") and split == "testall" and n_images == 5000:
        return "COCO 5K"
    if data_name.startswith("coco") and split == "test":
        return (
            f"COCO first {n_images:,} of testall: not comparable with COCO 1K, which is the mean "
            f"of five folds (--split testall --fold5)"
        )
    if data_name.startswith("f30k") and split == "test" and n_images == 1000:
        return "F30K 1K"
    return f"{data_name} {split}, {n_images:,} images"


def report(metrics: dict) -> str:
    """The metrics as a small table."""
    lines = [f"{'':16}{'R@1':>7}{'R@5':>7}{'R@10':>7}{'medr':>7}{'meanr':>8}"]
    for way, name in (("i2t", "image to text"), ("t2i", "text to image")):
        m = metrics[way]
        lines.append(
            f"{name:16}{m['r1']:7.1f}{m['r5']:7.1f}{m['r10']:7.1f}{m['medr']:7.1f}{m['meanr']:8.1f}"
        )
    folds = [f"{fold['rsum']:.1f}" for fold in metrics.get("folds", [])]
    lines.append(f"rsum {metrics['rsum']:.1f}" + f"  {folds}" * bool(folds))
    if "bootstrap" in metrics:
        lines.append(report_intervals(metrics["bootstrap"]))
    return "\n".join(lines)


def report_intervals(intervals: dict) -> str:
    """The bootstrap's intervals, under the recalls they belong to."""
    lines = [f"95 % intervals, {intervals['samples']:,} bootstrap samples of the images:"]
    for way, name in (("i2t", "image to text"), ("t2i", "text to image")):
        spans = (f"{low:.1f} – {high:.1f}" for low, high in intervals[way].values())
        lines.append(f"{name:16}" + "".join(f"{span:>16}" for span in spans))
    low, high = intervals["rsum"]
    return "\n".join([*lines, f"rsum {low:.1f} – {high:.1f}"])


def load(path: str | Path, opt: argparse.Namespace) -> tuple[LHSC, dict, Vocabulary]:
    """A model, its options overridden by what was asked for, and its vocabulary, checked."""
    checkpoint = load_checkpoint(path)
    model = model_from(checkpoint, path)
    given = {k: v for k, v in vars(opt).items() if v is not None}
    settings = {"data_path": "./data", "vocab_path": "./vocab"} | checkpoint["opt"] | given
    if "data_name" not in settings:
        raise InputError(f"{path}: it does not name its data set; give --data_name")
    # A model keeps the vocabulary of the data it was trained on, whatever it is evaluated on.
    trained_on = checkpoint["opt"].get("data_name", settings["data_name"])
    file = vocab_file(settings["vocab_path"], trained_on)
    vocab = Vocabulary.load(file)
    expected = checkpoint["opt"]["vocab_size"]
    if len(vocab) != expected or checkpoint.get("vocab", vocab.fingerprint()) != (
        vocab.fingerprint()
    ):
        raise InputError(
            f"{file}: not the vocabulary {path} was trained with ({len(vocab)} words here, "
            f"{expected} there); name the folder of the right one with --vocab_path"
        )
    return model, settings, vocab


def run(opt: argparse.Namespace) -> dict:
    """What the command line does; returns the metrics it prints."""
    for target in (opt.save_sims, opt.save_metrics):
        if target is not None and not Path(target).absolute().parent.is_dir():
            raise InputError(f"{target}: the folder to write into does not exist")
    device = distributed.start(select_device(opt.device))
    paths = [opt.model_path] if isinstance(opt.model_path, str | Path) else opt.model_path
    loaded = [load(path, opt) for path in paths]
    models = [model.to(device) for model, _, _ in loaded]
    _, settings, vocab = loaded[0]
    for path, (_, _, other) in zip(paths, loaded, strict=True):
        if other.fingerprint() != vocab.fingerprint():
            raise InputError(f"{path}: an ensemble needs one vocabulary, this has another")
    sizes = {(m.image_encoder.fc.in_features, o["num_regions"]) for m, o, _ in loaded}
    if len(sizes) > 1:
        raise InputError(f"an ensemble needs one kind of regions, found {sorted(sizes)}")
    img_dim, num_regions = sizes.pop()
    limit = settings.get("val_captions") if opt.split == "dev" else None
    dataset = PrecompDataset(
        settings["data_path"], settings["data_name"], opt.split, vocab, img_dim, num_regions, limit
    )
    metrics, sims = evaluate(
        models,
        dataset,
        device,
        opt.fold5,
        opt.save_sims is not None or not opt.fold5,
        opt.precision,
        opt.bootstrap,
    )
    name = protocol(dataset.name, dataset.split, dataset.n_images, opt.fold5)
    if not distributed.is_first():
        return metrics
    members = f", ensemble of {len(models)}" if len(models) > 1 else ""
    print(f"{name} ({dataset.n_images:,} images, {len(dataset):,} captions{members})")
    print(report(metrics), flush=True)
    if opt.save_sims is not None:
        write_whole(opt.save_sims, lambda file: np.save(file, sims))
    if opt.save_metrics is not None:
        text = json.dumps(metrics | {"protocol": name}, indent=1) + "\n"
        write_whole(opt.save_metrics, lambda file: file.write(text.encode()))
    return metrics


def write_whole(target: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """A file that is either the old one or the whole new one, which `write` fills."""
    temporary = Path(f"{target}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Evaluate LHSC: recalls in both directions.", allow_abbrev=False
    )
    switch = argparse.BooleanOptionalAction
    parser.add_argument(
        "--model_path",
        default=[DEFAULT_MODEL],
        nargs="+",
        metavar="CKPT",
        help="checkpoint; several are averaged by their scores",
    )
    parser.add_argument("--data_path", default=None, help="folder of the data sets")
    parser.add_argument("--data_name", default=None, help="its folder in data_path")
    parser.add_argument("--vocab_path", default=None, help="folder of the vocabularies")
    parser.add_argument("--split", default="test", choices=["dev", "test", "testall"])
    parser.add_argument(
        "--fold5",
        default=False,
        action=switch,
        help="mean over five folds (COCO 1K, with --split testall)",
    )
    parser.add_argument(
        "--save_sims",
        default=None,
        metavar="F.npy",
        help="write the scores, float32 (n_images, n_captions)",
    )
    parser.add_argument("--save_metrics", default=None, metavar="F.json", help="write the metrics")
    parser.add_argument(
        "--bootstrap",
        default=0,
        type=samples,
        metavar="N",
        help="95%% intervals from N samples of the images, e.g. 1000",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--precision",
        default="fp32",
        choices=[*PRECISIONS],
        help="of the matrix products of the scoring; bf16 is faster and moves scores in the third "
        "decimal (README, Speed)",
    )
    return parser  # fmt: skip


def samples(text: str) -> int:
    if int(text) != 0 and int(text) < 100:
        raise argparse.ArgumentTypeError(f"{text}: should be 0 (none), or 100 or more")
    return int(text)


def evalrank(
    model_path: str | Path,
    data_path: str | Path | None = None,
    split: str = "dev",
    fold5: bool = False,
    **others: object,
) -> dict:
    """Evaluate a checkpoint on a split: prints the metrics and returns them.

    `others`: any other option of the command line by name (vocab_path, data_name, device, …).

    Raises:
        InputError: for anything wrong with the files.
    """
    opt = options().parse_args([])
    unknown = sorted(others.keys() - vars(opt).keys())
    if unknown:
        raise TypeError(f"evalrank has no option {unknown[0]}")
    given = {"model_path": model_path, "data_path": data_path, "split": split, "fold5": fold5}
    return run(argparse.Namespace(**vars(opt) | given | others))


@one_line
def main() -> None:
    with distributed.together():
        run(options().parse_args())


if __name__ == "__main__":
    main()
