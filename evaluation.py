"""Encode, score, rank, report.

    python evaluation.py                                        # ./runs/LHSC, test split
    python evaluation.py --model_path runs/coco/checkpoint/model_best.pth.tar \\
        --data_name coco_precomp --split testall --fold5        # COCO 1K, five folds
    python evaluation.py --model_path A.pth.tar B.pth.tar       # an ensemble: mean of the scores
    python evaluation.py --bootstrap 1000                       # with 95 % intervals
    python evaluation.py --qb_norm 20                           # with querybank normalisation

    torchrun --nproc_per_node 4 evaluation.py …                 # several GPUs: distributed.py

Options that are not given are taken from the checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

import distributed
from attention import caption_index_of
from checkpoint import load_checkpoint, model_from
from data import Captions, PrecompDataset
from distributed import is_main_process, rank_slice
from metrics import (
    bootstrap_intervals,
    image_hits,
    mean_metrics,
    qb_norm_both_ways,
    retrieval_metrics,
)
from model import LHSC, EncodedCaptions, EncodedImages
from utils import (
    InputError,
    at_least,
    atomic_write,
    check_targets,
    choose_matmul,
    number,
    one_line,
    progress,
    reuse_freed_memory,
    select_device,
    write_json,
)
from vocab import Vocabulary, vocab_file

DEFAULT_MODEL = "./runs/LHSC/checkpoint/model_best.pth.tar"
ENCODE_BATCH = 100  # the official code's; with its padding a caption's embedding depends on it
ATTENTION_NUMEL = 2**21  # most C · L² of a batch; captions over 145 words get smaller batches
SCORE_CHUNK = {"cpu": (32, 1024), "cuda": (128, 1024)}  # images, words scored at once
N_FOLDS = 5
BANK_CAPTIONS = 5000  # training captions in QB-Norm's bank, with their images
COLLAPSED = 1e-6  # scores within this range count as equal
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of the large matrix products


@torch.inference_mode()
def encode_images(model: LHSC, dataset: PrecompDataset, device: torch.device) -> EncodedImages:
    """Encode every image of the split once. Each of several processes encodes its share."""
    rows = rank_slice(dataset.n_images)
    n_blocks = -(-(rows.stop - rows.start) // ENCODE_BATCH)
    D, fused = model.image_encoder.fc.out_features, model.image_encoder.graph.fused_weights()
    regions = [torch.empty(0, model.num_regions, D, device=device)]  # a share may be empty
    images = [torch.empty(0, D, device=device)]
    for block in progress(dataset.image_blocks(ENCODE_BATCH, rows), n_blocks, "encoding images"):
        regions.append(model.image_encoder(block.to(device), fused))
        images.append(model.similarity.image_global(regions[-1]))
    return EncodedImages(torch.cat(regions), torch.cat(images))


@torch.inference_mode()
def encode_captions(model: LHSC, dataset: Captions, device: torch.device) -> EncodedCaptions:
    """Encode every caption, 100 at a time, sorted by length so that there is little padding.

    With the official padding it matters which captions share a batch, so file order is kept. Each
    of several processes encodes its share of the batches, and all of them get all captions.
    """
    lengths = dataset.lengths
    in_file_order = model.text_encoder.padding == "official"
    order = torch.arange(len(lengths)) if in_file_order else lengths.argsort(stable=True)
    start = (lengths.cumsum(0) - lengths).to(device)  # of each caption's words
    D = model.image_encoder.fc.out_features
    word_emb = torch.zeros(int(lengths.sum()), D, device=device)
    caption_global = torch.zeros(len(lengths), D, device=device)
    local = rank_slice(-(-len(order) // ENCODE_BATCH))
    order = order[local.start * ENCODE_BATCH : local.stop * ENCODE_BATCH]
    blocks = dataset.caption_blocks(order, ENCODE_BATCH) if len(order) else ()
    for captions, n, block in progress(blocks, local.stop - local.start, "encoding captions"):
        captions, n, block = captions.to(device), n.to(device), block.to(device)
        size = max(1, ATTENTION_NUMEL // captions.shape[1] ** 2)  # self-attention is (C, L, L)
        for part in torch.arange(len(n)).split(len(n) if in_file_order else size):
            words, index = model.text_encoder(captions[part], n[part]), caption_index_of(n[part])
            within = torch.arange(len(words), device=device) - (n[part].cumsum(0) - n[part])[index]
            word_emb[start[block[part]][index] + within] = words
            caption_global[block[part]] = model.similarity.caption_global(words, n[part])
    word_emb, caption_global = map(distributed.all_reduce_sum, (word_emb, caption_global))
    return EncodedCaptions(word_emb, caption_global, lengths.to(device))


@torch.inference_mode()
def score(
    model: LHSC,
    images: EncodedImages,
    captions: EncodedCaptions,
    dtype: torch.dtype = torch.float32,
) -> np.ndarray:
    """Scores of all images × all captions: float32 (n_images, n_captions) on the CPU.

    dtype: used for the large matrix products. Time grows with images × words. Memory: the result
    and one chunk.
    """
    n_images, n_words = SCORE_CHUNK[images.image_global.device.type]
    sims = np.empty((len(images.image_global), len(captions.lengths)), dtype=np.float32)
    chunks = caption_chunks(captions.lengths, n_words)
    for columns in progress(chunks, len(chunks), "scoring"):
        part = captions.rows(columns)
        for start in range(0, len(sims), n_images):
            rows = slice(start, start + n_images)
            tile = model.similarity.score(images.rows(rows), part, dtype)
            sims[rows, columns] = tile.float().cpu().numpy()
    return sims


def caption_chunks(lengths: torch.Tensor, n_words: int) -> list[slice]:
    """Consecutive captions with at most `n_words` words in total (or one longer caption)."""
    chunks, start, words = [], 0, 0
    for caption, length in enumerate(lengths.tolist()):
        if words and words + length > n_words:
            chunks.append(slice(start, caption))
            start, words = caption, 0
        words += length
    return [*chunks, slice(start, len(lengths))] if words else chunks


def fold_slices(n_images: int, n_captions: int) -> list[tuple[slice, slice]]:
    """Five equal, consecutive folds: the images and the captions of each.

    Raises InputError if the images cannot be divided into five.
    """
    if n_images % N_FOLDS or n_captions % n_images:
        raise InputError(f"--fold5: {n_images} images do not make {N_FOLDS} equal folds")
    rows, columns = n_images // N_FOLDS, n_captions // N_FOLDS
    return [
        (slice(k * rows, (k + 1) * rows), slice(k * columns, (k + 1) * columns))
        for k in range(N_FOLDS)
    ]


def local_slice(rows: slice, dataset: PrecompDataset) -> slice:
    """The part of `rows` that this process has encoded, counted from its first image."""
    own = rank_slice(dataset.n_images)
    start = min(max(rows.start, own.start), own.stop)
    return slice(start - own.start, max(start, min(rows.stop, own.stop)) - own.start)


def evaluate(
    models: list[LHSC],
    dataset: PrecompDataset,
    device: torch.device,
    fold5: bool = False,
    want_sims: bool = True,
    precision: str = "fp32",
    bootstrap: int = 0,
    bank: PrecompDataset | None = None,
    beta: float = 20.0,
) -> tuple[dict, np.ndarray | None]:
    """Metrics of a model, or of an ensemble (the mean of the scores), and the score matrix.

    bank: training images and captions for metrics.qb_norm with this beta. It changes the metrics
    but not the matrix.

    With `fold5` and without `want_sims`, only the blocks of the folds are scored, a fifth of the
    work, and no matrix is returned. Each of several processes scores its share of the images; all
    return the same.

    Raises InputError if a score is not finite.
    """
    folds = fold_slices(dataset.n_images, len(dataset)) if fold5 else []
    whole = (slice(0, dataset.n_images), slice(0, len(dataset)))
    wanted = folds if fold5 and not want_sims else [whole]
    products = [(dataset, i, dataset, c) for i, c in wanted]  # whose images, whose captions
    if bank is not None:
        products += [(bank, slice(0, bank.n_images), dataset, whole[1])]
        products += [(dataset, whole[0], bank, slice(0, len(bank)))]
    totals = [np.float32(0)] * len(products)
    for model in models:
        sets = [dataset] if bank is None else [dataset, bank]
        images = {data: encode_images(model, data, device) for data in sets}
        captions = {data: encode_captions(model, data, device) for data in sets}
        for k, (x, i, y, c) in enumerate(products):
            parts = images[x].rows(local_slice(i, x)), captions[y].rows(c)
            totals[k] = totals[k] + score(model, *parts, PRECISIONS[precision])
    blocks = [
        np.concatenate(distributed.all_gather_object(total / np.float32(len(models))))
        for total in totals
    ]
    blocks, banks = blocks[: len(wanted)], blocks[len(wanted) :]
    matrix = blocks[0] if wanted == [whole] else None
    if fold5 and matrix is not None:
        blocks = [matrix[i, c] for i, c in folds]
    if is_main_process() and any(np.ptp(block) < COLLAPSED for block in blocks):
        print(
            f"warning: all scores lie within {COLLAPSED:g}: the model has collapsed. Ties count "
            "against it, so these recalls are not above chance",
            file=sys.stderr,
        )
    image_of_caption = dataset.image_of_caption[folds[0][1] if fold5 else slice(None)]
    by_way = [(block, block) for block in blocks]  # scores for i2t, for t2i
    if bank is not None:
        of_images, of_captions = banks  # bank images × all captions, all images × bank captions
        by_way = [
            qb_norm_both_ways(block, of_images[:, c], of_captions[i], beta)
            for block, (i, c) in zip(blocks, folds or [whole], strict=True)
        ]
    try:
        results = [retrieval_metrics(i2t, image_of_caption, t2i) for i2t, t2i in by_way]
    except ValueError as error:
        raise InputError(f"{dataset.name} {dataset.split}: {error}") from error
    metrics = mean_metrics(results) if fold5 else results[0]
    if bootstrap:
        hits = [image_hits(i2t, image_of_caption, t2i) for i2t, t2i in by_way]
        metrics["bootstrap"] = bootstrap_intervals(hits, bootstrap)
    return metrics, matrix


# -- reports --------------------------------------------------------------------------------------


def protocol(data_name: str, split: str, n_images: int, fold5: bool) -> str:
    """The name of the evaluation protocol."""
    coco_testall = data_name.startswith("coco") and split == "testall" and n_images == 5000
    if fold5:
        name = "COCO 1K" if coco_testall else f"{data_name} {split}"
        return f"{name}, mean of five folds of {n_images // N_FOLDS:,} images"
    if coco_testall:
        return "COCO 5K"
    if data_name.startswith("coco") and split == "test":
        return (
            f"COCO first {n_images:,} of testall: not comparable with COCO 1K, which is the mean "
            f"of five folds (--split testall --fold5)"
        )
    if data_name.startswith("f30k") and split == "test" and n_images == 1000:
        return "F30K 1K"
    return f"{data_name} {split}, {n_images:,} images"


WAYS = {"i2t": "image to text", "t2i": "text to image"}


def report(metrics: dict) -> str:
    """The metrics as a small table."""
    lines = [f"{'':16}{'R@1':>7}{'R@5':>7}{'R@10':>7}{'medr':>7}{'meanr':>8}"]
    for way, name in WAYS.items():
        m = metrics[way]
        lines.append(
            f"{name:16}{m['r1']:7.1f}{m['r5']:7.1f}{m['r10']:7.1f}{m['medr']:7.1f}{m['meanr']:8.1f}"
        )
    folds = [f"{fold['rsum']:.1f}" for fold in metrics.get("folds", [])]
    lines.append(f"rsum {metrics['rsum']:.1f}" + f"  {folds}" * bool(folds))
    if intervals := metrics.get("bootstrap"):
        n = intervals["samples"]
        lines.append(f"95 % intervals, {n:,} bootstrap samples of the images:")
        for way, name in WAYS.items():
            spans = (f"{low:.1f} – {high:.1f}" for low, high in intervals[way].values())
            lines.append(f"{name:16}" + "".join(f"{span:>16}" for span in spans))
        low, high = intervals["rsum"]
        lines.append(f"rsum {low:.1f} – {high:.1f}")
    return "\n".join(lines)


# -- the command ----------------------------------------------------------------------------------


def load(path: str | Path, opt: argparse.Namespace) -> tuple[LHSC, dict, Vocabulary]:
    """A model, its options (those of `opt` that are not None override them), and its vocabulary.

    Raises InputError if the checkpoint or its vocabulary is missing, or they do not match.
    """
    checkpoint = load_checkpoint(path)
    model = model_from(checkpoint, path)
    given = {k: v for k, v in vars(opt).items() if v is not None}
    settings = {"data_path": "./data", "vocab_path": "./vocab"} | checkpoint["opt"] | given
    if "data_name" not in settings:
        raise InputError(f"{path}: it does not name its data set; give --data_name")
    # A model keeps the vocabulary of the data it was trained on, whatever it is evaluated on.
    trained_on = checkpoint["opt"].get("data_name", settings["data_name"])
    file = Path(path).with_name("vocab.json")  # an exported model has its vocabulary beside it
    if given.get("vocab_path") or not file.is_file():
        file = vocab_file(settings["vocab_path"], trained_on)
    vocab = Vocabulary.load(file)
    expected = checkpoint["opt"]["vocab_size"]
    fingerprint = vocab.fingerprint()
    if len(vocab) != expected or checkpoint.get("vocab", fingerprint) != fingerprint:
        raise InputError(
            f"{file}: not the vocabulary {path} was trained with ({len(vocab)} words here, "
            f"{expected} there); name the folder of the right one with --vocab_path"
        )
    return model, settings, vocab


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Evaluate LHSC: recalls in both directions.", allow_abbrev=False
    )
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--model_path", default=[DEFAULT_MODEL], nargs="+", metavar="CKPT",
        help="checkpoint; the scores of several are averaged")
    add("--data_path", default=None, help="folder of the data sets")
    add("--data_name", default=None, help="the data set's folder in data_path")
    add("--vocab_path", default=None, help="folder of the vocabularies")
    add("--split", default="test", choices=["dev", "test", "testall"])
    add("--fold5", default=False, action=switch,
        help="mean over five folds (COCO 1K, with --split testall)")
    add("--save_sims", default=None, metavar="F.npy",
        help="write the scores, float32 (n_images, n_captions)")
    add("--save_metrics", default=None, metavar="F.json", help="write the metrics")
    add("--qb_norm", default=0.0, type=number(0), metavar="BETA",
        help="querybank normalisation, e.g. 20: subtracts the hubness of images and captions, "
        "measured with 5,000 training captions and their images; 0 = none")
    add("--bootstrap", default=0, type=at_least(0), metavar="N",
        help="95%% intervals from N bootstrap samples of the images, e.g. 1000")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--matmul", default="auto", choices=["auto", "default", "onednn"],
        help="library for float32 matmul on the CPU; auto: oneDNN where it is exact and faster")
    add("--precision", default="fp32", choices=[*PRECISIONS],
        help="of the large matrix products; bf16 is faster and changes scores in the third "
        "decimal")
    return parser  # fmt: skip


def run(opt: argparse.Namespace, device: torch.device) -> dict:
    """Run the command; returns the metrics that it prints."""
    check_targets(opt.save_sims, opt.save_metrics)
    choose_matmul(device, opt.matmul)
    paths = [opt.model_path] if isinstance(opt.model_path, str | Path) else opt.model_path
    loaded = [load(path, opt) for path in paths]
    models = [model.to(device) for model, _, _ in loaded]
    _, settings, vocab = loaded[0]
    for path, (_, _, other) in zip(paths, loaded, strict=True):
        if other.fingerprint() != vocab.fingerprint():
            raise InputError(f"{path}: an ensemble needs one vocabulary, this has another")
    sizes = {(o["img_dim"], o["num_regions"]) for _, o, _ in loaded}
    if len(sizes) > 1:
        raise InputError(f"an ensemble needs one kind of regions, found {sorted(sizes)}")
    limit = settings.get("val_captions") if opt.split == "dev" else None
    where, size = (settings["data_path"], settings["data_name"]), sizes.pop()
    dataset = PrecompDataset(*where, opt.split, vocab, *size, limit)
    bank = PrecompDataset(*where, "train", vocab, *size, BANK_CAPTIONS) if opt.qb_norm else None
    want_sims = opt.save_sims is not None or not opt.fold5
    metrics, sims = evaluate(
        models, dataset, device, opt.fold5, want_sims, opt.precision, opt.bootstrap, bank,
        opt.qb_norm,
    )  # fmt: skip
    if not is_main_process():
        return metrics
    name = protocol(dataset.name, dataset.split, dataset.n_images, opt.fold5)
    notes = [f"ensemble of {len(models)}"] * (len(models) > 1)
    notes += [f"QB-Norm {opt.qb_norm:g}"] * bool(opt.qb_norm)
    about = f"{dataset.n_images:,} images", f"{len(dataset):,} captions", *notes
    print(f"{name} ({', '.join(about)})")
    print(report(metrics), flush=True)
    if opt.save_sims is not None:
        atomic_write(opt.save_sims, lambda file: np.save(file, sims))
    if opt.save_metrics is not None:
        write_json(opt.save_metrics, metrics | {"protocol": name, "qb_norm": opt.qb_norm})
    return metrics


def evalrank(
    model_path: str | Path,
    data_path: str | Path | None = None,
    split: str = "dev",
    fold5: bool = False,
    **others: object,
) -> dict:
    """Evaluate a checkpoint on a split: prints the metrics and returns them.

    others: any other command-line option by name (vocab_path, data_name, device, …).

    Raises InputError for anything wrong with the files.
    """
    opt = options().parse_args([])
    if unknown := sorted(others.keys() - vars(opt).keys()):
        raise TypeError(f"evalrank has no option {unknown[0]}")
    given = {"model_path": model_path, "data_path": data_path, "split": split, "fold5": fold5}
    opt = argparse.Namespace(**vars(opt) | given | others)
    return run(opt, select_device(opt.device))


@one_line
def main() -> None:
    opt = options().parse_args()
    reuse_freed_memory()
    with distributed.process_group(select_device(opt.device)) as device:
        run(opt, device)


if __name__ == "__main__":
    main()
