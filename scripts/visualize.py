"""Figures of what a model retrieves, and why; and a report of a run.

    python scripts/visualize.py retrieval --sims sims.npy --data_name scenes_precomp \\
        --pictures data/scenes_images/test        # sims.npy: evaluation.py --save_sims
    python scripts/visualize.py attention --image 0 --caption "a red ball above a blue box" \\
        --model_path runs/demo/checkpoint/model_best.pth.tar --pictures data/scenes_images/test
    python scripts/visualize.py curves runs/demo/checkpoint [MORE RUNS] --out curves.pdf
    python scripts/visualize.py layers runs/*/checkpoint/model_best.pth.tar --json layers.json
    python scripts/visualize.py report --model_path CKPT --pictures FOLDER --out report.html

Pictures are found by the ids in {split}_ids.txt, the boxes of regions in {split}_boxes.npy. Without
--pictures the ids are shown; without boxes the attention is a table of words × regions.

Shape letters: B images, C captions, R regions, L words of a caption, D joint size.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import jinja2
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter
from PIL import Image
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from compare import load_sims
from extract_features import find_picture, read_picture

from baselines import AttendedSimilarity, with_local_alignments
from data import PrecompDataset, find_files, read_boxes, read_ids
from evaluation import DEFAULT_MODEL, evaluate, load, protocol
from metrics import i2t_ranks, t2i_ranks
from model import LHSC, EncodedCaptions, EncodedImages
from utils import InputError, at_least, atomic_write, check_targets, one_line, select_device
from vocab import Vocabulary, read_captions, tokenize

RIGHT, HEAT = "#1a8a5f", "#d7301f"
TOP = 5  # answers shown to a query
THUMBNAIL = 240  # pixels a side, in the report
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
    word_weights: np.ndarray  # (L,) of the global caption vector; 0 in a model without one
    score: float


@torch.inference_mode()
def explain(model: LHSC, vocab: Vocabulary, regions: Tensor, caption: str) -> Explanation:
    """Explain the score of an image, regions (R, img_dim), and a caption; model in eval mode.

    Raises:
        InputError: for a model without local alignments.
    """
    return explain_embedded(model, vocab, model.image_encoder(regions.unsqueeze(0)), caption)


@torch.inference_mode()
def explain_embedded(
    model: LHSC, vocab: Vocabulary, region_emb: Tensor, caption: str
) -> Explanation:
    """Like explain, for an image that is already encoded: region_emb (1, R, D)."""
    similarity = with_local_alignments(model.similarity)
    ids = torch.tensor(vocab.encode(caption), device=region_emb.device)
    lengths = torch.tensor([len(ids)], device=region_emb.device)
    word_emb = model.text_encoder(ids.unsqueeze(0), lengths)  # (L, D)
    images = EncodedImages(region_emb, similarity.image_global(region_emb))
    captions = EncodedCaptions(word_emb, similarity.caption_global(word_emb, lengths), lengths)
    parts = similarity.alignments(images, captions)
    region_weights, word_weights = torch.zeros(region_emb.shape[1]), torch.zeros(len(ids))
    if parts.global_ is not None:
        word_weights = similarity.word_pooling.weights(word_emb, lengths)
        if isinstance(similarity, AttendedSimilarity):
            pooled = similarity.region_pooling(parts.weights, region_emb, lengths)[0, 0]
            region_weights = pooled / pooled.sum()
        else:
            region_weights = similarity.region_pooling.weights(region_emb)[0]
    return Explanation(
        words=["<start>", *tokenize(caption), "<end>"],
        unknown=(ids == vocab("<unk>")).tolist(),
        attention=(parts.weights[0] / parts.weights[0].sum(-1, keepdim=True)).cpu().numpy(),
        gates=parts.local_gate[0].cpu().numpy(),
        global_gate=0.0 if parts.global_gate is None else parts.global_gate.item(),
        region_weights=region_weights.cpu().numpy(),
        word_weights=word_weights.cpu().numpy(),
        score=similarity.score(images, captions).item(),
    )


class Split(NamedTuple):
    """A model and a split to show it on."""

    model: LHSC
    vocab: Vocabulary
    data: PrecompDataset
    boxes: np.ndarray | None  # (n_images, R, 4)
    pictures: Path | None
    device: torch.device

    @classmethod
    def open(cls, path: str | Path, opt: argparse.Namespace) -> Split:
        """The model of a checkpoint, and the split of its data set that `opt` names."""
        model, settings, vocab = load(path, opt)
        where = settings["data_path"], settings["data_name"], opt.split
        sizes = model.image_encoder.fc.in_features, settings["num_regions"]
        data, device = PrecompDataset(*where, vocab, *sizes), select_device(opt.device)
        file = find_files(*where)[0].with_name(f"{opt.split}_boxes.npy")
        boxes = read_boxes(file, data.n_images, data.regions.num_regions)
        return cls(model.to(device), vocab, data, boxes, opt.pictures, device)

    def picture(self, image: int) -> tuple[Image.Image | None, np.ndarray | None]:
        """The picture of an image, and its boxes (R, 4) as shares of it; None if unknown."""
        path = find_picture(self.pictures, self.data.image_ids[image])
        picture = read_picture(path) if path else None
        size = picture.size if picture else None
        return picture, None if self.boxes is None else shares_of(self.boxes[image], size)

    def explain(self, image: int, caption: str) -> Explanation:
        return explain(self.model, self.vocab, self.data.image(image).to(self.device), caption)


def shares_of(boxes: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """Boxes (R, 4), in pixels or as shares -> as shares of a picture of this (width, height).

    If the size is not known, the corner of the outermost boxes stands for it.
    """
    boxes = np.asarray(boxes)
    return boxes if boxes.max() <= 1 else boxes / np.tile(size or boxes[:, 2:].max(axis=0), 2)


# -- retrieval ------------------------------------------------------------------------------------


def spread(ranks: np.ndarray, n: int) -> np.ndarray:
    """n queries evenly spaced by rank, from the best to the worst."""
    order = np.argsort(ranks, kind="stable")
    return order[np.linspace(0, len(order) - 1, n).round().astype(int)]


def best(scores: np.ndarray, n: int = TOP) -> np.ndarray:
    return np.argsort(-scores, kind="stable")[:n]


def show(ax: Axes, text: str, picture: Path | None = None, right: bool = False) -> None:
    """A picture, or a text where there is none; a right answer has a frame."""
    ax.set(xticks=[], yticks=[])
    if picture:
        ax.imshow(read_picture(picture))
    else:
        wrapped = textwrap.fill(text, 17, max_lines=8)
        ax.text(0.5, 0.5, wrapped, ha="center", va="center", fontsize=8, transform=ax.transAxes)
        ax.set_box_aspect(1)
    ax.spines[:].set(color=RIGHT if right else "#c9c9c9", linewidth=4 if right else 1)


def retrieval_figure(
    sims: np.ndarray, captions: list[str], ids: list[str], folder: Path | None, n_queries: int = 5
) -> plt.Figure:
    """Text to image on the left, image to text on the right; right answers are framed."""
    n_images, n_captions = sims.shape
    image_of_caption = np.arange(n_captions) // (n_captions // n_images)
    files, top = [find_picture(folder, name) for name in ids], min(TOP, n_images)
    size = (3 * top + 3, 1.5 * n_queries + 0.4)
    fig, axes = plt.subplots(n_queries, 2 + 2 * top, squeeze=False, figsize=size)
    fig.subplots_adjust(0.005, 0.01, 0.995, 1 - 0.4 / size[1], wspace=0.06, hspace=0.06)
    titles = {0: "caption", 1: "best images", 1 + top: "image", 2 + top: "best captions"}
    for column, title in titles.items():
        axes[0, column].set_title(title, loc="left", weight="bold")
    t2i = spread(t2i_ranks(sims, image_of_caption), n_queries)
    i2t = spread(i2t_ranks(sims, image_of_caption), n_queries)
    for row, caption, image in zip(axes, t2i, i2t, strict=True):
        show(row[0], captions[caption])
        for ax, k in zip(row[1:], best(sims[:, caption], top), strict=False):
            show(ax, ids[k], files[k], k == image_of_caption[caption])
        show(row[1 + top], ids[image], files[image])
        for ax, k in zip(row[2 + top :], best(sims[image], top), strict=True):
            show(ax, captions[k], right=image_of_caption[k] == image)
    return fig


# -- attention ------------------------------------------------------------------------------------


def heat_map(weights: np.ndarray, boxes: np.ndarray, side: int = 96) -> np.ndarray:
    """Weights (R,) of boxes (R, 4), shares of the picture -> (side, side), the largest is 1.

    Each point has the mean weight of the boxes that hold it.
    """
    centre = (np.arange(side) + 0.5) / side
    x1, y1, x2, y2 = boxes.T[:, :, None]
    rows, columns = (y1 <= centre) & (centre < y2), (x1 <= centre) & (centre < x2)  # (R, side)
    inside = rows[:, :, None] & columns[:, None]  # (R, side, side)
    heat = np.tensordot(weights, inside, axes=1) / np.maximum(inside.sum(0), 1)
    return heat / max(heat.max(), 1e-12)


def draw_heat(
    ax: Axes, picture: Image.Image | None, weights: np.ndarray, boxes: np.ndarray
) -> None:
    """A picture, if there is one, under the weights of its regions."""
    width, height = picture.size if picture else (96, 96)
    extent = (0, width, height, 0)
    if picture:
        ax.imshow(picture, extent=extent)
    heat = heat_map(weights, boxes)
    red = np.ones((*heat.shape, 3)) * matplotlib.colors.to_rgb(HEAT)
    ax.imshow(red, alpha=0.75 * heat, extent=extent, interpolation="bilinear")
    ax.set(xticks=[], yticks=[])


def attention_figure(
    why: Explanation, picture: Image.Image | None, boxes: np.ndarray | None
) -> plt.Figure:
    """What each word attends to, how much it counts, and the weights of the global vectors."""
    n, columns = len(why.words), 6
    rows = -(-(n + 1) // columns)
    height = 2.35 * rows if boxes is not None else 0.28 * n + 1
    fig = plt.figure(figsize=(2.1 * columns, height + 2.6), layout="constrained")
    top, bottom = fig.subfigures(2, 1, height_ratios=(height, 2.6))
    if boxes is None:
        ax = top.subplots()
        image = ax.imshow(why.attention, cmap="Reds", aspect="auto", vmin=0)
        ax.set_yticks(np.arange(n), why.words)
        ax.set_xlabel("region")
        top.colorbar(image, ax=ax, label="attention")
    else:
        axes = top.subplots(rows, columns, squeeze=False).ravel()
        draw_heat(axes[0], picture, why.region_weights, boxes)
        axes[0].set_title(f"whole image · {why.global_gate:.0%}", fontsize=9, weight="bold")
        for k, ax in enumerate(axes[1 : n + 1]):
            draw_heat(ax, picture, why.attention[k], boxes)
            ax.set_title(f"{why.words[k]} · {why.gates[k]:.0%}", fontsize=9)
        for ax in axes[n + 1 :]:
            ax.axis("off")
    ax, at = bottom.subplots(), np.arange(n + 1)
    ax.bar(at - 0.2, [*why.gates, why.global_gate], 0.4, color=HEAT, label="gate in the score")
    ax.bar(at[:-1] + 0.2, why.word_weights, 0.4, label="weight in the global caption vector")
    names = [f"{w}*" if new else w for w, new in zip(why.words, why.unknown, strict=True)]
    ax.set_xticks(at, [*names, "whole image"], rotation=40, ha="right", fontsize=9)
    ax.set_title(f"score {why.score:.3f}   (* unknown to the model)", fontsize=10, loc="left")
    ax.legend(fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    return fig


# -- curves and layers ----------------------------------------------------------------------------


def read_log(path: Path) -> dict[str, list[dict]]:
    """The lines of a run's metrics.jsonl (a file, or the folder that holds it) by type.

    Raises:
        InputError: if there is none, or naming the line that is not one of train.py's.
    """
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{path}: no log of a run; train.py writes one beside the checkpoints")
    lines: dict[str, list[dict]] = {"run": [], "train": [], "dev": []}
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            lines.setdefault(line["type"], []).append(line)
        except (ValueError, TypeError, KeyError):
            message = f"{path}, line {number}: not a line of train.py's log: {text[:60]}"
            raise InputError(message) from None
    return lines


def run_names(paths: list[Path]) -> list[str]:
    """The folder of each run, without `checkpoint`; the whole paths if two are called the same."""
    folders = [path if path.is_dir() else path.parent for path in paths]
    names = [(f.parent if f.name == "checkpoint" else f).name for f in folders]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def curves_figure(logs: dict[str, dict[str, list[dict]]]) -> plt.Figure:
    """Training loss, dev rsum and dev R@1 of one or several runs, over optimizer steps."""
    fig, (loss, rsum, r1) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for k, (name, log) in enumerate(logs.items()):
        color, train, dev = f"C{k}", log["train"], log["dev"]
        loss.plot([x["step"] for x in train], [x["loss"] for x in train], color=color)
        arguments = log["run"][0]["arguments"] if log["run"] else {}
        warmup = [x["step"] for x in train if x["epoch"] < arguments.get("warmup_epochs", 0)]
        if warmup:  # its loss sums all negatives, which makes it much larger
            loss.axvline(max(warmup), color=color, ls=":")
            if not loss.texts:
                loss.text(max(warmup), 0.99, " hardest negatives from here", rotation=90, va="top",
                          fontsize=8, transform=loss.get_xaxis_transform())  # fmt: skip
        steps = [x["step"] for x in dev]
        rsum.plot(steps, [x["rsum"] for x in dev], "o-", ms=3, color=color, label=name)
        for way, style in (("i2t", "-"), ("t2i", "--")):
            label = way if k == 0 else None
            r1.plot(steps, [x[way]["r1"] for x in dev], style, color=color, label=label)
    loss.set_yscale("log")
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    for ax, title in ((loss, "training loss"), (rsum, "dev rsum"), (r1, "dev R@1 (%)")):
        ax.set(title=title, xlabel="step")
        ax.grid(alpha=0.25)
    rsum.legend(fontsize=8)
    r1.legend(fontsize=8)
    return fig


def relative_updates(layers: Iterable[nn.Module], x: Tensor, *others: object) -> list[Tensor]:
    """‖layer(x) − x‖ / ‖x‖ of each of some consecutive layers: x (…, D) -> (…) a layer."""
    found = []
    for layer in layers:
        before, x = x, layer(x, *others)
        found.append((x - before).norm(dim=-1) / before.norm(dim=-1))
    return found


@torch.inference_mode()
def layer_updates(split: Split) -> dict[str, list[float]]:
    """How large each layer's update is beside its input, the mean over all regions and words.

    Returns {"graph": [one number a layer], "word": […]}.
    """
    image_encoder, text_encoder = split.model.image_encoder, split.model.text_encoder
    graph, word = [], []
    for images in split.data.image_blocks(100):
        regions = image_encoder.fc(images.to(split.device))  # (B, R, D)
        graph.append(relative_updates(image_encoder.graph.layers, regions))
    for captions, lengths, _ in split.data.caption_blocks(split.data.lengths.argsort(), 100):
        mask = (torch.arange(captions.shape[1]) < lengths.unsqueeze(1)).to(split.device)  # (C, L)
        words = text_encoder.embed(captions.to(split.device))  # (C, L, word_dim)
        seen = mask if text_encoder.padding == "masked" else None
        updates = relative_updates(text_encoder.self_attention, words, seen)
        word.append([update[mask] for update in updates])
    means = {}
    for kind, blocks in (("graph", graph), ("word", word)):
        layers = zip(*blocks, strict=True)
        means[kind] = [torch.cat([x.flatten() for x in layer]).mean().item() for layer in layers]
    return means


def layers_figure(updates: dict[str, dict[str, list[float]]]) -> plt.Figure:
    """The layer_updates of one or several models, by name."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
    for ax, kind in zip(axes, ("graph", "word"), strict=True):
        for name, means in updates.items():
            ax.plot(range(1, len(means[kind]) + 1), means[kind], "o-", ms=4, label=name)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set(title=f"{kind} layers: update / input", xlabel="layer")
        ax.grid(alpha=0.25)
    axes[0].set_ylim(bottom=0)
    axes[0].legend(fontsize=8)
    return fig


