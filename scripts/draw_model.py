"""Draw the model figure of the README, fig/model.png, with matplotlib alone.

    python scripts/draw_model.py [--out fig/model.png] [--pdf]

`--pdf` also writes the same figure as vectors beside the PNG (fig/model.pdf). No model, data or
GPU is needed, it takes about two seconds, and the same matplotlib gives the same bytes each time.

Image side blue, text side orange, alignments green, score and loss grey. The canvas is 103 × 60
units, a unit being 20 pixels of the PNG; every position below is in these units.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import (
    Circle,
    Ellipse,
    FancyArrowPatch,
    FancyBboxPatch,
    PathPatch,
    Polygon,
    Rectangle,
)
from matplotlib.path import Path as Outline
from matplotlib.transforms import Affine2D

WIDTH, HEIGHT, DPI = 103, 60, 200

# One hue a side, five steps each: panel, box, line, strong, ink.
IMAGE = ("#f0f5fa", "#d9e7f4", "#7fa9d1", "#2f6fae", "#1d4b7a")
TEXT = ("#fdf5ec", "#fae3c8", "#e3a868", "#c46f16", "#85480a")
ALIGN = ("#eef7f3", "#d0ebe0", "#74bca0", "#15896a", "#0b5a45")
LOSS = ("#f3f4f6", "#e3e6ea", "#9aa3ae", "#5a6572", "#333c47")
NEGATIVE = "#a8325e"
INK = "#2b3138"

SMALL, NAME, EQUATION, TITLE = 7.2, 7.0, 8.8, 9.0  # points; 7.2 pt is 10 px at README width

CAPTION = ("<start>", "a", "dog", "jumps", "for", "a", "frisbee", "<end>")

# The toy picture in unit coordinates: box (x, y, width, height) of each drawn region.
REGIONS = {
    "sun": (0.04, 0.77, 0.19, 0.19),
    "cloud": (0.36, 0.75, 0.34, 0.18),
    "tree": (0.03, 0.24, 0.29, 0.49),
    "dog": (0.34, 0.17, 0.45, 0.36),
    "frisbee": (0.74, 0.50, 0.22, 0.15),
    "grass": (0.60, 0.02, 0.37, 0.13),
}
OBJECTS = tuple(REGIONS)


# -- marks ----------------------------------------------------------------------------------------


def panel(ax: Axes, x: float, y: float, w: float, h: float, hue: tuple, title: str) -> None:
    """The tinted ground of one part of the model, its title at the upper left."""
    box(ax, x, y, w, h, fill=hue[0], edge="none", radius=1.0, zorder=0)
    ax.text(x + 1.2, y + h - 1.7, title, color=hue[4], size=TITLE, weight="bold", va="center")


def box(
    ax: Axes, x: float, y: float, w: float, h: float,
    fill: str = "white", edge: str = INK, radius: float = 0.6, lw: float = 0.9, zorder: float = 1,
) -> None:  # fmt: skip
    """A rounded box from its lower left corner."""
    style = f"round,pad=0,rounding_size={radius}"
    ax.add_patch(FancyBboxPatch((x, y), w, h, style, fc=fill, ec=edge, lw=lw, zorder=zorder))


def arrow(ax: Axes, *points: tuple, color: str = INK, lw: float = 1.1, head: float = 7) -> None:
    """A line through the points, with a head at its end."""
    ax.add_patch(
        FancyArrowPatch(
            path=Outline(points), arrowstyle="-|>,head_length=0.55,head_width=0.28",
            mutation_scale=head, color=color, lw=lw, shrinkA=0, shrinkB=0, zorder=4,
            joinstyle="miter", capstyle="butt",
        )
    )  # fmt: skip


def say(ax: Axes, x: float, y: float, text: str, size: float = SMALL, **style) -> None:
    """Text centred on a point unless told otherwise."""
    ax.text(x, y, text, **{"ha": "center", "va": "center", "color": INK, "size": size} | style)


def name(ax: Axes, x: float, y: float, text: str, color: str, shape: str = "", **style) -> None:
    """A name as the code spells it, and its shape in a lighter line below."""
    say(ax, x, y, text, NAME, color=color, family="monospace", weight="bold", **style)
    if shape:
        say(ax, x, y - 1.6, shape, NAME, color=color, **style)


def shade(hue: tuple, i: int) -> str:
    """A fixed, uneven run through the lighter steps of a hue: the numbers of a drawn vector."""
    return hue[(1, 2, 1, 3, 2, 2, 2, 1, 1, 3, 2)[(7 * i) % 11]]


def vector(
    ax: Axes, x: float, y: float, w: float, h: float, n: int, hue: tuple, seed: int = 0
) -> None:
    """A row of n cells from x, centred at height y."""
    for i in range(n):
        at, fill = (x + i * w / n, y - h / 2), shade(hue, seed + i)
        ax.add_patch(Rectangle(at, w / n, h, fc=fill, ec="white", lw=0.5, zorder=3))
    ax.add_patch(Rectangle((x, y - h / 2), w, h, fc="none", ec=hue[3], lw=0.7, zorder=3))


# -- the image side -------------------------------------------------------------------------------


def draw_picture(ax: Axes, x: float, y: float, side: float) -> None:
    """A dog jumps for a frisbee, and the boxes of its regions."""
    place = Affine2D().scale(side).translate(x, y) + ax.transData
    frame = Rectangle((0, 0), 1, 1, fc="#dcecf7", ec="none", transform=place, zorder=1)
    ax.add_patch(frame)

    def add(patch, zorder: float = 2.0) -> None:
        patch.set(transform=place, zorder=zorder)
        ax.add_patch(patch)
        patch.set_clip_path(frame)  # after add_patch, which would set the axes' own

    fur, dark, leaf = "#a9764a", "#6f4a2b", "#5f9a6b"
    add(Ellipse((0.3, 0.0), 1.5, 0.5, fc="#a9cf9a", ec="none"))
    add(Ellipse((0.9, 0.0), 1.1, 0.34, fc="#97c389", ec="none"))
    add(Circle((0.135, 0.865), 0.07, fc="#f4c95d", ec="none"))
    for cx, cy, w, h in (
        (0.45, 0.82, 0.16, 0.09),
        (0.54, 0.85, 0.18, 0.12),
        (0.62, 0.82, 0.14, 0.08),
    ):
        add(Ellipse((cx, cy), w, h, fc="white", ec="none"))
    add(Rectangle((0.155, 0.26), 0.04, 0.22, fc="#8a6646", ec="none"))
    for cx, cy, r in ((0.175, 0.60, 0.115), (0.115, 0.51, 0.08), (0.235, 0.51, 0.08)):
        add(Circle((cx, cy), r, fc=leaf, ec="none"))
    for bx in (0.66, 0.74, 0.82, 0.90):
        add(Polygon([(bx - 0.03, 0.04), (bx - 0.02, 0.12), (bx, 0.05), (bx + 0.02, 0.11),
                     (bx + 0.03, 0.04)], fc="#5d9359", ec="none"))  # fmt: skip
    add(Ellipse((0.85, 0.575), 0.17, 0.06, angle=14, fc="#d1495b", ec="#93303e", lw=0.7))
    add(Ellipse((0.85, 0.583), 0.09, 0.025, angle=14, fc="#e68a96", ec="none"))
    # The dog: legs and tail as thick strokes, then body, head, ear, eye.
    for stroke, lw, color in (
        ([(0.45, 0.30), (0.40, 0.25), (0.37, 0.20)], 3.4, dark),
        ([(0.47, 0.29), (0.45, 0.23), (0.43, 0.19)], 3.4, fur),
        ([(0.62, 0.37), (0.69, 0.36), (0.74, 0.39)], 3.2, dark),
        ([(0.61, 0.36), (0.67, 0.32), (0.72, 0.33)], 3.2, fur),
        ([(0.44, 0.33), (0.39, 0.38), (0.375, 0.44)], 2.6, fur),
        ([(0.62, 0.40), (0.66, 0.44)], 6.0, fur),
    ):
        add(PathPatch(Outline(stroke), fc="none", lw=lw, ec=color,
                      capstyle="round", joinstyle="round"))  # fmt: skip
    add(Ellipse((0.535, 0.345), 0.26, 0.115, angle=24, fc=fur, ec="none"))
    add(Ellipse((0.675, 0.455), 0.105, 0.09, angle=24, fc=fur, ec="none"))
    add(Ellipse((0.73, 0.468), 0.07, 0.045, angle=24, fc="#c4946a", ec="none"))
    add(Circle((0.76, 0.485), 0.011, fc=INK, ec="none"))
    add(Circle((0.69, 0.475), 0.009, fc=INK, ec="none"))
    add(Ellipse((0.64, 0.455), 0.04, 0.085, angle=-25, fc=dark, ec="none"))

    for bx, by, bw, bh in REGIONS.values():
        add(Rectangle((bx, by), bw, bh, fc="none", ec="white", lw=2.0), 3)
        add(Rectangle((bx, by), bw, bh, fc="none", ec=IMAGE[3], lw=1.0), 3.1)
    ax.add_patch(Rectangle((x, y), side, side, fc="none", ec=IMAGE[4], lw=1.0, zorder=4))


def draw_level(ax: Axes, x: float, y: float, side: float, level: int) -> None:
    """The regions as nodes: alone (objects), in pairs (relations), in groups (higher levels)."""
    box(ax, x, y, side, side, edge=IMAGE[2])
    node = {
        region: (x + side * (0.07 + 0.86 * (bx + bw / 2)), y + side * (0.06 + 0.9 * (by + bh / 2)))
        for region, (bx, by, bw, bh) in REGIONS.items()
    }
    if level == 2:
        for group in (("sun", "cloud", "tree"), ("dog", "frisbee", "grass")):
            hull = [node[region] for region in group]
            for lw, color, z in ((12.4, IMAGE[2], 1.2), (10.8, IMAGE[1], 1.3)):
                ax.add_patch(Polygon(hull, fc=color, ec=color, lw=lw, joinstyle="round", zorder=z))
    strong = {("tree", "grass"), ("dog", "frisbee"), ("dog", "grass"), ("sun", "cloud")}
    for i, one in enumerate(OBJECTS if level else ()):
        for two in OBJECTS[i + 1 :]:
            near = (one, two) in strong and level == 1
            ax.plot(*zip(node[one], node[two], strict=True), color=IMAGE[3 if near else 2],
                    lw=1.8 if near else 0.5, zorder=2, solid_capstyle="round")  # fmt: skip
    if level == 2:
        centres = []
        for group in (("sun", "cloud", "tree"), ("dog", "frisbee", "grass")):
            xs, ys = zip(*(node[region] for region in group), strict=True)
            centres.append((sum(xs) / 3, sum(ys) / 3))
        ax.plot(*zip(*centres, strict=True), color=IMAGE[4], lw=1.8, zorder=2.5)
    for at in node.values():
        ax.add_patch(Circle(at, 0.48, fc=IMAGE[3], ec="white", lw=0.8, zorder=3))


def draw_image_encoder(ax: Axes) -> None:
    """Picture → FC → graph layers, level by level → region_emb."""
    panel(ax, 0.7, 30.6, 52.3, 28.7, IMAGE, "Image encoder")
    middle, ink = 47.2, IMAGE[4]

    draw_picture(ax, 2.0, middle - 6.7, 13.4)
    say(ax, 8.7, 38.7, "image: R = 36 regions", color=ink)

    ax.add_patch(Polygon([(17.4, middle - 4.2), (17.4, middle + 4.2), (20.0, middle + 2.6),
                          (20.0, middle - 2.6)], fc=IMAGE[1], ec=IMAGE[3], lw=0.9))  # fmt: skip
    say(ax, 18.7, middle, "FC", weight="bold", color=ink)
    say(ax, 18.7, 41.4, r"$V = X W_f^{\mathrm{T}}$", EQUATION, color=ink)

    side, xs = 7.2, (22.0, 30.8, 39.6)
    for x, level, title in zip(
        xs, (0, 1, 2), ("objects", "relations", "higher levels"), strict=True
    ):
        draw_level(ax, x, middle - side / 2, side, level)
        say(ax, x + side / 2, middle + 5.4, title, weight="bold", color=ink)
        say(ax, x + side / 2, middle - 4.9, ("level 0", "level 1", "levels 2–4")[level], color=ink)

    ends = (15.4, 17.4), (20.0, 22.0), (29.2, 30.8), (38.0, 39.6), (46.8, 48.6)
    for start, end in ends:
        arrow(ax, (start, middle), (end, middle), color=IMAGE[3])

    # The four graph layers stand between level 0 and the last level.
    ax.plot((29.6, 29.6, 46.8, 46.8), (40.6, 40.0, 40.0, 40.6), color=IMAGE[3], lw=0.9)
    say(ax, 38.2, 38.7, "4 graph layers", weight="bold", color=ink)
    say(ax, 38.2, 36.2, r"$a=\mathrm{FC}_1\theta(V),\;\; b=\mathrm{FC}_2\varphi(V),"
        r"\;\; G = a\,b^{\mathrm{T}} /\, R$", EQUATION, color=ink)  # fmt: skip
    say(ax, 38.2, 33.4, r"$V \leftarrow V + \mathrm{BN}(w(G\,g(V))),\;\;\;"
        r"v_r = \mathrm{l2norm}(V_r)$", EQUATION, color=ink)  # fmt: skip
    say(ax, 2.0, 34.8, "B images, C captions, R regions,\nW words of all captions, D joint size",
        6.8, ha="left", linespacing=1.5, color=LOSS[3])  # fmt: skip

    for i in range(7):
        vector(ax, 48.7, middle + 5.0 - 2.0 * i, 3.0, 1.3, 4, IMAGE, seed=3 * i)
    name(ax, 49.0, middle + 8.8, "region_emb", ink, "(B, R, D)")


# -- the text side --------------------------------------------------------------------------------


def draw_arcs(ax: Axes, x: float, rows: list, arcs: tuple, w: float, lw: float) -> None:
    """Words as dots in a column, joined by arcs that bulge to the right."""
    for i, j in arcs:
        bulge = min(w, 1.0 + 0.75 * abs(i - j))
        curve = Outline(
            [(x, rows[i]), (x + 1.33 * bulge, rows[i]), (x + 1.33 * bulge, rows[j]), (x, rows[j])],
            [Outline.MOVETO, Outline.CURVE4, Outline.CURVE4, Outline.CURVE4],
        )
        ax.add_patch(PathPatch(curve, fc="none", ec=TEXT[3], lw=lw, zorder=2))
    for y in rows:
        ax.add_patch(Circle((x, y), 0.48, fc=TEXT[3], ec="white", lw=0.8, zorder=3))


def draw_text_encoder(ax: Axes) -> None:
    """Words → embedding → self-attention layers → Bi-GRU → word_emb; a word keeps its row."""
    panel(ax, 0.7, 0.7, 52.3, 28.7, TEXT, "Text encoder")
    ink = TEXT[4]
    rows = [23.2 - 2.0 * i for i in range(len(CAPTION))]
    middle = (rows[0] + rows[-1]) / 2

    for word, y in zip(CAPTION, rows, strict=True):
        box(ax, 2.0, y - 0.85, 7.0, 1.7, edge=TEXT[2], radius=0.5)
        say(ax, 5.5, y - 0.05, word)
    say(ax, 5.5, 6.9, "caption", color=ink)

    for word, y in zip(CAPTION, rows, strict=True):  # the same word, the same embedding
        vector(ax, 12.0, y, 4.6, 1.3, 5, TEXT, seed=2 * CAPTION.index(word))
    say(ax, 14.3, 6.9, "level 0", color=ink)
    say(ax, 14.3, 3.6, "word\nembedding", weight="bold", color=ink)

    bottom, height = rows[-1] - 1.1, rows[0] - rows[-1] + 2.2
    for x, arcs, level in (
        (19.4, ((1, 2), (2, 3), (3, 4), (4, 6), (5, 6)), ("phrases", "level 1")),
        (28.2, ((0, 7), (1, 3), (2, 6), (3, 6)), ("higher levels", "levels 2–4")),
    ):
        box(ax, x, bottom, 7.2, height, edge=TEXT[2])
        draw_arcs(ax, x + 1.4, rows, arcs, w=4.6, lw=1.4)
        say(ax, x + 3.6, rows[0] + 2.3, level[0], weight="bold", color=ink)
        say(ax, x + 3.6, 6.9, level[1], color=ink)
    say(ax, 14.3, rows[0] + 2.3, "words", weight="bold", color=ink)

    ax.plot((19.4, 19.4, 35.4, 35.4), (6.0, 5.5, 5.5, 6.0), color=TEXT[3], lw=0.9)
    say(ax, 27.4, 4.3, "4 self-attention layers", weight="bold", color=ink)
    say(ax, 27.4, 2.2, r"$A = l\,g^{\mathrm{T}} /\, L,\;\;\; x \leftarrow x + A\,u$",
        EQUATION, color=ink)  # fmt: skip

    box(ax, 37.4, bottom, 7.6, height, edge=TEXT[2])
    for x, step in ((39.8, 1), (42.6, -1)):
        order = rows[::step]
        for start, end in itertools.pairwise(order):
            arrow(ax, (x, start), (x, end + 0.45 * step), color=TEXT[3], lw=1.0, head=5)
        for y in rows:
            ax.add_patch(Circle((x, y), 0.48, fc=TEXT[3], ec="white", lw=0.8, zorder=5))
    say(ax, 41.2, rows[0] + 2.3, "Bi-GRU", weight="bold", color=ink)
    say(ax, 44.4, 5.2, r"$q_l = \mathrm{l2norm}((\overrightarrow{h}_l +"
        r"\overleftarrow{h}_l)\,/\,2)$", EQUATION, color=ink)  # fmt: skip

    ends = (9.2, 11.8), (16.8, 19.3), (26.6, 28.2), (35.4, 37.4), (45.0, 48.5)
    for start, end in ends:
        arrow(ax, (start, middle), (end, middle), color=TEXT[3])
    for i, y in enumerate(rows):
        vector(ax, 48.7, y, 3.0, 1.3, 4, TEXT, seed=3 * i + 1)
    name(ax, 49.4, 27.7, "word_emb", ink, "(W, D)")


# -- similarity -----------------------------------------------------------------------------------


def draw_cross_attention(ax: Axes, x: float, y: float, w: float, h: float) -> None:
    """Words ask, regions answer: the weights as a small map, a row a word."""
    box(ax, x, y, w, h, edge=ALIGN[3], fill="white")
    ink = ALIGN[4]
    say(ax, x + w / 2, y + h - 1.5, "cross-attention", weight="bold", color=ink)
    say(ax, x + w / 2, y + h - 3.3, "word-guided", color=ink)
    weights = {  # to sun, cloud, tree, dog, frisbee, grass
        "a": (1, 1, 1, 2, 1, 1),
        "dog": (0, 0, 0, 4, 1, 1),
        "jumps": (0, 0, 0, 3, 2, 2),
        "for": (1, 1, 1, 2, 2, 1),
        "frisbee": (0, 1, 0, 1, 4, 0),
    }
    steps = ("#ffffff", ALIGN[1], "#a5d3c0", ALIGN[2], ALIGN[3])
    cell, left, top = 1.35, x + 4.7, y + h - 6.4
    for i, (word, row) in enumerate(weights.items()):
        say(ax, left - 0.4, top - (i + 0.5) * cell, word, 6.8, ha="right", color=TEXT[4])
        for j, step in enumerate(row):
            ax.add_patch(Rectangle((left + j * cell, top - (i + 1) * cell), cell, cell,
                                   fc=steps[step], ec=ALIGN[2], lw=0.5, zorder=3))  # fmt: skip
    say(ax, left + 3 * cell, top + 0.9, "regions", 6.8, color=IMAGE[4])
    for dy, equation in (
        (8.6, r"$A = \mathrm{l2norm}_l(\mathrm{leaky}(q\,v^{\mathrm{T}}))$"),
        (5.5, r"$\alpha_l = \mathrm{softmax}_r(9\,A_{lr})$"),
        (2.2, r"$m_l = \mathrm{l2norm}(\sum_r\,\alpha_{lr} v_r)$"),
    ):
        say(ax, x + w / 2, y + dy, equation, EQUATION, color=ink)


def draw_pooling(ax: Axes, x: float, y: float, hue: tuple, out: str, equations: tuple) -> None:
    """Global pooling of one side, and the global vector it gives."""
    box(ax, x, y, 15.0, 9.0, fill=hue[1], edge=hue[3])
    say(ax, x + 7.5, y + 7.5, "global pooling", weight="bold", color=hue[4])
    for dy, equation in zip((4.9, 2.1), equations, strict=True):
        say(ax, x + 7.5, y + dy, equation, EQUATION, color=hue[4])
    arrow(ax, (x + 15.0, y + 4.5), (x + 17.8, y + 4.5), color=hue[3])
    vector(ax, x + 18.0, y + 4.5, 8.4, 1.6, 9, hue, seed=4)
    name(ax, x + 22.2, y + 6.6, out, hue[4])


def draw_alignments(ax: Axes, x: float, y: float, w: float, h: float) -> None:
    """Global alignment s_0 above, local alignments s_1 … s_L below, together one block."""
    box(ax, x, y, w, h, fill=ALIGN[1], edge=ALIGN[3], radius=0.8)
    for title, equation, top, height, width, vectors in (
        ("global alignment", r"$s_0 = \mathrm{l2norm}(P\/′(\hat{\imath} - \hat{c})^2)$",
         y + 25.6, 10.8, w - 1.4, (("s_0", 4.9),)),
        ("local alignments", r"$s_l = \mathrm{l2norm}(P(m_l - q_l)^2)$",
         y + 13.2, 12.5, w - 2.9, (("s_1", 3.4), ("s_2", 4.85), ("s_L", 7.75))),
    ):  # fmt: skip
        box(ax, x + 0.7, top - height, width, height, edge=ALIGN[2])
        centre = x + 0.7 + width / 2
        say(ax, centre, top - 1.4, title, weight="bold", color=ALIGN[4])
        for i, (label, down) in enumerate(vectors):
            vector(ax, centre - 2.6, top - down, 6.2, 1.1, 6, ALIGN, seed=2 * i + 1)
            say(ax, centre - 3.1, top - down, f"${label}$", EQUATION, ha="right", color=ALIGN[4])
        say(ax, centre, top - height + 1.8, equation, EQUATION, color=ALIGN[4])
    say(ax, centre + 0.5, top - 6.3, "⋮", color=ALIGN[4])  # between s_2 and s_L


def draw_similarity(ax: Axes) -> None:
    """Global vectors above and below, words over regions between them, all alignments right."""
    panel(ax, 54.0, 0.7, 33.7, 58.6, ALIGN, "Similarity encoder")
    draw_pooling(
        ax, 55.6, 46.4, IMAGE, "image_global",
        (r"$\beta = \mathrm{softmax}_r(c \cdot (h_r \circ k))$",
         r"$\hat{\imath} = \mathrm{l2norm}(\sum_r\,\beta_r v_r)$"),
    )  # fmt: skip
    draw_pooling(
        ax, 55.6, 2.2, TEXT, "caption_global",
        (r"$\gamma = \mathrm{softmax}_l(c \cdot (h_l \circ k))$",
         r"$\hat{c} = \mathrm{l2norm}(\sum_l\,\gamma_l q_l)$"),
    )  # fmt: skip
    draw_cross_attention(ax, 55.6, 17.2, 13.4, 25.2)
    draw_alignments(ax, 71.3, 16.6, 15.5, 26.4)

    arrow(ax, (52.0, 50.2), (55.5, 50.2), color=IMAGE[3])
    arrow(ax, (52.0, 40.2), (55.5, 40.2), color=IMAGE[3])
    arrow(ax, (52.0, 19.2), (55.5, 19.2), color=TEXT[3])
    arrow(ax, (52.0, 9.2), (55.5, 9.2), color=TEXT[3])
    arrow(ax, (52.0, 13.2), (78.4, 13.2), (78.4, 17.3), color=TEXT[3])
    arrow(ax, (69.0, 23.6), (71.9, 23.6), color=ALIGN[3])
    say(ax, 70.2, 25.0, "$m_l$", EQUATION, color=ALIGN[4])
    say(ax, 77.0, 14.8, "$q_l$", EQUATION, color=TEXT[4])
    arrow(ax, (82.1, 50.9), (85.3, 50.9), (85.3, 42.2), color=IMAGE[3])
    arrow(ax, (82.1, 6.7), (85.3, 6.7), (85.3, 31.3), color=TEXT[3])
    say(ax, 84.3, 45.0, r"$\hat{\imath}$", EQUATION, color=IMAGE[4])
    say(ax, 84.3, 12.0, r"$\hat{c}$", EQUATION, color=TEXT[4])


# -- score and loss -------------------------------------------------------------------------------


def draw_sims(ax: Axes, x: float, top: float, cell: float, n: int = 6) -> None:
    """sims of a batch: the diagonal matches; one pair's row and column hold its rivals."""
    pair, rivals = 2, ((2, 4), (1, 2))
    for i in range(n):
        for j in range(n):
            fill = "#f4e1e9" if pair in (i, j) else "white"
            fill = ALIGN[3] if i == j else NEGATIVE if (i, j) in rivals else fill
            draw_cell(ax, x + j * cell, top - (i + 1) * cell, cell, fill, (i, j) in rivals)
    say(ax, x + n * cell / 2, top + 0.9, "captions", 6.8, color=TEXT[4])
    say(ax, x - 0.9, top - n * cell / 2, "images", 6.8, rotation=90, color=IMAGE[4])
    for row, (fill, label) in enumerate(((ALIGN[3], "positive"), (NEGATIVE, "hard negative"))):
        y = top - n * cell - 1.3 - 1.65 * row
        draw_cell(ax, x - 1.4, y - 0.5, 1.0, fill, crossed=row == 1)
        say(ax, x, y, label, 6.8, ha="left", color=LOSS[4])


