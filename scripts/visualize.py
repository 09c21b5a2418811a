"""Figures of what a model retrieves and why, and a report on a run.

    python scripts/visualize.py retrieval --sims sims.npy --data_name scenes_precomp \\
        --pictures data/scenes_images/test        # sims.npy: evaluation.py --save_sims
    python scripts/visualize.py attention --image 0 --caption "a red ball above a blue box" \\
        --model_path runs/demo/checkpoint/model_best.pth.tar --pictures data/scenes_images/test
    python scripts/visualize.py curves runs/demo/checkpoint [MORE RUNS] --out curves.pdf
    python scripts/visualize.py layers runs/*/checkpoint/model_best.pth.tar
    python scripts/visualize.py report --model_path CKPT --pictures FOLDER --out report.html

Pictures are found by the ids in {split}_ids.txt. The boxes of regions are in {split}_boxes.npy.
Without --pictures the ids are shown; without boxes the attention is a table of words × regions.

Shape letters: R regions, L words of a caption, D joint size.
"""

from __future__ import annotations

import argparse
import base64
import io
import itertools
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import jinja2
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogFormatter
from PIL import Image
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from compare import load_sims
from diagnose import read_lines
from extract_features import find_picture, read_picture

from baselines import AttendedSimilarity, with_local_alignments
from data import Captions, PrecompDataset, find_files, read_boxes, read_ids
from evaluation import DEFAULT_MODEL, encode_captions, encode_images, evaluate, load, protocol
from metrics import i2t_ranks, t2i_ranks
from model import LHSC, EncodedImages
from utils import (
    InputError,
    at_least,
    atomic_write,
    check_targets,
    one_line,
    select_device,
    write_text,
)
from vocab import Vocabulary, read_captions, tokenize

RIGHT, HEAT = "#1a8a5f", "#d7301f"
TOP = 5  # answers shown per query
COLUMNS = 6  # pictures side by side in an attention figure
THUMBNAIL = 240  # pixels per side, in the report
plt.rcParams["text.parse_math"] = False  # a $ in a caption or a file name is a dollar sign

# -- what a score is made of ----------------------------------------------------------------------


class Explanation(NamedTuple):
    """The parts of one score. L counts the caption's words with <start> and <end>."""

    words: list[str]  # L of them
    unknown: list[bool]  # (L,) whether the model knows the word only as <unk>
    attention: np.ndarray  # (L, R) weights of each word over the regions; rows sum to 1
    gates: np.ndarray  # (L,) weights of the local alignments in the score …
    global_gate: float  # … and of the global one; together they sum to 1
    region_weights: np.ndarray  # (R,) of the global image vector; 0 in a model without one
    score: float


@torch.inference_mode()
def explain(model: LHSC, vocab: Vocabulary, region_emb: Tensor, caption: str) -> Explanation:
    """Explain the score of an encoded image, region_emb (1, R, D), and a caption.

    The model must be in eval mode. Raises InputError if it has no local alignments.
    """
    similarity = with_local_alignments(model.similarity)
    words = ["<start>", *tokenize(caption), "<end>"]
    images = EncodedImages(region_emb, similarity.image_global(region_emb))
    captions = encode_captions(model, Captions([caption], vocab), region_emb.device)
    parts = similarity.alignments(images, captions)
    if isinstance(similarity, AttendedSimilarity):
        pooled = similarity.region_pooling(parts.weights, region_emb, captions.lengths)[0, 0]
        region_weights = pooled / pooled.sum()  # (R,)
    elif parts.global_ is not None:
        region_weights = similarity.region_pooling.weights(region_emb)[0]  # (R,)
    else:
        region_weights = torch.zeros(region_emb.shape[1])
    return Explanation(
        words=words,
        unknown=[word not in vocab.word2idx for word in words],
        attention=(parts.weights[0] / parts.weights[0].sum(-1, keepdim=True)).cpu().numpy(),
        gates=parts.local_gate[0].cpu().numpy(),
        global_gate=0.0 if parts.global_gate is None else parts.global_gate.item(),
        region_weights=region_weights.cpu().numpy(),
        score=similarity.score(images, captions).item(),
    )


