"""Pictures of what a model answers, and why.

    python scripts/visualize.py retrieval --sims sims.npy --data_name scenes_precomp \\
        --pictures data/scenes_images/test --out fig/retrieval.png

draws, for some captions, the five pictures that score highest, and for some pictures the five
highest captions; right answers are framed (green, with a tick), wrong ones not. `sims.npy` comes
from `evaluation.py --save_sims`.

    python scripts/visualize.py attention --model_path runs/demo/checkpoint/model_best.pth.tar \\
        --pictures data/scenes_images/test --image 0 [--caption "a red ball above a blue box"]

draws, for one image and one caption, the regions each word attends to, how much each word's
alignment counts (its gate), and the weights of the global image and caption vectors. Regions are
shown as heat on the picture, or as the strongest boxes (`--draw boxes`, for detected regions).

    python scripts/visualize.py curves runs/demo/checkpoint [MORE RUNS] --out curves.pdf

draws training loss and dev recall of one or several runs from their metrics.jsonl.

    python scripts/visualize.py report --model_path runs/demo/checkpoint/model_best.pth.tar \\
        --pictures data/scenes_images/test --out report.html

writes one self-contained page: metrics, curves, the captions answered best and worst, and what each
word attends to where the mouse points.

Pictures are found by the ids in {split}_ids.txt, boxes in {split}_boxes.npy. Without --pictures the
ids are shown instead; without boxes the attention is a table, words × regions.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import string
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import PrecompDataset, find_files, open_array, read_boxes, read_ids
from errors import InputError, one_line
from evaluation import evaluate, load, protocol, select_device
from explain import Explanation, explain
from features import find_picture, read_picture
from metrics import i2t_ranks, t2i_ranks
from model import LHSC
from train import at_least
from vocab import Vocabulary, read_captions

RIGHT, WRONG = "#1a8a5f", "#c9c9c9"
HEAT = "#d7301f"
THUMBNAIL = 240  # pixels a side, in the report
TEMPLATE = Path(__file__).with_name("report_template.html")


def load_sims(path: Path, n_captions: int) -> np.ndarray:
    """Scores (n_images, n_captions) of `evaluation.py --save_sims`.

    Raises:
        InputError: if the file is missing, no matrix, or not of these captions.
    """
    sims = open_array(path)
    if sims.ndim != 2 or not sims.size or sims.shape[1] != n_captions or n_captions % len(sims):
        raise InputError(f"{path}: scores {sims.shape} do not fit {n_captions} captions")
    return sims


def spread(ranks: np.ndarray, n: int) -> np.ndarray:
    """n queries of all kinds: evenly spaced by rank among all, so the worse are shown too."""
    order = np.argsort(ranks, kind="stable")
    return order[np.linspace(0, len(order) - 1, n).round().astype(int)]


def show_picture(ax: Axes, folder: Path | None, name: str) -> None:
    """A picture, or its id where there is none."""
    ax.set_xticks([])
    ax.set_yticks([])
    path = find_picture(folder, name)
    if path is not None:
        ax.imshow(read_picture(path))
    else:
        ax.text(0.5, 0.5, textwrap.fill(name, 14), ha="center", va="center", fontsize=7)
        ax.set_xlim(0, 1)
        ax.set_ylim(0, 1)
        ax.set_aspect("equal")


def frame(ax: Axes, right: bool) -> None:
    for spine in ax.spines.values():
        spine.set_color(RIGHT if right else WRONG)
        spine.set_linewidth(4 if right else 1)


def retrieval_figure(
    sims: np.ndarray,
    captions: list[str],
    ids: list[str],
    pictures: Path | None,
    n_queries: int = 5,
    top: int = 5,
) -> plt.Figure:
    """Text to image on the left, image to text on the right; right answers are framed."""
    n_images, n_captions = sims.shape
    image_of_caption = np.arange(n_captions) // (n_captions // n_images)
    top = min(top, n_images)
    fig = plt.figure(figsize=(16, 1.75 * n_queries + 0.5))
    grid = fig.add_gridspec(
        n_queries, 2 + top + 5, left=0.005, right=0.995, bottom=0.01,
        top=1 - 0.45 / fig.get_figheight(), wspace=0.08, hspace=0.16,
    )  # fmt: skip
    y = 1 - 0.28 / fig.get_figheight()
    fig.text(0.005, y, f"caption → the {top} best pictures", fontsize=13, weight="bold")
    right_x = grid[0, 2 + top].get_position(fig).x0
    fig.text(right_x, y, f"picture → the {top} best captions", fontsize=13, weight="bold")

    ranks = t2i_ranks(np.asarray(sims), image_of_caption)
    for row, caption in enumerate(spread(ranks, n_queries)):
        ax = fig.add_subplot(grid[row, :2])
        ax.axis("off")
        text = textwrap.fill(captions[caption], 30, max_lines=6)
        ax.text(0, 0.5, text, va="center", fontsize=10)
        best = np.argsort(-sims[:, caption], kind="stable")[:top]
        for k, image in enumerate(best):
            ax = fig.add_subplot(grid[row, 2 + k])
            show_picture(ax, pictures, ids[image])
            frame(ax, image == image_of_caption[caption])

    ranks = i2t_ranks(np.asarray(sims), image_of_caption)
    for row, image in enumerate(spread(ranks, n_queries)):
        ax = fig.add_subplot(grid[row, 2 + top])
        show_picture(ax, pictures, ids[image])
        ax = fig.add_subplot(grid[row, 3 + top :])
        ax.axis("off")
        for k, caption in enumerate(np.argsort(-sims[image], kind="stable")[:top]):
            right = image_of_caption[caption] == image
            ax.text(
                0.02, 0.9 - 0.8 * k / max(1, top - 1),
                ("✓ " if right else "   ") + textwrap.shorten(captions[caption], 66),
                va="center", fontsize=9, family="DejaVu Sans",
                color=RIGHT if right else "#444444",
                bbox={"facecolor": "none", "edgecolor": RIGHT, "pad": 2} if right else None,
            )  # fmt: skip
    return fig


# -- attention ------------------------------------------------------------------------------------


class Split(NamedTuple):
    """A split as a model sees it, and as people do."""

    model: LHSC
    vocab: Vocabulary
    data: PrecompDataset
    boxes: np.ndarray | None  # (n_images, R, 4)
    pictures: Path | None

    def picture(self, image: int) -> Image.Image | None:
        path = find_picture(self.pictures, self.data.image_ids[image])
        return read_picture(path) if path else None

    def boxes_of(self, image: int, size: tuple[int, int] | None) -> np.ndarray | None:
        """(R, 4) as shares of the picture; boxes in pixels need its size."""
        return None if self.boxes is None else shares_of(self.boxes[image], size)


def shares_of(boxes: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """Boxes (R, 4) in pixels or as shares -> as shares of a picture of that size (width, height).

    Of a picture that is not at hand, the corner of the outermost box is taken for its size.
    """
    boxes = np.asarray(boxes)
    if boxes.max() <= 1:
        return boxes
    return boxes / np.tile(size if size else boxes[:, 2:].max(axis=0), 2)


def open_split(opt: argparse.Namespace) -> Split:
    """The model of --model_path and the split it is to be shown on."""
    model, settings, vocab = load(opt.model_path, opt)
    where = settings["data_path"], settings["data_name"], opt.split
    regions = model.image_encoder.fc.in_features, settings["num_regions"]
    data = PrecompDataset(*where, vocab, *regions)
    _, _, ids = find_files(*where)
    path = ids.with_name(f"{opt.split}_boxes.npy")
    boxes = read_boxes(path, data.n_images, data.regions.num_regions)
    return Split(model.to(select_device(opt.device)), vocab, data, boxes, opt.pictures)


def explain_image(split: Split, image: int, caption: str) -> Explanation:
    device = next(split.model.parameters()).device
    return explain(split.model, split.vocab, split.data.image(image).to(device), caption)


def is_grid(boxes: np.ndarray) -> bool:
    """Whether the boxes are windows of one size, rather than detected objects."""
    return bool(np.ptp(boxes[:, 2:] - boxes[:, :2], axis=0).max() < 0.2)


def heat_map(weights: np.ndarray, boxes: np.ndarray, side: int = 96) -> np.ndarray:
    """Weights (R,) of boxes (R, 4), shares of the picture -> (side, side), the largest is 1.

    A point has the mean weight of the windows it is in; of detected objects, which overlap at
    will, the sum.
    """
    centre = (np.arange(side) + 0.5) / side
    x1, y1, x2, y2 = boxes.T[:, :, None]
    inside = ((y1 <= centre) & (centre < y2))[:, :, None] & ((x1 <= centre) & (centre < x2))[
        :, None
    ]
    heat = np.tensordot(weights, inside, axes=1)
    if is_grid(boxes):
        heat = heat / np.maximum(inside.sum(0), 1)
    return heat / max(heat.max(), 1e-12)


def draw_weights(
    ax: Axes, picture: Image.Image | None, weights: np.ndarray, boxes: np.ndarray, how: str
) -> None:
    """A picture (or none) with the weights of its regions, as `heat` or as the best `boxes`."""
    ax.set_xticks([])
    ax.set_yticks([])
    width, height = picture.size if picture else (96, 96)
    ax.set_xlim(0, width)
    ax.set_ylim(height, 0)
    ax.set_aspect("equal")
    if picture:
        ax.imshow(picture, extent=(0, width, height, 0))
    if how == "heat" or (how == "auto" and is_grid(boxes)):
        heat = heat_map(weights, boxes)
        ax.imshow(
            np.ones((*heat.shape, 3)) * matplotlib.colors.to_rgb(HEAT), alpha=0.75 * heat,
            extent=(0, width, height, 0), interpolation="bilinear",
        )  # fmt: skip
        return
    for region in np.argsort(-weights)[:3]:
        x1, y1, x2, y2 = boxes[region] * (width, height, width, height)
        share = weights[region] / weights.max()
        ax.add_patch(
            plt.Rectangle(
                (x1, y1), x2 - x1, y2 - y1, fill=False, ec=HEAT, lw=3 * share, alpha=share
            )
        )


def attention_figure(
    why: Explanation, picture: Image.Image | None, boxes: np.ndarray | None, how: str = "auto"
) -> plt.Figure:
    """What each word attends to, how much it counts, and the weights of the global vectors."""
    if boxes is None:
        return attention_table(why)
    columns = 6
    rows = -(-(len(why.words) + 1) // columns)
    fig = plt.figure(figsize=(2.1 * columns, 2.35 * rows + 2.4))
    low, high = fig.subfigures(2, 1, height_ratios=(2.35 * rows, 2.4))
    axes = low.subplots(rows, columns, squeeze=False).ravel()
    low.subplots_adjust(0.01, 0.01, 0.99, 0.95, wspace=0.05, hspace=0.16)
    draw_weights(axes[0], picture, why.region_weights, boxes, how)
    axes[0].set_title(f"whole picture · {why.globl_gate:.0%}", fontsize=9, weight="bold")
    for ax, word, weights, gate in zip(axes[1:], why.words, why.attention, why.gates, strict=False):
        draw_weights(ax, picture, weights, boxes, how)
        ax.set_title(f"{word} · {gate:.0%}", fontsize=9)
    for ax in axes[len(why.words) + 1 :]:
        ax.axis("off")
    draw_gates(high.subplots(), why)
    high.subplots_adjust(0.06, 0.36, 0.99, 0.85)
    return fig


def draw_gates(ax: Axes, why: Explanation) -> None:
    """Bars: the share of each word's alignment in the score, and in the global caption vector."""
    at = np.arange(len(why.words) + 1)
    ax.bar(at - 0.2, [*why.gates, why.globl_gate], 0.4, color=HEAT, label="gate in the score")
    ax.bar(at[:-1] + 0.2, why.word_weights, 0.4, color="#4a6fa5", label="global caption vector")
    names = [f"{w}*" if new else w for w, new in zip(why.words, why.unknown, strict=True)]
    ax.set_xticks(at, [*names, "whole"], rotation=40, ha="right", fontsize=9)
    ax.set_xlim(-0.6, len(at) - 0.4)
    note = "   (* unknown to the model)" if any(why.unknown) else ""
    ax.set_title(f"score {why.score:.3f}{note}", fontsize=10, loc="left")
    ax.legend(fontsize=8, frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    ax.spines[["top", "right"]].set_visible(False)


def attention_table(why: Explanation) -> plt.Figure:
    """Words × regions, where no boxes are known."""
    fig, (ax, bars) = plt.subplots(
        2, 1, figsize=(11, 0.28 * len(why.words) + 4), height_ratios=(len(why.words), 8),
        layout="constrained",
    )  # fmt: skip
    image = ax.imshow(why.attention, cmap="Reds", aspect="auto", vmin=0)
    ax.set_yticks(np.arange(len(why.words)), why.words)
    ax.set_xlabel("region")
    fig.colorbar(image, ax=ax, label="attention")
    draw_gates(bars, why)
    return fig


# -- curves ---------------------------------------------------------------------------------------


def read_log(folder: Path) -> dict[str, list[dict]]:
    """The lines of a run's metrics.jsonl by type: run, train, dev.

    Raises:
        InputError: if there is none, or a line of it is no JSON object.
    """
    path = folder / "metrics.jsonl" if folder.is_dir() else folder
    if not path.is_file():
        raise InputError(f"{path}: no log of a run; train.py writes one beside the checkpoints")
    lines: dict[str, list[dict]] = {"run": [], "train": [], "dev": []}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            line = json.loads(text)
            lines.setdefault(line["type"], []).append(line)
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{path}, line {number}: not a line of train.py's: {text[:60]}"
            ) from error
    return lines