def draw_cell(ax: Axes, x: float, y: float, cell: float, fill: str, crossed: bool) -> None:
    """One score; a hard negative also carries a cross, so that it is not told by colour alone."""
    ax.add_patch(Rectangle((x, y), cell, cell, fc=fill, ec=LOSS[2], lw=0.6, zorder=3))
    low, high = 0.28 * cell, 0.72 * cell
    for ys in ((low, high), (high, low)) if crossed else ():
        ax.plot((x + low, x + high), (y + ys[0], y + ys[1]), color="white", lw=1.2, zorder=4)


def draw_score_and_loss(ax: Axes) -> None:
    """Gates weigh the alignments, a score comes out, and a batch of scores makes the loss."""
    panel(ax, 88.7, 0.7, 13.6, 58.6, LOSS, "Score and loss")
    ink, x, w = LOSS[4], 89.6, 11.8
    centre = x + w / 2

    box(ax, x, 34.4, w, 21.2, edge=LOSS[2])
    arrow(ax, (86.8, 39.0), (x, 39.0), color=ALIGN[3])
    say(ax, centre, 54.1, "gates", weight="bold", color=ink)
    for i, (height, label) in enumerate(((4.2, "e_0"), (1.4, "e_1"), (5.0, "e_2"), (2.8, "e_L"))):
        left = x + 1.5 + 2.1 * i + (1.2 if i == 3 else 0)
        fill = ALIGN[3 if i else 4]
        ax.add_patch(Rectangle((left, 47.6), 1.3, height, fc=fill, ec="none", zorder=3))
        say(ax, left + 0.65, 46.4, f"${label}$", 8.2, color=ink)
    say(ax, x + 7.95, 46.6, "…", color=ink)
    say(ax, centre, 43.9, r"$e_l \propto \sigma(\mathrm{BN}(a \cdot s_l))$", EQUATION, color=ink)
    say(ax, centre, 40.7, "weighted sum", weight="bold", color=ink)
    say(ax, centre, 37.0, r"$s = \mathrm{l2norm}(\sum_l\,e_l s_l)$", EQUATION, color=ink)

    arrow(ax, (centre, 34.4), (centre, 32.7), color=LOSS[3])
    box(ax, x, 29.0, w, 3.7, edge=LOSS[2])
    say(ax, centre, 30.8, r"$\mathrm{score} = \sigma(w \cdot s)$", EQUATION, color=ink)

    arrow(ax, (centre, 29.0), (centre, 27.3), color=LOSS[3])
    box(ax, x, 10.6, w, 16.7, edge=LOSS[2])
    name(ax, centre, 25.8, "sims (B, C)", ink)
    draw_sims(ax, x + 2.3, 23.1, 1.3)

    arrow(ax, (centre, 10.6), (centre, 8.9), color=LOSS[3])
    box(ax, x, 1.6, w, 7.3, edge=LOSS[2])
    say(ax, centre, 7.4, "triplet loss", weight="bold", color=ink)
    say(ax, centre, 4.9, r"$\sum\,[\,0.2 + S^{-}\! - S^{+}]_{+}$", EQUATION, color=ink)
    say(ax, centre, 2.7, "i2t + t2i", 6.8, color=ink)


def draw() -> Figure:
    """The whole figure."""
    fig = Figure(figsize=(WIDTH / 10, HEIGHT / 10))
    ax = fig.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, HEIGHT))
    ax.axis("off")
    draw_image_encoder(ax)
    draw_text_encoder(ax)
    draw_similarity(ax)
    draw_score_and_loss(ax)
    return fig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("fig/model.png"), help="the PNG to write")
    parser.add_argument("--pdf", action="store_true", help="write a PDF beside it too")
    args = parser.parse_args()

    args.out.parent.mkdir(parents=True, exist_ok=True)
    matplotlib.rcdefaults()  # a matplotlibrc of the reader's must not change the picture
    matplotlib.rcParams.update({"font.family": "DejaVu Sans", "mathtext.fontset": "stix"})
    fig = draw()
    fig.savefig(args.out, dpi=DPI, metadata={"Software": None})
    print(args.out)
    if args.pdf:
        pdf = args.out.with_suffix(".pdf")
        fig.savefig(pdf, metadata={"CreationDate": None})
        print(pdf)


if __name__ == "__main__":
    main()