class Split:
    """The model of a checkpoint, and the split of its data set that `opt` names."""

    def __init__(self, path: str | Path, opt: argparse.Namespace) -> None:
        model, settings, self.vocab = load(path, opt)
        where = settings["data_path"], settings["data_name"], opt.split
        sizes = model.image_encoder.fc.in_features, settings["num_regions"]
        self.data = PrecompDataset(*where, self.vocab, *sizes)
        self.device, self.pictures = select_device(opt.device), opt.pictures
        self.model = model.to(self.device)
        file = find_files(*where)[0].with_name(f"{opt.split}_boxes.npy")
        self.boxes = read_boxes(file, self.data.n_images, self.data.regions.num_regions)

    def picture(self, image: int) -> tuple[Image.Image | None, np.ndarray | None]:
        """The picture of an image, and its boxes (R, 4); None if unknown."""
        path = find_picture(self.pictures, self.data.image_ids[image])
        boxes = None if self.boxes is None else self.boxes[image]
        return read_picture(path) if path else None, boxes

    @torch.inference_mode()
    def explain(self, image: int, caption: str) -> Explanation:
        regions = self.data.image(image).to(self.device)  # (R, img_dim)
        return explain(self.model, self.vocab, self.model.image_encoder(regions[None]), caption)


def shares_of(boxes: np.ndarray, picture: Image.Image | None) -> np.ndarray:
    """Boxes (R, 4), in pixels or as fractions of the picture -> as fractions of the picture.

    If the picture is not known, the largest x2 and y2 are used as its size.
    """
    boxes = np.asarray(boxes)
    size = picture.size if picture else boxes[:, 2:].max(axis=0)
    return boxes if boxes.max() <= 1 else boxes / np.tile(size, 2)


# -- retrieval ------------------------------------------------------------------------------------


def spread(ranks: np.ndarray, n: int) -> np.ndarray:
    """n queries evenly spaced by rank, from the best to the worst."""
    order = np.argsort(ranks, kind="stable")
    return order[np.linspace(0, len(order) - 1, n).round().astype(int)]


def best(scores: np.ndarray) -> np.ndarray:
    return np.argsort(-scores, kind="stable")[:TOP]


def show(ax: Axes, text: str, picture: Path | None = None, right: bool = False) -> None:
    """A picture, or a text where there is none; a right answer has a thick frame."""
    ax.set(xticks=[], yticks=[])
    if picture:
        ax.imshow(read_picture(picture))
    else:
        wrapped = textwrap.fill(text, 17, max_lines=8)
        ax.text(0.5, 0.5, wrapped, ha="center", va="center", fontsize=8, transform=ax.transAxes)
        ax.set_box_aspect(1)
    ax.spines[:].set(color=RIGHT if right else "#c9c9c9", linewidth=4 if right else 1)


def draw_retrieval(opt: argparse.Namespace) -> plt.Figure:
    """Text to image on the left, image to text on the right; right answers are framed."""
    _, caps, ids_file = find_files(opt.data_path or "./data", opt.data_name, opt.split)
    captions = read_captions(caps)
    sims = load_sims(opt.sims)
    n_images, n_captions = sims.shape
    if n_captions != len(captions):
        raise InputError(f"{opt.sims}: scores {sims.shape} do not fit {len(captions)} captions")
    ids = read_ids(ids_file, n_images)
    files, top = [find_picture(opt.pictures, name) for name in ids], min(TOP, n_images)
    image_of_caption = np.arange(n_captions) // (n_captions // n_images)
    size = (3 * top + 3, 1.5 * opt.queries + 0.4)
    fig, axes = plt.subplots(opt.queries, 2 + 2 * top, squeeze=False, figsize=size)
    fig.subplots_adjust(0.005, 0.01, 0.995, 1 - 0.4 / size[1], wspace=0.06, hspace=0.06)
    titles = {0: "caption", 1: "best images", 1 + top: "image", 2 + top: "best captions"}
    for column, title in titles.items():
        axes[0, column].set_title(title, loc="left", weight="bold")
    ranks = t2i_ranks(sims, image_of_caption), i2t_ranks(sims, image_of_caption)
    queries = (spread(of_way, opt.queries) for of_way in ranks)
    for row, caption, image in zip(axes, *queries, strict=True):
        show(row[0], captions[caption])
        for ax, k in zip(row[1:], best(sims[:, caption]), strict=False):
            show(ax, ids[k], files[k], k == image_of_caption[caption])
        show(row[1 + top], ids[image], files[image])
        for ax, k in zip(row[2 + top :], best(sims[image])[:top], strict=True):
            show(ax, captions[k], right=image_of_caption[k] == image)
    return fig