# -- report ---------------------------------------------------------------------------------------


def data_url(mime: str, write: Callable[[BinaryIO], object]) -> str:
    """An image that `write(file)` writes, as an address that holds all of it."""
    buffer = io.BytesIO()
    write(buffer)
    return f"data:{mime};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def shown_image(split: Split, image: int, score: float, right: bool) -> dict:
    """An image for the page: its id, picture (or None), boxes in percent, score."""
    (picture, boxes), url = split.picture(image), None
    if picture:
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        url = data_url("image/jpeg", lambda file: picture.save(file, "JPEG", quality=85))
    percent = [] if boxes is None else (100 * boxes).round(1).tolist()
    id = split.data.image_ids[image]
    return {"id": id, "url": url, "boxes": percent, "score": score, "right": right}


def shown_query(split: Split, sims: np.ndarray, caption: int, rank: int) -> dict:
    """A caption for the page: the attention of its words in its own image, and its answers."""
    image = int(split.data.image_of_caption[caption])
    why = split.explain(image, split.data.texts[caption])
    weights = (why.attention / why.attention.max(1, keepdims=True)).round(2).tolist()
    scores = sims[:, caption]
    answers = [shown_image(split, k, scores[k], k == image) for k in best(scores).tolist()]
    return {"words": list(zip(why.words, weights, why.gates.tolist(), strict=True)),
            "rank": rank + 1, "image": shown_image(split, image, scores[image], True),
            "answers": answers}  # fmt: skip