def curves_figure(logs: dict[str, dict[str, list[dict]]]) -> plt.Figure:
    """Training loss, dev rsum and dev R@1 of one or several runs, over optimizer steps."""
    fig, (loss, rsum, r1) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for color, (name, log) in zip(plt.cm.tab10.colors * len(logs), logs.items(), strict=False):
        train, dev = log["train"], log["dev"]
        loss.plot([x["step"] for x in train], [x["loss"] for x in train], color=color, label=name)
        steps = [x["step"] for x in dev]
        rsum.plot(steps, [x["rsum"] for x in dev], "o-", ms=3, color=color, label=name)
        for way, style in (("i2t", "-"), ("t2i", "--")):
            label = f"{name} {way}" if len(logs) > 1 else way
            r1.plot(steps, [x[way]["r1"] for x in dev], style, color=color, label=label)
    loss.set_yscale("log")  # warm-up sums all negatives
    for ax, title in ((loss, "training loss"), (rsum, "dev rsum"), (r1, "dev R@1 (%)")):
        ax.set_title(title, fontsize=11)
        ax.set_xlabel("step")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    r1.legend(fontsize=8, frameon=False)
    if len(logs) > 1:
        rsum.legend(fontsize=8, frameon=False)
    return fig


# -- report ---------------------------------------------------------------------------------------