# -- attention ------------------------------------------------------------------------------------


def attention_figure(
    why: Explanation, picture: Image.Image | None, boxes: np.ndarray | None
) -> plt.Figure:
    """What the global image vector and each word attend to, with their gates in the score.

    With boxes (R, 4), weights are drawn on the picture: more opaque means a higher weight. Without
    boxes they are a table of words × regions.
    """
    rows = np.vstack([why.region_weights, why.attention])  # (1 + L, R)
    words = [w + "*" * new for w, new in zip(why.words, why.unknown, strict=True)]
    gates = [why.global_gate, *why.gates]
    labels = [f"{w} · {gate:.0%}" for w, gate in zip(["whole image", *words], gates, strict=True)]
    n = len(labels)
    if boxes is None:
        fig, ax = plt.subplots(figsize=(12, 0.28 * n + 1), layout="constrained")
        ax.set_yticks(np.arange(n), labels)
        ax.set_xlabel("region")
        fig.colorbar(ax.imshow(rows, cmap="Reds", aspect="auto", vmin=0), label="attention")
    else:
        height = -(-n // COLUMNS)
        size = (2.1 * COLUMNS, 2.35 * height + 0.4)
        fig, axes = plt.subplots(height, COLUMNS, squeeze=False, figsize=size, layout="constrained")
        aspect = picture.height / picture.width if picture else 1
        for ax, label, weights in zip(axes.flat, labels, rows, strict=False):
            ax.imshow(picture or np.ones((1, 1, 3)), extent=(0, 1, 1, 0))
            ax.set(xticks=[], yticks=[], aspect=aspect)
            ax.set_title(label, fontsize=9)
            opacity = 0.75 * (weights / max(weights.max(), 1e-12)) ** 2  # as in the report
            for (x1, y1, x2, y2), alpha in zip(shares_of(boxes, picture), opacity, strict=True):
                ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, color=HEAT, alpha=alpha, lw=0))
        for ax in axes.flat[n:]:
            ax.axis("off")
    fig.suptitle(f"score {why.score:.3f}   (* unknown to the model)", fontsize=10)
    return fig


def draw_attention(opt: argparse.Namespace) -> plt.Figure:
    split = Split(opt.model_path, opt)
    n = split.data.n_images
    names = [*split.data.image_ids, *map(str, range(n))]
    if opt.image not in names:
        raise InputError(f"--image {opt.image}: neither an image's id nor a number below {n}")
    image = names.index(opt.image) % n
    caption = opt.caption or split.data.texts[image * split.data.captions_per_image]
    return attention_figure(split.explain(image, caption), *split.picture(image))


# -- curves and layers ----------------------------------------------------------------------------


def read_log(path: Path) -> dict[str, list[dict]]:
    """The lines of a run's metrics.jsonl (a file, or the folder that holds it) by type."""
    lines = read_lines(path / "metrics.jsonl" if path.is_dir() else path)
    kinds = "run", "resume", "train", "dev"
    return {kind: [x for x in lines if x["type"] == kind] for kind in kinds}