def report_page(
    split: Split, metrics: dict, sims: np.ndarray, log: dict | None, n_queries: int, title: str
) -> str:
    """The whole page; the template engine escapes all texts."""
    image_of_caption = split.data.image_of_caption
    ranks = t2i_ranks(sims, image_of_caption)
    right = sims[image_of_caption, np.arange(sims.shape[1])]
    order = np.lexsort((-right, ranks))  # by rank; of equal ranks, the higher score first
    queries = {}
    for kind, captions in (("best", order), ("worst", order[::-1])):
        _, first = np.unique(image_of_caption[captions], return_index=True)  # one of an image
        chosen = captions[np.sort(first)][:n_queries].tolist()
        queries[kind] = [shown_query(split, sims, k, int(ranks[k])) for k in chosen]
    curves = None
    if log and log["train"] and log["dev"]:
        fig = curves_figure({"run": log})
        curves = data_url("image/svg+xml", lambda file: fig.savefig(file, format="svg"))
        plt.close(fig)
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(loader=folder, autoescape=True).get_template("report_template.html")
    run = log["run"][0] if log and log["run"] else {}
    return page.render(title=title, metrics=metrics, curves=curves, queries=queries, run=run,
                       has_boxes=split.boxes is not None)  # fmt: skip


# -- the command line -----------------------------------------------------------------------------