def as_data_url(picture: Image.Image) -> str:
    picture = picture.copy()
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def as_svg(fig: plt.Figure) -> str:
    buffer = io.StringIO()
    fig.savefig(buffer, format="svg")
    plt.close(fig)
    return buffer.getvalue().partition("<svg")[1] + buffer.getvalue().partition("<svg")[2]


def html_picture(split: Split, image: int, frame: str = "") -> str:
    """A picture with (empty) boxes over its regions, which a script fills; or its id."""
    picture, name = split.picture(image), html.escape(split.data.image_ids[image])
    size = picture.size if picture else None
    inner = f'<img src="{as_data_url(picture)}" alt="{name}">' if picture else f"<p>{name}</p>"
    for x1, y1, x2, y2 in split.boxes_of(image, size) if split.boxes is not None else ():
        inner += (
            f'<i style="left:{100 * x1:.1f}%;top:{100 * y1:.1f}%;width:{100 * (x2 - x1):.1f}%;'
            f'height:{100 * (y2 - y1):.1f}%"></i>'
        )
    return f'<div class="picture {frame}" title="{name}">{inner}</div>'


def html_words(why: Explanation) -> str:
    """The words of a caption, each with the regions it attends to."""
    spans = []
    for word, weights, gate in zip(why.words, why.attention, why.gates, strict=True):
        shares = np.round(weights / weights.max(), 2).tolist()
        spans.append(
            f'<span tabindex="0" data-weights="{json.dumps(shares)}" '
            f'title="gate {gate:.1%}" style="border-bottom-width:{0.5 + 40 * gate:.1f}px">'
            f"{html.escape(word)}</span>"
        )
    return " ".join(spans)