def curves_figure(logs: dict[str, dict[str, list[dict]]]) -> plt.Figure:
    """Training loss, dev rsum and dev R@1 of one or several runs, over optimizer steps."""
    fig, (loss, rsum, r1) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    loss.set(title="training loss", yscale="log")
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    rsum.set(title="dev rsum")
    r1.set(title="dev R@1 (%)")
    for k, (name, log) in enumerate(logs.items()):
        color, train, dev = f"C{k}", log["train"], log["dev"]
        loss.plot([x["step"] for x in train], [x["loss"] for x in train], color=color)
        arguments = log["run"][0]["arguments"] if log["run"] else {}
        warmup = [x["step"] for x in train if x["epoch"] < arguments.get("warmup_epochs", 0)]
        if warmup:  # its loss sums all negatives, which makes it much larger
            loss.axvline(max(warmup), color=color, ls=":")
            loss.set_title("training loss (dotted: hardest negatives start)")
        steps = [x["step"] for x in dev]
        rsum.plot(steps, [x["rsum"] for x in dev], "o-", ms=3, color=color, label=name)
        for way, style in (("i2t", "-"), ("t2i", "--")):
            label = way if k == 0 else None
            r1.plot(steps, [x[way]["r1"] for x in dev], style, color=color, label=label)
    for ax in (loss, rsum, r1):
        ax.set_xlabel("step")
        ax.grid(alpha=0.25)
    rsum.legend(fontsize=8)
    r1.legend(fontsize=8)
    return fig


def draw_curves(opt: argparse.Namespace) -> plt.Figure:
    return curves_figure({str(path): read_log(path) for path in opt.runs})


