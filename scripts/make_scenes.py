"""The embedded data set: small drawn pictures, five captions each, 36 regions, SCAN's layout.

    python scripts/make_scenes.py                     # into ./data, half a minute on one core

writes, the same bytes for the same options,

    data/scenes_images/{train,dev,test}/*.png         96 × 96 pictures
    data/scenes_precomp/{split}_ims.npy               float32 (n, 36, dim), one row a picture
    data/scenes_precomp/{split}_caps.txt              one caption a line, five in a row a picture
    data/scenes_precomp/{split}_ids.txt               the picture's file name
    data/scenes_precomp/{split}_boxes.npy             float32 (n, 36, 4), x1 y1 x2 y2 in pixels
    data/scenes_precomp/{split}_scenes.jsonl          what was drawn, one JSON object a picture
    data/scenes_precomp/{split}_foils.jsonl           captions with one word made wrong
    data/scenes_precomp/{split}_features.json         how features are made of other pictures, …
    data/scenes_precomp/projection.npz                … and the train features' mean and scale

A scene is two groups of objects (one to three of a size, colour and shape) in a relation, at
times with a third group that stands aside. Every picture has a TWIN: the same groups in another
relation. Each caption names both groups and the relation, so it is true of its picture and false
of the twin, and a matcher that sees objects only must guess between the two. The last lines
printed are how far such guessing gets: a model that scores more has read relations.

Train pictures come in families of four, the same groups in each of the four relations. Two groups
that stand together in one family, or pair of twins, do so in no other, of any split.

Shape letters: n pictures, b pictures of a block, R = 36 regions.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import re
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from errors import InputError, one_line
from evaluation import progress

SPLITS = ("train", "dev", "test")
CAPTIONS = 5  # a picture

# ---------------------------------------------------------------- what there is in a scene

COUNTS = {1: ("a", "one"), 2: ("two",), 3: ("three",)}
SIZES = {"small": (6.0, ("small", "little")), "large": (10.0, ("large", "big"))}  # radius, words
COLOURS = {
    "red": (206, 44, 44), "orange": (240, 140, 28), "yellow": (244, 216, 52),
    "green": (48, 150, 66), "blue": (44, 92, 204), "purple": (142, 60, 168),
}  # fmt: skip


def polygon(degrees: Sequence[float], radii: Sequence[float] = (1.0,)) -> np.ndarray:
    """Corners (k, 2) at these directions (0 = up, clockwise), the radii taken in turn."""
    angles = np.radians(degrees)
    radius = np.resize(radii, len(angles))
    return np.stack([radius * np.sin(angles), -radius * np.cos(angles)], axis=1)


SHAPES = {  # unit polygons; a group's radius is the circle they fit in
    "circle": polygon(np.arange(0, 360, 9), (0.86,)),
    "square": polygon([45, 135, 225, 315]),
    "triangle": polygon([0, 120, 240]),
    "star": polygon(np.arange(0, 360, 36), (1.0, 0.42)),
    "cross": np.array([[-1, -3], [1, -3], [1, -1], [3, -1], [3, 1], [1, 1],
                       [1, 3], [-1, 3], [-1, 1], [-3, 1], [-3, -1], [-1, -1]]) / math.sqrt(10),
}  # fmt: skip


class Group(NamedTuple):
    """Alike objects that stand close together."""

    count: int
    size: str
    colour: str
    shape: str


class Relation(NamedTuple):
    """How captions say where one group is, seen from another."""

    axis: int  # 0 = x, 1 = y
    sign: int  # -1: at smaller coordinates
    opposite: str
    prepositions: tuple[str, ...]
    side: str  # where it is, of "them"
    place: str  # where it is in a picture of two groups


RELATIONS = {
    "left of": Relation(
        0, -1, "right of", ("left of", "to the left of"), "to {their} left", "on the left"
    ),
    "right of": Relation(
        0, 1, "left of", ("right of", "to the right of"), "to {their} right", "on the right"
    ),
    "above": Relation(1, -1, "below", ("above", "over"), "above {them}", "at the top"),
    "below": Relation(
        1, 1, "above", ("below", "under", "beneath"), "below {them}", "at the bottom"
    ),
}


@dataclass(frozen=True)
class Scene:
    """groups[0] is in `relation` to groups[1]; a third group, if any, stands aside."""

    groups: tuple[Group, ...]
    relation: str
    twin: int | None = None  # index in the split of the picture of the same groups otherwise


GROUPS = [Group(*g) for g in itertools.product(COUNTS, SIZES, COLOURS, SHAPES)]
THIRD_GROUP = 0.25  # of the scenes
# Pictures of the same groups, each in another relation. Relations are learned from such pictures
# that meet in a batch; of families of four, three times as many meet as of twins.
FAMILY = {"train": 4, "dev": 2, "test": 2}


@functools.cache
def split_of(a: Group, b: Group) -> str:
    """The one split in which these two groups stand together: 5/8 train, 1/8 dev, 2/8 test."""
    key = zlib.crc32(repr(sorted([tuple(a), tuple(b)])).encode())
    return ("train", "train", "train", "train", "train", "dev", "test", "test")[key % 8]


def alike(a: Group, b: Group) -> bool:
    """Groups of one colour and shape are not put together: they would read as one."""
    return (a.colour, a.shape) == (b.colour, b.shape)


def draw_scenes(split: str, n: int, rng: np.random.Generator) -> list[Scene]:
    """n scenes of a split; twins stand next to each other. A smaller n gives the first of them.

    Raises:
        InputError: if there are not so many.
    """
    pairs = [
        pair for pair in itertools.combinations(GROUPS, 2)
        if split_of(*pair) == split and not alike(*pair)
    ]  # fmt: skip
    used: set[frozenset[Group]] = set()
    scenes: list[Scene] = []
    for k in rng.permutation(len(pairs)):
        if len(scenes) >= n:
            break
        groups = [pairs[k][i] for i in rng.permutation(2)]
        if frozenset(groups) in used:
            continue
        if rng.random() < THIRD_GROUP:
            groups += third_group(groups, split, used, rng)
        used.update(frozenset(pair) for pair in itertools.combinations(groups, 2))
        for relation in draw_relations(FAMILY[split], rng):
            twin = len(scenes) ^ 1
            scenes.append(Scene(tuple(groups), relation, twin if twin < n else None))
    if len(scenes) < n:
        raise InputError(f"--{split} {n}: there are {len(scenes)} different scenes for this split")
    return scenes[:n]


def draw_relations(n: int, rng: np.random.Generator) -> list[str]:
    """n different relations, first and second opposite two times in three."""
    relations = [str(r) for r in rng.permutation(list(RELATIONS))]
    opposite = relations.index(RELATIONS[relations[0]].opposite)
    if rng.random() < 0.5:
        relations[1], relations[opposite] = relations[opposite], relations[1]
    return relations[:n]


def third_group(
    groups: list[Group], split: str, used: set[frozenset[Group]], rng: np.random.Generator
) -> list[Group]:
    """[a group that may stand beside these two], or [] if there is none."""
    free = [
        c for c in GROUPS
        if all(
            split_of(c, g) == split and not alike(c, g) and frozenset((c, g)) not in used
            for g in groups
        )
    ]  # fmt: skip
    return [free[rng.integers(len(free))]] if free else []


# ---------------------------------------------------------------- where things are, and pictures

SIDE = 96
MARGIN = 2  # between objects and the edge
APART = (7, 24)  # pixels between related groups, along the relation's axis
SHIFT = 6  # of the groups' centres across that axis
OVERSAMPLE = 4


def cluster(count: int, radius: float, rng: np.random.Generator) -> np.ndarray:
    """Centres (count, 2) of objects that touch nowhere, about the middle of their box."""
    step, turn = 2 * radius + rng.uniform(1, 3), rng.uniform(0, 2 * math.pi)
    if count == 3 and rng.random() < 0.5:
        angles = turn + np.arange(3) * 2 * math.pi / 3
        centres = step / math.sqrt(3) * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    else:
        centres = np.arange(count)[:, None] * step * np.array([math.cos(turn), math.sin(turn)])
    return centres - (centres.min(axis=0) + centres.max(axis=0)) / 2


def lay_out(scene: Scene, rng: np.random.Generator) -> tuple[list[np.ndarray], list[float]]:
    """Centres (count, 2) in pixels, and the radius, of each group.

    Related groups are apart along the relation's axis and level across it; all together they
    stand anywhere in the picture.
    """
    relation = RELATIONS[scene.relation]
    radii = [SIZES[g.size][0] + rng.uniform(-0.5, 0.5) for g in scene.groups]
    while True:
        clusters = [cluster(g.count, r, rng) for g, r in zip(scene.groups, radii, strict=True)]
        halves = [c.max(axis=0) + r for c, r in zip(clusters, radii, strict=True)]
        offset = rng.uniform(-SHIFT, SHIFT, size=2)  # of groups[0], seen from groups[1]
        apart = halves[0] + halves[1] + rng.uniform(*APART)
        offset[relation.axis] = relation.sign * apart[relation.axis]
        low = np.minimum(offset - halves[0], -halves[1]) - MARGIN
        room = SIDE - (np.maximum(offset + halves[0], halves[1]) + MARGIN - low)
        if (room < 0).any():
            continue
        middle = rng.uniform(0, 1, size=2) * room - low
        middles = [middle + offset, middle]
        if len(scene.groups) == 3:
            middles += stand_aside(middles, halves, rng)
        if len(middles) == len(clusters):
            return [c + m for c, m in zip(clusters, middles, strict=True)], radii


def stand_aside(
    middles: list[np.ndarray], halves: list[np.ndarray], rng: np.random.Generator
) -> list[np.ndarray]:
    """[a middle for the third box, clear of the two], or [] if none is found."""
    half = halves[2]
    for _ in range(40):
        middle = rng.uniform(half + MARGIN, SIDE - half - MARGIN)
        gaps = [np.abs(middle - m) - half - h for m, h in zip(middles, halves[:2], strict=True)]
        if all(gap.max() >= 3 for gap in gaps):
            return [middle]
    return []


def ground(rng: np.random.Generator) -> Image.Image:
    """A pale, softly uneven surface."""
    tone = rng.uniform(196, 228) + rng.uniform(-10, 10, size=3)
    surface = np.broadcast_to(tone, (SIDE, SIDE, 3)).copy()
    for cells, height in ((5, 9.0), (24, 4.0)):
        bumps = Image.fromarray(rng.normal(0, height, (cells, cells)).astype(np.float32))
        surface += np.asarray(bumps.resize((SIDE, SIDE), Image.Resampling.BICUBIC))[..., None]
    return Image.fromarray(surface.clip(0, 255).astype(np.uint8))


def draw(
    scene: Scene, places: list[np.ndarray], radii: list[float], rng: np.random.Generator
) -> Image.Image:
    """The picture of a scene, SIDE × SIDE."""
    size = (SIDE * OVERSAMPLE, SIDE * OVERSAMPLE)
    picture = ground(rng).resize(size, Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(picture)
    for group, centres, radius in zip(scene.groups, places, radii, strict=True):
        for centre in centres:
            turn = rng.uniform(-8, 8) * math.pi / 180
            rotation = np.array([[math.cos(turn), math.sin(turn)],
                                 [-math.sin(turn), math.cos(turn)]])  # fmt: skip
            corners = (SHAPES[group.shape] * radius @ rotation + centre) * OVERSAMPLE
            fill = (np.array(COLOURS[group.colour]) + rng.uniform(-12, 12, 3)).clip(0, 255)
            edge = tuple(int(c) for c in 0.72 * fill)
            pen.polygon([tuple(c) for c in corners], tuple(int(c) for c in fill), edge, OVERSAMPLE)
    return picture.resize((SIDE, SIDE), Image.Resampling.BOX)


# ---------------------------------------------------------------- captions

# {a} and {b} are the groups, `a` in a relation to `b`; {near_b} is "left of", {at_b} is "to its
# left", {where_a} "on the left".
SENTENCES = (
    "{a} {near_b} {b}",
    "{a} {is_a} {near_b} {b}",
    "there {is_a} {a} {near_b} {b}",
    "{near_b} {b} {is_a} {a}",
    "{near_b} {b} there {is_a} {a}",
    "{b} with {a} {at_b}",
    "{b} {has_b} {a} {at_b}",
    "there {is_b} {b}, and {at_b} {is_a} {a}",
    "we see {b}; {at_b} there {is_a} {a}",
    "a picture of {a} {near_b} {b}",
    "{a} can be seen {near_b} {b}",
    "{a} {lies_a} {near_b} {b}",
)
SENTENCES_OF_TWO = (
    "{a} {where_a} and {b} {where_b}",
    "{where_a} there {is_a} {a}, {where_b} {b}",
)
ASIDES = ("{s}; there {is_c} also {c}", "{s}, and {c} elsewhere", "{s}; {c} can be seen too")
NAMES_THIRD = 0.4


def noun_phrase(group: Group, rng: np.random.Generator) -> str:
    """`two small blue squares`."""
    count, size = rng.choice(COUNTS[group.count]), rng.choice(SIZES[group.size][1])
    return f"{count} {size} {group.colour} {shapes(group)}"


def shapes(group: Group) -> str:
    """`circle`, or `circles`."""
    plural = "" if group.count == 1 else "es" if group.shape.endswith("s") else "s"
    return f"{group.shape}{plural}"


def agreement(group: Group, letter: str) -> dict[str, str]:
    """Verbs that go with a group: {is_a}, {has_a}, {lies_a}."""
    one = group.count == 1
    return {
        f"is_{letter}": "is" if one else "are",
        f"has_{letter}": "has" if one else "have",
        f"lies_{letter}": "lies" if one else "lie",
    }


def caption(
    template: str, groups: Sequence[Group], relation: str, aside: str | None,
    rng: np.random.Generator,
) -> str:  # fmt: skip
    """A sentence: groups[0] is in `relation` to groups[1]; `aside` names groups[2]."""
    a, b = groups[:2]
    seen, back = RELATIONS[relation], RELATIONS[RELATIONS[relation].opposite]
    its = {"them": "it", "their": "its"} if b.count == 1 else {"them": "them", "their": "their"}
    sentence = template.format(
        a=noun_phrase(a, rng), b=noun_phrase(b, rng),
        near_b=rng.choice(seen.prepositions), at_b=seen.side.format(**its),
        where_a=seen.place, where_b=back.place, **agreement(a, "a"), **agreement(b, "b"),
    )  # fmt: skip
    if aside is not None:
        c = groups[2]
        sentence = aside.format(s=sentence, c=noun_phrase(c, rng), **agreement(c, "c"))
    return f"{sentence[0].upper()}{sentence[1:]}."


def write_captions(
    scene: Scene, rng: np.random.Generator
) -> tuple[list[str], list[tuple[Group, ...]]]:
    """Five different captions, told from both sides, and the groups that each names."""
    captions: list[str] = []
    named: list[tuple[Group, ...]] = []
    templates = SENTENCES + SENTENCES_OF_TWO * (len(scene.groups) == 2)
    for k, t in enumerate(rng.permutation(len(templates))[:CAPTIONS]):
        groups, relation = scene.groups, scene.relation
        if k % 2:
            groups = (groups[1], groups[0], *groups[2:])
            relation = RELATIONS[relation].opposite
        with_third = len(groups) == 3 and rng.random() < NAMES_THIRD
        aside = str(rng.choice(ASIDES)) if with_third else None
        captions.append(caption(templates[t], groups, relation, aside, rng))
        named.append(groups if with_third else groups[:2])
    return captions, named


# ---------------------------------------------------------------- captions made wrong

ATTRIBUTES = Group._fields


def foils(
    text: str, scene: Scene, named: Sequence[Group], rng: np.random.Generator
) -> dict[str, str]:
    """For each attribute a caption that differs in one word and is false of the picture.

    The count is of a group of several, two for three or three for two, so that no other word has
    to agree; a caption that names no such group has none.
    """
    made = {}
    for attribute in ATTRIBUTES:
        changes = [
            (group, other)
            for group in named
            for value in VALUES[attribute]
            if (other := group._replace(**{attribute: value})) not in scene.groups
            and (attribute != "count" or min(group.count, value) > 1)
        ]
        if changes:
            made[attribute] = reworded(text, *changes[rng.integers(len(changes))])
    return made


VALUES = {"count": COUNTS, "size": SIZES, "colour": COLOURS, "shape": SHAPES}


def reworded(text: str, group: Group, other: Group) -> str:
    """`text` with a group's words replaced by those of another, alike in number."""
    counts = zip(COUNTS[group.count], COUNTS[other.count], strict=True)
    sizes = zip(SIZES[group.size][1], SIZES[other.size][1], strict=True)
    for (count, new_count), (size, new_size) in itertools.product(counts, sizes):
        old = f"{count} {size} {group.colour} {shapes(group)}"
        new = f"{new_count} {new_size} {other.colour} {shapes(other)}"
        for words, others in ((old, new), (old.capitalize(), new.capitalize())):
            if re.search(rf"\b{words}\b", text):
                return text.replace(words, others)
    raise ValueError(f"{text!r} does not name {group}")


