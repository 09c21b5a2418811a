"""Pictures of what a model answers.

    python scripts/visualize.py retrieval --sims sims.npy --data_name scenes_precomp \
        --pictures data/scenes_images/test --out fig/retrieval.png

draws, for some captions, the five pictures that score highest, and for some pictures the five
highest captions; right answers are framed (green, with a tick), wrong ones not. `sims.npy` comes
from `evaluation.py --save_sims`. Pictures are found by the ids in {split}_ids.txt; without
--pictures the ids themselves are shown.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import find_files, read_ids
from errors import InputError, one_line
from metrics import i2t_ranks, t2i_ranks
from vocab import read_captions

RIGHT, WRONG = "#1a8a5f", "#c9c9c9"


def load_sims(path: Path, n_captions: int) -> np.ndarray:
    """Scores (n_images, n_captions) of `evaluation.py --save_sims`.

    Raises:
        InputError: if the file is missing, no matrix, or not of these captions.
    """
    try:
        sims = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: not a readable .npy array: {error}") from error
    if sims.ndim != 2 or sims.shape[1] != n_captions or n_captions % sims.shape[0]:
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
    path = folder / name if folder else None
    if path is not None and path.is_file():
        ax.imshow(Image.open(path).convert("RGB"))
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


@one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser(
        "retrieval", help="queries with their best answers", allow_abbrev=False
    )
    one.add_argument("--sims", required=True, type=Path, help="from evaluation.py --save_sims")
    one.add_argument("--data_path", default="./data", help="folder of the data sets")
    one.add_argument("--data_name", required=True, help="its folder in data_path")
    one.add_argument("--split", default="test", help="the split the scores belong to")
    one.add_argument("--pictures", default=None, type=Path, help="folder of the pictures")
    one.add_argument("--queries", default=5, type=int, help="how many of each kind")
    one.add_argument("--out", default=Path("retrieval.png"), type=Path, help=".png or .pdf")
    opt = parser.parse_args()
    if opt.queries < 1:
        raise InputError(f"--queries {opt.queries}: should be 1 or more")
    if opt.pictures is not None and not opt.pictures.is_dir():
        raise InputError(f"{opt.pictures}: no such folder of pictures")
    if not opt.out.absolute().parent.is_dir() or opt.out.suffix not in (".png", ".pdf"):
        raise InputError(f"{opt.out}: should be a .png or .pdf in a folder that exists")
    _, caps, ids = find_files(opt.data_path, opt.data_name, opt.split)
    captions = read_captions(caps)
    sims = load_sims(opt.sims, len(captions))
    names = read_ids(ids, len(sims))
    fig = retrieval_figure(sims, captions, names, opt.pictures, opt.queries)
    fig.savefig(opt.out, dpi=110)
    print(f"what it retrieves: {opt.out}")


if __name__ == "__main__":
    main()