@torch.inference_mode()
def layer_updates(split: Split) -> dict[str, list[float]]:
    """‖layer(x) − x‖ / ‖x‖ of each layer, the mean over all regions and words.

    Returns {"graph": [one number per layer], "word": […]}. With the official padding the layers
    see padded words too, and those are included.
    """
    model, ratios = split.model, defaultdict(list)

    def record(layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        x = inputs[0]
        ratio = (output - x).norm(dim=-1) / x.norm(dim=-1)  # (B, R) or (W,)
        ratios[layer].append(ratio.flatten())

    kinds = {"graph": model.image_encoder.graph.layers, "word": model.text_encoder.self_attention}
    for layer in itertools.chain(*kinds.values()):
        layer.register_forward_hook(record)
    encode_images(model, split.data, split.device)
    encode_captions(model, split.data, split.device)
    return {k: [torch.cat(ratios[x]).mean().item() for x in layers] for k, layers in kinds.items()}


def draw_layers(opt: argparse.Namespace) -> plt.Figure:
    """The layer_updates of one or several models."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
    for path in opt.checkpoints:
        means = layer_updates(Split(path, opt))
        for ax, kind in zip(axes, means, strict=True):
            ax.plot(range(1, len(means[kind]) + 1), means[kind], "o-", ms=4, label=path)
            ax.set(title=f"{kind} layers: update / input", xlabel="layer")
    for ax in axes:
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.25)
    axes[0].set_ylim(bottom=0)
    axes[0].legend(fontsize=8)
    return fig


# -- report ---------------------------------------------------------------------------------------


def data_url(mime: str, write: Callable[[BinaryIO], object]) -> str:
    """An image that `write(file)` writes, as a data URL."""
    buffer = io.BytesIO()
    write(buffer)
    return f"data:{mime};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def shown_image(split: Split, image: int, score: float, right: bool) -> dict:
    """An image for the page: its id, picture (or None), boxes in percent, score."""
    (picture, boxes), url = split.picture(image), None
    percent = [] if boxes is None else (100 * shares_of(boxes, picture)).round(1).tolist()
    if picture:
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        url = data_url("image/jpeg", lambda file: picture.save(file, "JPEG", quality=85))
    id = split.data.image_ids[image]
    return {"id": id, "url": url, "boxes": percent, "score": score, "right": right}


def shown_query(split: Split, caption: int, rank: int, scores: np.ndarray) -> dict:
    """A caption for the page: the attention of its words over its own image, and its answers."""
    image = int(split.data.image_of_caption[caption])
    why = split.explain(image, split.data.texts[caption])
    weights = (why.attention / why.attention.max(1, keepdims=True)).round(2).tolist()
    answers = [shown_image(split, k, scores[k], k == image) for k in best(scores).tolist()]
    return {"words": list(zip(why.words, weights, why.gates.tolist(), strict=True)),
            "rank": rank + 1, "image": shown_image(split, image, scores[image], True),
            "answers": answers}  # fmt: skip


def write_report(opt: argparse.Namespace) -> str:
    """The whole page; the template engine escapes all texts."""
    split = Split(opt.model_path, opt)
    with_local_alignments(split.model.similarity)  # refused before the evaluation
    metrics, sims = evaluate([split.model], split.data, split.device)
    image_of_caption = split.data.image_of_caption
    ranks = t2i_ranks(sims, image_of_caption)
    order = np.argsort(ranks, kind="stable")
    queries = {}
    for kind, captions in (("best", order), ("worst", order[::-1])):
        _, first = np.unique(image_of_caption[captions], return_index=True)  # one per image
        chosen = captions[np.sort(first)][: opt.queries].tolist()
        queries[kind] = [shown_query(split, k, int(ranks[k]), sims[:, k]) for k in chosen]
    run, curves, file = {}, None, Path(opt.model_path).with_name("metrics.jsonl")
    if file.is_file():
        log = read_log(file)
        run, fig = log["run"][0], curves_figure({"run": log})
        curves = data_url("image/svg+xml", lambda file: fig.savefig(file, format="svg"))
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(loader=folder, autoescape=True).get_template("report_template.html")
    title = f"{opt.model_path}: {protocol(split.data.name, opt.split, split.data.n_images, False)}"
    return page.render(title=title, metrics=metrics, curves=curves, queries=queries, run=run,
                       has_boxes=split.boxes is not None)  # fmt: skip


# -- the command line -----------------------------------------------------------------------------


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, work: Callable, help: str) -> Callable:
        one = commands.add_parser(name, help=help, allow_abbrev=False)
        one.set_defaults(work=work, pictures=None)
        add, out = one.add_argument, Path(f"{name}.html" if name == "report" else f"{name}.png")
        add("--out", default=out, type=Path, help=f"file to write ({out})")
        add("--overwrite", action="store_true", help="replace a file that exists")
        if name != "curves":
            add("--data_path", help="folder of the data sets")
            add("--data_name", required=name == "retrieval", help="data set's folder in data_path")
            add("--vocab_path", help="folder of the vocabularies")
            add("--split", default="test", help="the split to show (test)")
            add("--pictures", type=Path, help="folder of the pictures")
            add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
        return add

    add = command("retrieval", draw_retrieval, "queries with their best answers")
    add("--sims", required=True, type=Path, help="from evaluation.py --save_sims")
    add("--queries", default=5, type=at_least(1), help="how many of each kind (5)")
    add = command("attention", draw_attention, "what each word attends to")
    add("--model_path", default=DEFAULT_MODEL, help="the checkpoint")
    add("--image", default="0", help="image id, or its number in the split (0)")
    add("--caption", help="any sentence (the image's first caption)")
    add = command("curves", draw_curves, "loss and dev recall of runs")
    add("runs", nargs="+", type=Path, help="folders with a metrics.jsonl")
    add = command("layers", draw_layers, "how much each layer changes its input")
    add("checkpoints", nargs="+", type=Path)
    add = command("report", write_report, "one page about a run")
    add("--model_path", default=DEFAULT_MODEL, help="the checkpoint")
    add("--queries", default=8, type=at_least(1), help="best and worst captions shown (8)")
    return parser


@one_line
def main() -> None:
    opt = options().parse_args()
    if opt.pictures is not None and not opt.pictures.is_dir():
        raise InputError(f"{opt.pictures}: no such folder of pictures")
    kinds = (".html",) if opt.command == "report" else (".png", ".pdf", ".svg")
    if opt.out.suffix not in kinds:
        raise InputError(f"--out {opt.out}: should end in {' or '.join(kinds)}")
    if opt.out.exists() and not opt.overwrite:
        raise InputError(f"{opt.out}: exists already; name another --out, or give --overwrite")
    check_targets(opt.out)
    made = opt.work(opt)
    if isinstance(made, str):
        write_text(opt.out, made)
    else:
        suffix = opt.out.suffix[1:]
        atomic_write(opt.out, lambda file: made.savefig(file, format=suffix, dpi=110))
    print(opt.out)


if __name__ == "__main__":
    main()