def draw_retrieval(opt: argparse.Namespace) -> plt.Figure:
    _, caps, ids = find_files(opt.data_path or "./data", opt.data_name, opt.split)
    captions = read_captions(caps)
    sims = load_sims(opt.sims, len(captions))
    return retrieval_figure(sims, captions, read_ids(ids, len(sims)), opt.pictures, opt.queries)


def draw_attention(opt: argparse.Namespace) -> plt.Figure:
    split = Split.open(opt.model_path, opt)
    numbers = {str(k): k for k in range(split.data.n_images)}
    numbers |= {id: k for k, id in enumerate(split.data.image_ids)}
    if opt.image not in numbers:
        n = split.data.n_images
        raise InputError(f"--image {opt.image}: neither an image's id nor a number below {n}")
    image = numbers[opt.image]
    caption = opt.caption or split.data.texts[image * split.data.captions_per_image]
    return attention_figure(split.explain(image, caption), *split.picture(image))


def draw_curves(opt: argparse.Namespace) -> plt.Figure:
    return curves_figure(dict(zip(run_names(opt.runs), map(read_log, opt.runs), strict=True)))


def draw_layers(opt: argparse.Namespace) -> plt.Figure:
    updates = [layer_updates(Split.open(path, opt)) for path in opt.checkpoints]
    named = dict(zip(run_names(opt.checkpoints), updates, strict=True))
    text = json.dumps(named, indent=1) + "\n"
    if opt.json is None:
        print(text, end="")
    else:
        atomic_write(opt.json, lambda file: file.write(text.encode()))
    return layers_figure(named)