def html_query(split: Split, sims: np.ndarray, caption: int, rank: int, top: int) -> str:
    """A caption, what each of its words attends to in its picture, and the answers it got."""
    right = int(split.data.image_of_caption[caption])
    why = explain_image(split, right, split.data.texts[caption])
    best = np.argsort(-sims[:, caption], kind="stable")[:top]
    answers = "".join(
        f"<figure>{html_picture(split, int(i), 'right' if i == right else '')}"
        f"<figcaption>{sims[i, caption]:.3f}</figcaption></figure>"
        for i in best
    )
    return (
        f'<section class="query"><figure>{html_picture(split, right, "right")}'
        f"<figcaption>its picture, rank {rank + 1}, {sims[right, caption]:.3f}</figcaption>"
        "</figure>"
        f'<div><p class="words">{html_words(why)}</p><div class="answers">{answers}</div></div>'
        "</section>"
    )


def one_an_image(captions: np.ndarray, image_of_caption: np.ndarray) -> np.ndarray:
    """The first caption of each image, in the order given."""
    return captions[np.sort(np.unique(image_of_caption[captions], return_index=True)[1])]


def report_page(
    split: Split, metrics: dict, sims: np.ndarray, log: dict | None, n_queries: int, title: str
) -> str:
    """The whole page."""
    names = ("r1", "r5", "r10", "medr", "meanr")
    rows = "".join(
        f"<tr><th>{name}</th>" + "".join(f"<td>{metrics[way][k]:.1f}</td>" for k in names) + "</tr>"
        for way, name in (("i2t", "image to text"), ("t2i", "text to image"))
    )
    image_of_caption = split.data.image_of_caption
    ranks = t2i_ranks(sims, image_of_caption)
    right = sims[image_of_caption, np.arange(sims.shape[1])]
    order = np.lexsort((-right, ranks))  # by rank, the surer first
    parts = {
        "best": one_an_image(order, image_of_caption)[:n_queries],
        "worst": one_an_image(order[::-1], image_of_caption)[:n_queries],
    }
    queries = {
        name: "".join(html_query(split, sims, int(c), int(ranks[c]), top=5) for c in chosen)
        for name, chosen in parts.items()
    }
    run = log["run"][0] if log and log["run"] else {}
    facts = {
        "commit": run.get("commit"), "seed": run.get("seed"),
        "hardware": (run.get("hardware") or {}).get("device"),
        "PyTorch": (run.get("versions") or {}).get("torch"),
        "arguments": json.dumps(run.get("arguments")) if run else None,
    }  # fmt: skip
    about = "".join(
        f"<tr><th>{k}</th><td>{html.escape(str(v))}</td></tr>" for k, v in facts.items() if v
    )
    curves = as_svg(curves_figure({"run": log})) if log and log["train"] and log["dev"] else ""
    return string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(title), metrics=rows, rsum=f"{metrics['rsum']:.1f}", curves=curves,
        best=queries["best"], worst=queries["worst"], about=about,
        hint="" if split.boxes is not None else "No boxes are known for these regions.",
    )  # fmt: skip