# ---------------------------------------------------------------- features of 36 windows

GRID, WINDOW, STRIDE = 6, 36, 12  # windows overlap; (GRID − 1) · STRIDE + WINDOW = SIDE
N_COLOUR, N_EDGE, N_PART = 16, 24, 80
N_PLACE = 12
# Standardised, the place of a window would be 12 of 239 alike numbers; it is made to weigh more.
PLACE_GAIN = 3.0
FEATURE_BLOCK = 16  # pictures at a time


def window_boxes() -> np.ndarray:
    """The windows, row by row: float32 (R, 4), x1 y1 x2 y2 in pixels."""
    corner = np.arange(GRID) * STRIDE
    y, x = (c.ravel() for c in np.meshgrid(corner, corner, indexing="ij"))
    return np.stack([x, y, x + WINDOW, y + WINDOW], axis=1).astype(np.float32)


def fixed_filters() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Colour filters (N_COLOUR, 3, 1, 1) and their biases, edge and part filters.

    Random, but the same for every data set: features of two of them can be compared.
    """
    generator = torch.Generator().manual_seed(0)
    colour = F.normalize(torch.randn(N_COLOUR, 3, 1, 1, generator=generator), dim=1)
    bias = (torch.rand(N_COLOUR, generator=generator) - 0.5) / 2
    edge = torch.randn(N_EDGE, 3, 3, 3, generator=generator)
    edge = edge - edge.mean(dim=(2, 3), keepdim=True)  # blind to even ground
    edge = edge / edge.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()
    part = torch.randn(N_PART, N_EDGE, 4, 4, generator=generator) / math.sqrt(N_EDGE * 4 * 4)
    return colour, bias, edge, part


def window_geometry() -> Tensor:
    """Where each window is, (R, N_PLACE): its corners, and waves of its centre along x and y."""
    boxes = torch.from_numpy(window_boxes()) / SIDE
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    waves = [f(math.pi * k * centre) for k in (1, 2) for f in (torch.sin, torch.cos)]
    return torch.cat([boxes, *waves], dim=1)


@torch.inference_mode()
def region_features(pixels: np.ndarray) -> np.ndarray:
    """pixels (n, SIDE, SIDE, 3) uint8 -> float32 (n, R, dim), not yet standardised.

    Of each window, from the pixels inside it alone: mean colour of its 3 × 3 cells; mean
    response of colour filters, edge filters and part filters (of edges), each followed by a
    ReLU, and the largest response of part filters; its place.
    """
    if pixels.shape[1:] != (SIDE, SIDE, 3) or pixels.dtype != np.uint8:
        raise ValueError(f"expected uint8 (n, {SIDE}, {SIDE}, 3): {pixels.dtype} {pixels.shape}")
    colour, bias, edge, part = fixed_filters()
    geometry = window_geometry()
    blocks = []
    for start in range(0, len(pixels), FEATURE_BLOCK):
        block = torch.from_numpy(pixels[start : start + FEATURE_BLOCK])
        images = block.permute(0, 3, 1, 2).float() / 255 - 0.5  # (b, 3, H, W)
        cells = F.unfold(F.avg_pool2d(images, STRIDE), WINDOW // STRIDE).transpose(1, 2)
        colours = F.relu(F.conv2d(images, colour, bias))
        edges = F.relu(F.conv2d(images, edge))
        # Parts see 10 × 10 pixels: 4 × 4 of the halved map of edges, which see 3 × 3.
        parts = F.relu(F.conv2d(F.avg_pool2d(edges, 2), part))
        features = [
            cells,
            pool_windows(F.avg_pool2d, colours, step=1, sees=1),
            pool_windows(F.avg_pool2d, edges, step=1, sees=3),
            pool_windows(F.avg_pool2d, parts, step=2, sees=10),
            pool_windows(F.max_pool2d, parts, step=2, sees=10),
            geometry.expand(len(block), -1, -1),
        ]
        blocks.append(torch.cat(features, dim=2))  # (b, R, dim)
    return torch.cat(blocks).numpy()


def pool_windows(pool: Callable[..., Tensor], maps: Tensor, step: int, sees: int) -> Tensor:
    """maps (b, c, h, w) -> (b, R, c): each window's responses that see nothing outside it.

    `step` pixels lie between neighbours in a map, each of which sees `sees` × `sees` pixels.
    """
    pooled = pool(maps, (WINDOW - sees) // step + 1, STRIDE // step)  # (b, c, GRID, GRID)
    return pooled.flatten(2).transpose(1, 2)


# ---------------------------------------------------------------- what guessing gets


def objects_only(scenes: Sequence[Scene], named: Sequence[tuple[Group, ...]]) -> np.ndarray:
    """Scores (n_images, n_captions): the share of the groups named that are in the picture."""
    there = np.array([[g in scene.groups for g in GROUPS] for scene in scenes], dtype=np.float32)
    names = np.array([[g in groups for g in GROUPS] for groups in named], dtype=np.float32)
    return there @ names.T / names.sum(axis=1)


def expected_recall(scores: np.ndarray, right: np.ndarray, k: int) -> float:
    """R@k in percent, its expectation when ties are broken at random.

    scores, right (n_queries, n_candidates); a query's rank is that of its best right answer. Of m
    right and w wrong ones tied at the top score of the right, behind g better wrong ones, a right
    one is among the first k unless the first k − g of the m + w are all wrong.
    """
    best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
    tied = scores == best
    counts = zip(
        (tied & right).sum(axis=1).tolist(),
        (tied & ~right).sum(axis=1).tolist(),
        (scores > best).sum(axis=1).tolist(),
        strict=True,
    )
    return 100 * sum(
        1 - math.comb(w, k - g) / math.comb(m + w, min(k - g, m + w)) if k > g else 0.0
        for m, w, g in counts
    ) / len(scores)  # fmt: skip


def ceiling(scores: np.ndarray, image_of_caption: np.ndarray) -> dict:
    """Expected recalls of tied scores (n_images, n_captions), named as in metrics.py."""
    right = np.arange(len(scores))[:, None] == image_of_caption
    ways = {"i2t": (scores, right), "t2i": (scores.T, right.T)}
    recalls = {
        way: {f"r{k}": expected_recall(*tables, k) for k in (1, 5, 10)}
        for way, tables in ways.items()
    }
    return recalls | {"rsum": sum(sum(recall.values()) for recall in recalls.values())}


# ---------------------------------------------------------------- the command line


class Split(NamedTuple):
    named: list[tuple[Group, ...]]  # groups each caption names
    features: np.ndarray  # (n, R, dim), not yet standardised


def make_split(out: Path, split: str, scenes: list[Scene], seed: int) -> Split:
    """Draw a split and write all of it but its features.

    Each picture has a generator of its own: more pictures, or another split, change none.
    """
    images, folder = out / "scenes_images" / split, out / "scenes_precomp"
    for stale in images.glob(f"{split}_*.png"):
        stale.unlink()
    ids, lines, captions, named, wrong = [], [], [], [], []
    pixels = np.empty((len(scenes), SIDE, SIDE, 3), dtype=np.uint8)
    for index, scene in enumerate(progress(scenes, len(scenes), f"drawing {split}")):
        rng = np.random.default_rng([seed, SPLITS.index(split), 1 + index])
        places, radii = lay_out(scene, rng)
        file = images / f"{split}_{index:05}.png"
        draw(scene, places, radii, rng).save(file, compress_level=1)
        with Image.open(file) as picture:
            pixels[index] = np.asarray(picture)
        texts, groups = write_captions(scene, rng)
        ids.append(file.name)
        for text, those in zip(texts, groups, strict=True):
            made = foils(text, scene, those, rng)
            wrong += [
                json.dumps({"caption": len(captions), "kind": kind, "text": foil})
                for kind, foil in made.items()
            ]
            captions.append(text)
        named += groups
        lines.append(json.dumps(describe(scene, file.name, places, radii)))
    for kind, content in (
        ("ids.txt", ids),
        ("caps.txt", captions),
        ("scenes.jsonl", lines),
        ("foils.jsonl", wrong),
    ):
        text = "".join(f"{line}\n" for line in content)
        (folder / f"{split}_{kind}").write_text(text, encoding="utf-8", newline="\n")
    boxes = np.repeat(window_boxes()[None], len(scenes), axis=0)
    np.save(folder / f"{split}_boxes.npy", boxes)
    return Split(named, region_features(pixels))


def describe(scene: Scene, name: str, places: list[np.ndarray], radii: list[float]) -> dict:
    """A scene as the line of {split}_scenes.jsonl."""
    groups = [
        group._asdict() | {"radius": round(radius, 1), "centres": centres.round(1).tolist()}
        for group, centres, radius in zip(scene.groups, places, radii, strict=True)
    ]
    return {"image": name, "groups": groups, "relation": scene.relation, "twin": scene.twin}


def make_scenes(out: Path, seed: int, sizes: dict[str, int]) -> dict:
    """Write the data set and print what there is; returns the ceiling of seeing objects only.

    Raises:
        InputError: for sizes or a seed that cannot be used, before anything is written.
    """
    if seed < 0:
        raise InputError(f"--seed {seed}: should be 0 or more")
    for split, n in sizes.items():
        if n < 1:
            raise InputError(f"--{split} {n}: should be 1 or more")
    if sizes["test"] % 2:
        raise InputError(f"--test {sizes['test']}: should be even, test pictures are twins")
    scenes = {
        split: draw_scenes(split, sizes[split], np.random.default_rng([seed, k, 0]))
        for k, split in enumerate(SPLITS)
    }
    folder = out / "scenes_precomp"
    for path in (folder, *(out / "scenes_images" / split for split in SPLITS)):
        path.mkdir(parents=True, exist_ok=True)

    made = {split: make_split(out, split, scenes[split], seed) for split in SPLITS}
    mean = made["train"].features.mean(axis=(0, 1), dtype=np.float64)
    std = made["train"].features.std(axis=(0, 1), dtype=np.float64)
    gain = np.where(np.arange(len(std)) < len(std) - N_PLACE, 1.0, PLACE_GAIN)
    # What a new picture has to go through: extract_features.py --backbone scenes --project FILE.
    np.savez(
        folder / "projection.npz", mean=mean, components=np.diag(gain / (std + 1e-6)), scale=1.0
    )
    recipe = {"recipe": {"backbone": "scenes", "grid": GRID, "project": "projection.npz"}}
    for split in SPLITS:
        (folder / f"{split}_features.json").write_text(json.dumps(recipe), encoding="utf-8")
    for split, (_, features) in made.items():
        standardised = ((features - mean) / (std + 1e-6)).astype(np.float32)
        standardised[..., -N_PLACE:] *= PLACE_GAIN
        np.save(folder / f"{split}_ims.npy", standardised)

    named = made["test"].named
    image_of_caption = np.arange(len(named)) // CAPTIONS
    guess = ceiling(objects_only(scenes["test"], named), image_of_caption)
    print(f"{folder}: {GRID * GRID} regions × {len(mean)}")
    for split, n in sizes.items():
        size = (folder / f"{split}_ims.npy").stat().st_size / 1e6
        twins = sum(scene.twin is not None for scene in scenes[split])
        print(f"{split:6}{n:6,} pictures ({twins:,} have a twin), {n * CAPTIONS:6,} captions, "
              f"{size:.1f} MB")  # fmt: skip
    print("seeing objects only, twins by guess, test would give (expected):")
    for way, name in (("i2t", "image to text"), ("t2i", "text to image")):
        r = guess[way]
        print(f"{name}  R@1 {r['r1']:.1f}  R@5 {r['r5']:.1f}  R@10 {r['r10']:.1f}")
    print(f"rsum {guess['rsum']:.1f}")
    return guess


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Draw the embedded data set.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", default="data", type=Path, help="the folder of data sets")
    parser.add_argument("--seed", default=0, type=int, help="of scenes, pictures and captions")
    parser.add_argument("--train", default=2000, type=int, help="pictures to train on")
    parser.add_argument("--dev", default=200, type=int, help="pictures to validate on")
    parser.add_argument("--test", default=400, type=int, help="pictures to test on, an even number")
    return parser  # fmt: skip


@one_line
def main() -> None:
    opt = options().parse_args()
    make_scenes(opt.out, opt.seed, {split: getattr(opt, split) for split in SPLITS})


if __name__ == "__main__":
    sys.exit(main())