def write_report(opt: argparse.Namespace) -> str:
    split = Split.open(opt.model_path, opt)
    with_local_alignments(split.model.similarity)  # refused before the evaluation
    metrics, sims = evaluate([split.model], split.data, split.device)
    file = Path(opt.model_path).with_name("metrics.jsonl")
    log = read_log(file) if file.is_file() else None
    title = f"{opt.model_path}: {protocol(split.data.name, opt.split, split.data.n_images, False)}"
    return report_page(split, metrics, sims, log, opt.queries, title)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    of_split = argparse.ArgumentParser(add_help=False)
    add = of_split.add_argument
    add("--data_path", default=None, help="folder of the data sets")
    add("--split", default="test", help="the split to show")
    add("--pictures", default=None, type=Path, help="folder of the pictures")
    of_model = argparse.ArgumentParser(add_help=False, parents=[of_split])
    add = of_model.add_argument
    add("--vocab_path", default=None, help="folder of the vocabularies")
    add("--data_name", default=None, help="None = the checkpoint's")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")

    def command(name: str, work: Callable, parents: list, help: str) -> Callable:
        one = commands.add_parser(
            name, help=help, parents=parents, allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )  # fmt: skip
        one.set_defaults(work=work, pictures=None, json=None)
        out = Path(f"{name}.html" if name == "report" else f"{name}.png")
        one.add_argument("--out", default=out, type=Path, help="file to write")
        one.add_argument("--overwrite", action="store_true", help="replace a file that exists")
        return one.add_argument

    add = command("retrieval", draw_retrieval, [of_split], "queries with their best answers")
    add("--sims", required=True, type=Path, help="from evaluation.py --save_sims")
    add("--data_name", required=True, help="its folder in data_path")
    add("--queries", default=5, type=at_least(1), help="how many of each kind")
    add = command("attention", draw_attention, [of_model], "what each word attends to")
    add("--model_path", default=DEFAULT_MODEL, help="the checkpoint")
    add("--image", default="0", help="its id, or its number in the split")
    add("--caption", default=None, help="any sentence; None = the image's first caption")
    add = command("curves", draw_curves, [], "loss and dev recall of runs")
    add("runs", nargs="+", type=Path, help="folders with a metrics.jsonl")
    add = command("layers", draw_layers, [of_model], "how much each layer changes its input")
    add("checkpoints", nargs="+", type=Path)
    add("--json", default=None, type=Path, help="write the numbers, instead of printing them")
    add = command("report", write_report, [of_model], "one page about a run")
    add("--model_path", default=DEFAULT_MODEL, help="the checkpoint")
    add("--queries", default=8, type=at_least(1), help="best and worst captions shown")
    return parser


@one_line
def main() -> None:
    opt = options().parse_args()
    if opt.pictures is not None and not opt.pictures.is_dir():
        raise InputError(f"{opt.pictures}: no such folder of pictures")
    kinds = (".html",) if opt.command == "report" else (".png", ".pdf", ".svg")
    if opt.out.suffix not in kinds:
        raise InputError(f"--out {opt.out}: should end in {' or '.join(kinds)}")
    for path in (opt.out, opt.json):
        if path is not None and path.exists() and not opt.overwrite:
            raise InputError(f"{path}: exists already; name another --out, or give --overwrite")
    check_targets(opt.out, opt.json)
    made = opt.work(opt)
    if isinstance(made, str):
        atomic_write(opt.out, lambda file: file.write(made.encode()))
    else:
        suffix = opt.out.suffix[1:]
        atomic_write(opt.out, lambda file: made.savefig(file, format=suffix, dpi=110))
    print(opt.out)


if __name__ == "__main__":
    main()