# -- the command line -----------------------------------------------------------------------------


def draw_retrieval(opt: argparse.Namespace) -> plt.Figure:
    _, caps, ids = find_files(opt.data_path or "./data", opt.data_name, opt.split)
    captions = read_captions(caps)
    sims = load_sims(opt.sims, len(captions))
    names = read_ids(ids, len(sims))
    return retrieval_figure(sims, captions, names, opt.pictures, opt.queries)


def draw_attention(opt: argparse.Namespace) -> plt.Figure:
    split = open_split(opt)
    ids = split.data.image_ids
    image = ids.index(opt.image) if opt.image in ids else opt.image
    if isinstance(image, str):
        if not image.isdecimal() or int(image) >= len(ids):
            raise InputError(
                f"--image {image}: neither an id of {split.data.name} {opt.split} nor a number "
                f"below {len(ids)}"
            )
        image = int(image)
    caption = opt.caption or split.data.texts[image * split.data.captions_per_image]
    picture = split.picture(image)
    why = explain_image(split, image, caption)
    boxes = split.boxes_of(image, picture.size if picture else None)
    return attention_figure(why, picture, boxes, opt.draw)


def draw_curves(opt: argparse.Namespace) -> plt.Figure:
    names = [
        p.parent.name if p.name in ("checkpoint", "metrics.jsonl") else p.name for p in opt.runs
    ]
    if len(set(names)) < len(names):
        names = [str(p) for p in opt.runs]
    return curves_figure({n: read_log(p) for n, p in zip(names, opt.runs, strict=True)})


