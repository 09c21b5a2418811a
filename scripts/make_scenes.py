"""The embedded data set: small drawn pictures, five captions each, 36 regions, SCAN's layout.

    python scripts/make_scenes.py                     # into ./data, under a minute on one core

writes, the same bytes for the same options,

    data/scenes_images/{train,dev,test}/*.png         96 × 96 pictures
    data/scenes_precomp/{split}_ims.npy               float32 (n, 36, dim), one row a picture
    data/scenes_precomp/{split}_caps.txt              one caption a line, five in a row a picture
    data/scenes_precomp/{split}_ids.txt               the picture's file name
    data/scenes_precomp/{split}_boxes.npy             float32 (n, 36, 4), x1 y1 x2 y2 in pixels
    data/scenes_precomp/{split}_scenes.jsonl          what was drawn, one JSON object a picture

A scene is two groups of objects (one to three of a size, colour and shape) in a relation, at
times with a third group that stands aside. Every test picture has a TWIN: the same groups in
another relation. Each caption names both groups and the relation, so it is true of its picture
and false of the twin, and a matcher that sees objects only must guess between the two. The last
lines printed are how far such guessing gets: a model that scores more has read relations.

Two groups that stand together in one split do so in no other, and in dev and test in no other
pair of twins.

Shape letters: n pictures, H and W their sides in pixels, R = 36 regions.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import zlib
from collections.abc import Iterator, Sequence
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
SINGLES = {"train": 2, "dev": 0, "test": 0}  # pictures without a twin after each two with one


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
    pairs = [p for p in itertools.combinations(GROUPS, 2) if not alike(*p)]
    pairs = [p for p in pairs if split_of(*p) == split]
    used: set[frozenset[Group]] = set()
    scenes: list[Scene] = []
    singles = 0  # how many of the coming pictures go without a twin
    for k in rng.permutation(len(pairs)):
        if len(scenes) >= n:
            return scenes[:n]
        groups = [pairs[k][i] for i in rng.permutation(2)]
        if frozenset(groups) in used:
            continue
        if rng.random() < THIRD_GROUP:
            groups += third_group(groups, split, used, rng)
        used.update(frozenset(pair) for pair in itertools.combinations(groups, 2))
        first, second = rng.choice(list(RELATIONS), size=2, replace=False)
        if rng.random() < 0.5:
            second = RELATIONS[first].opposite
        index = len(scenes)
        twinned = singles == 0 and index + 1 < n
        scenes.append(Scene(tuple(groups), str(first), index + 1 if twinned else None))
        if twinned:
            scenes.append(Scene(tuple(groups), str(second), index))
        singles = SINGLES[split] if twinned else singles - 1
    raise InputError(f"--{split} {n}: there are {len(scenes)} different scenes for this split")


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
    plural = "" if group.count == 1 else "es" if group.shape.endswith("s") else "s"
    count, size = rng.choice(COUNTS[group.count]), rng.choice(SIZES[group.size][1])
    return f"{count} {size} {group.colour} {group.shape}{plural}"


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