def write_report(opt: argparse.Namespace) -> str:
    split = open_split(opt)
    device = next(split.model.parameters()).device
    metrics, sims = evaluate([split.model], split.data, device)
    folder = Path(opt.model_path).parent
    log = read_log(folder) if (folder / "metrics.jsonl").is_file() else None
    title = f"{opt.model_path}: {protocol(split.data.name, opt.split, split.data.n_images, False)}"
    return report_page(split, metrics, sims, log, opt.queries, title)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, help: str, work, out: str, of_model: bool = True):
        one = commands.add_parser(
            name, help=help, allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )  # fmt: skip
        one.set_defaults(work=work)
        one.add_argument("--out", default=Path(out), type=Path, help="file to write")
        if of_model:
            one.add_argument(
                "--model_path", default="./runs/LHSC/checkpoint/model_best.pth.tar",
                help="the checkpoint",
            )  # fmt: skip
            one.add_argument("--vocab_path", default=None, help="folder of the vocabularies")
            one.add_argument("--data_name", default=None, help="None = the checkpoint's")
            one.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
        if name != "curves":
            one.add_argument("--data_path", default=None, help="folder of the data sets")
            one.add_argument("--split", default="test", help="the split to show")
            one.add_argument("--pictures", default=None, type=Path, help="folder of the pictures")
        return one.add_argument

    add = command(
        "retrieval", "queries with their best answers", draw_retrieval, "retrieval.png", False
    )
    add("--sims", required=True, type=Path, help="from evaluation.py --save_sims")
    add("--data_name", required=True, help="its folder in data_path")
    add("--queries", default=5, type=at_least(1), help="how many of each kind")
    add = command("attention", "what each word looks at", draw_attention, "attention.png")
    add("--image", default="0", help="its id, or its number in the split")
    add("--caption", default=None, help="any sentence; None = the image's first caption")
    add("--draw", default="auto", choices=["auto", "heat", "boxes"], help="auto: heat for grids")
    add = command("curves", "loss and dev recall of runs", draw_curves, "curves.png", False)
    add("runs", nargs="+", type=Path, help="folders with a metrics.jsonl")
    add = command("report", "one page about a run", write_report, "report.html")
    add("--queries", default=8, type=at_least(1), help="best and worst captions shown")
    return parser


@one_line
def main() -> None:
    opt = options().parse_args()
    if getattr(opt, "pictures", None) is not None and not opt.pictures.is_dir():
        raise InputError(f"{opt.pictures}: no such folder of pictures")
    kinds = (".html",) if opt.command == "report" else (".png", ".pdf", ".svg")
    if not opt.out.absolute().parent.is_dir() or opt.out.suffix not in kinds:
        raise InputError(f"{opt.out}: should be a {' or '.join(kinds)} in a folder that exists")
    made = opt.work(opt)
    if isinstance(made, str):
        opt.out.write_text(made, encoding="utf-8")
    else:
        made.savefig(opt.out, dpi=110)
    what = "what it retrieves: " if opt.command == "retrieval" else ""
    print(f"{what}{opt.out}")


if __name__ == "__main__":
    main()
