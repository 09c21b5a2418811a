"""Draw the embedded data set: pictures of coloured shapes with captions, in SCAN's layout.

    python scripts/make_scenes.py                     # into ./data, half a minute on one core

The same options give the same bytes:

    data/scenes_images/{train,dev,test}/*.png         96 × 96 pictures
    data/scenes_precomp/{split}_ims.npy               float32 (n, 36, 239), one row per picture
    data/scenes_precomp/{split}_caps.txt              one caption per line, five per picture
    data/scenes_precomp/{split}_ids.txt               file names of the pictures
    data/scenes_precomp/{split}_boxes.npy             float32 (n, 36, 4), x1 y1 x2 y2 in pixels
    data/scenes_precomp/{split}_scenes.jsonl          what was drawn, one JSON object per picture
    data/scenes_precomp/{split}_foils.jsonl           captions with one wrong word

A scene is two groups of objects in a relation; a group is one to three objects of one size, colour
and shape. A quarter of the scenes have a third group elsewhere. Every picture has a TWIN: the same
groups in another relation. A caption names both groups and their relation, so it is true of its
picture and false of the twin. A model that sees objects but not relations has to guess between
twins, which gives rsum 499.6 on test. A model that scores more has read relations.

Train pictures come in families of four: the same groups in each of the four relations. Two groups
that share a family or a pair of twins share no other, in any split.

Shape letters: n pictures, b pictures in a block, R = 36 regions.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import InputError, at_least, atomic_write, one_line, progress, write_text

SPLITS = ("train", "dev", "test")
CAPTIONS = 5  # per picture

# -- scenes ---------------------------------------------------------------------------------------

COUNT_WORDS = {1: ("a", "one"), 2: ("two",), 3: ("three",)}
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
RADIUS = {"small": 6.0, "large": 10.0}  # pixels
COLOURS = {
    "red": (206, 44, 44), "orange": (240, 140, 28), "yellow": (244, 216, 52),
    "green": (48, 150, 66), "blue": (44, 92, 204), "purple": (142, 60, 168),
}  # fmt: skip


def polygon(degrees: Sequence[float], radii: Sequence[float] = (1.0,)) -> np.ndarray:
    """Corners (k, 2) in these directions (0 = up, clockwise); the radii repeat in turn."""
    angles = np.radians(degrees)
    radius = np.resize(radii, len(angles))
    return np.stack([radius * np.sin(angles), -radius * np.cos(angles)], axis=1)


SHAPES = {  # corners of each shape within the unit circle
    "circle": polygon(np.arange(0, 360, 9), (0.86,)),
    "square": polygon([45, 135, 225, 315]),
    "triangle": polygon([0, 120, 240]),
    "star": polygon(np.arange(0, 360, 36), (1.0, 0.42)),
    "cross": np.array([[-1, -3], [1, -3], [1, -1], [3, -1], [3, 1], [1, 1],
                       [1, 3], [-1, 3], [-1, 1], [-3, 1], [-3, -1], [-1, -1]]) / math.sqrt(10),
}  # fmt: skip


class Group(NamedTuple):
    """Objects that look alike and stand close together."""

    count: int
    size: str
    colour: str
    shape: str


class Relation(NamedTuple):
    """Where the first group stands, seen from the second, and the words for it."""

    axis: int  # 0 = x, 1 = y
    sign: int  # -1: at smaller coordinates
    opposite: str
    prepositions: tuple[str, ...]
    side: str
    place: str  # in a picture of two groups


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


class Scene(NamedTuple):
    """groups[0] is in `relation` to groups[1]; a third group may stand elsewhere."""

    groups: tuple[Group, ...]
    relation: str
    twin: int | None = None  # index of the twin in the split


VALUES = {"count": COUNT_WORDS, "size": SIZE_WORDS, "colour": COLOURS, "shape": SHAPES}
GROUPS = [Group(*values) for values in itertools.product(*VALUES.values())]
THIRD_GROUP = 0.25  # share of scenes with one
# Pictures of the same groups, each in another relation. A model learns relations from such
# pictures that meet in a batch; in families of four, three times as many meet as in twins.
FAMILY = {"train": 4, "dev": 2, "test": 2}


@functools.cache
def may_meet(a: Group, b: Group, split: str) -> bool:
    """Whether two groups may share a picture of this split: 5/8 of pairs train, 1/8 dev, 2/8 test.

    Groups of one colour and shape never meet, because they would look like one group.
    """
    key = zlib.crc32(repr(sorted([tuple(a), tuple(b)])).encode())
    of_split = (*["train"] * 5, "dev", "test", "test")[key % 8] == split
    return of_split and (a.colour, a.shape) != (b.colour, b.shape)


def draw_scenes(split: str, n: int, rng: np.random.Generator) -> list[Scene]:
    """n different scenes, twins next to each other. A larger n only appends scenes.

    Raises:
        InputError: if the split has fewer than n scenes.
    """
    pairs = [pair for pair in itertools.combinations(GROUPS, 2) if may_meet(*pair, split)]
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
        raise InputError(f"--{split} {n}: this split has only {len(scenes)} different scenes")
    return scenes[:n]


def draw_relations(n: int, rng: np.random.Generator) -> list[str]:
    """n different relations; the first two are opposite in two of three cases."""
    relations = [str(r) for r in rng.permutation(list(RELATIONS))]
    opposite = relations.index(RELATIONS[relations[0]].opposite)
    if rng.random() < 0.5:
        relations[1], relations[opposite] = relations[opposite], relations[1]
    return relations[:n]


def third_group(
    groups: list[Group], split: str, used: set[frozenset[Group]], rng: np.random.Generator
) -> list[Group]:
    """One group that may join these two, or none."""
    free = [
        c for c in GROUPS
        if all(may_meet(c, g, split) and frozenset((c, g)) not in used for g in groups)
    ]  # fmt: skip
    return [free[rng.integers(len(free))]] if free else []


# -- pictures -------------------------------------------------------------------------------------

SIDE = 96  # pixels of a picture
MARGIN = 2  # pixels from objects to the edge
APART = (7, 24)  # pixels between related groups, along the axis of the relation
SHIFT = 6  # pixels by which their centres may differ across the axis
OVERSAMPLE = 4


def cluster(count: int, radius: float, rng: np.random.Generator) -> np.ndarray:
    """Centres (count, 2) of objects that do not touch, around the middle of their box."""
    step, turn = 2 * radius + rng.uniform(1, 3), rng.uniform(0, 2 * math.pi)
    if count == 3 and rng.random() < 0.5:
        angles = turn + np.arange(3) * 2 * math.pi / 3
        centres = step / math.sqrt(3) * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    else:
        centres = np.arange(count)[:, None] * step * np.array([math.cos(turn), math.sin(turn)])
    return centres - (centres.min(axis=0) + centres.max(axis=0)) / 2


def lay_out(scene: Scene, rng: np.random.Generator) -> tuple[list[np.ndarray], list[float]]:
    """Centres (count, 2) in pixels and the radius of each group.

    Layouts are drawn until one fits into the picture. Related groups are apart along the axis of
    the relation and nearly level across it.
    """
    relation = RELATIONS[scene.relation]
    radii = [RADIUS[g.size] + rng.uniform(-0.5, 0.5) for g in scene.groups]
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
    """One middle of the third group's box, clear of the two others, or none after 40 tries."""
    half = halves[2]
    for _ in range(40):
        middle = rng.uniform(half + MARGIN, SIDE - half - MARGIN)
        gaps = [np.abs(middle - m) - half - h for m, h in zip(middles, halves[:2], strict=True)]
        if all(gap.max() >= 3 for gap in gaps):
            return [middle]
    return []


def ground(rng: np.random.Generator) -> Image.Image:
    """A pale, slightly uneven surface."""
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


# -- captions -------------------------------------------------------------------------------------

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
NAMES_THIRD = 0.4  # share of captions that name the third group


class Caption(NamedTuple):
    sentence: str  # without capital and full stop
    phrases: dict[Group, str]  # how it names each group

    def text(self) -> str:
        return f"{self.sentence[0].upper()}{self.sentence[1:]}."


def shape_word(group: Group) -> str:
    """`circle`, or `circles`."""
    plural = "" if group.count == 1 else "es" if group.shape.endswith("s") else "s"
    return f"{group.shape}{plural}"


def noun_phrase(group: Group, rng: np.random.Generator) -> str:
    """`two small blue squares`."""
    count, size = rng.choice(COUNT_WORDS[group.count]), rng.choice(SIZE_WORDS[group.size])
    return f"{count} {size} {group.colour} {shape_word(group)}"


def verbs(group: Group, letter: str) -> dict[str, str]:
    """The verbs {is_a}, {has_a} and {lies_a} that agree with a group."""
    is_, has, lies = ("is", "has", "lies") if group.count == 1 else ("are", "have", "lie")
    return {f"is_{letter}": is_, f"has_{letter}": has, f"lies_{letter}": lies}


def write_captions(scene: Scene, rng: np.random.Generator) -> list[Caption]:
    """Five different captions; every second one tells the relation from the other side."""
    captions = []
    templates = SENTENCES + SENTENCES_OF_TWO * (len(scene.groups) == 2)
    for k, t in enumerate(rng.permutation(len(templates))[:CAPTIONS]):
        (a, b), relation = scene.groups[:2], RELATIONS[scene.relation]
        if k % 2:
            a, b, relation = b, a, RELATIONS[relation.opposite]
        with_third = len(scene.groups) == 3 and rng.random() < NAMES_THIRD
        aside = str(rng.choice(ASIDES)) if with_third else None
        phrases = {a: noun_phrase(a, rng), b: noun_phrase(b, rng)}
        them, their = ("it", "its") if b.count == 1 else ("them", "their")
        sentence = templates[t].format(
            a=phrases[a], b=phrases[b], **verbs(a, "a"), **verbs(b, "b"),
            near_b=rng.choice(relation.prepositions),
            at_b=relation.side.format(them=them, their=their),
            where_a=relation.place, where_b=RELATIONS[relation.opposite].place,
        )  # fmt: skip
        if aside is not None:
            c = scene.groups[2]
            phrases[c] = noun_phrase(c, rng)
            sentence = aside.format(s=sentence, c=phrases[c], **verbs(c, "c"))
        captions.append(Caption(sentence, phrases))
    return captions


def foils(caption: Caption, scene: Scene, rng: np.random.Generator) -> dict[str, str]:
    """For each attribute, the caption with one word changed so that it is false of the picture.

    A count changes between two and three only, so that no other word has to agree. A caption that
    names no group of several has no foil of count.
    """
    texts = {}
    for attribute, values in VALUES.items():
        changes = [
            (group, other)
            for group in caption.phrases
            for value in values
            if (other := group._replace(**{attribute: value})) not in scene.groups
            and (attribute != "count" or min(group.count, value) > 1)
        ]
        if changes:
            group, other = changes[rng.integers(len(changes))]
            phrase = caption.phrases[group]
            sentence = caption.sentence.replace(phrase, renamed(phrase, group, other))
            texts[attribute] = caption._replace(sentence=sentence).text()
    return texts


def renamed(phrase: str, group: Group, other: Group) -> str:
    """A group's noun phrase, changed to name another group by words of the same style."""
    count, size, *_ = phrase.split()
    count = COUNT_WORDS[other.count][COUNT_WORDS[group.count].index(count)]
    size = SIZE_WORDS[other.size][SIZE_WORDS[group.size].index(size)]
    return f"{count} {size} {other.colour} {shape_word(other)}"


# -- features of 36 windows -----------------------------------------------------------------------

GRID, WINDOW, STRIDE = 6, 36, 12  # windows overlap; (GRID − 1) · STRIDE + WINDOW = SIDE
N_COLOUR, N_EDGE, N_PART, N_PLACE = 16, 24, 80, 12
PLACE_GAIN = 3.0  # so that 12 numbers of a window's place count beside 227 of its content
FEATURE_BLOCK = 16  # pictures at a time


def window_boxes() -> np.ndarray:
    """The windows, row by row: float32 (R, 4), x1 y1 x2 y2 in pixels."""
    corner = np.arange(GRID) * STRIDE
    y, x = (c.ravel() for c in np.meshgrid(corner, corner, indexing="ij"))
    return np.stack([x, y, x + WINDOW, y + WINDOW], axis=1).astype(np.float32)


def window_places() -> Tensor:
    """Where each window is, (R, N_PLACE): its corners, and waves of its centre along x and y."""
    boxes = torch.from_numpy(window_boxes()) / SIDE
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    waves = [f(math.pi * k * centre) for k in (1, 2) for f in (torch.sin, torch.cos)]
    return torch.cat([boxes, *waves], dim=1)


def fixed_filters() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random colour filters, their biases, edge filters and part filters.

    They are the same for every data set, so that features of different data sets compare.
    """
    generator = torch.Generator().manual_seed(0)
    colour = F.normalize(torch.randn(N_COLOUR, 3, 1, 1, generator=generator), dim=1)
    bias = (torch.rand(N_COLOUR, generator=generator) - 0.5) / 2
    edge = torch.randn(N_EDGE, 3, 3, 3, generator=generator)
    edge = edge - edge.mean(dim=(2, 3), keepdim=True)  # an even surface gives 0
    edge = edge / edge.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()
    part = torch.randn(N_PART, N_EDGE, 4, 4, generator=generator) / math.sqrt(N_EDGE * 4 * 4)
    return colour, bias, edge, part


@torch.inference_mode()
def region_features(pixels: np.ndarray) -> np.ndarray:
    """pixels (n, SIDE, SIDE, 3) uint8 -> float32 (n, R, 239), not standardised.

    Features of a window come from its own pixels: the mean colour of its 3 × 3 cells, the mean
    response of colour, edge and part filters after a ReLU, the largest response of part filters,
    and its place. Parts are filters on the map of edges.

    Raises:
        ValueError: for pixels of another shape or type.
    """
    if pixels.shape[1:] != (SIDE, SIDE, 3) or pixels.dtype != np.uint8:
        raise ValueError(f"expected uint8 (n, {SIDE}, {SIDE}, 3): {pixels.dtype} {pixels.shape}")
    colour, bias, edge, part = fixed_filters()
    places = window_places()
    blocks = []
    for start in range(0, len(pixels), FEATURE_BLOCK):
        block = torch.from_numpy(pixels[start : start + FEATURE_BLOCK])
        images = block.permute(0, 3, 1, 2).float() / 255 - 0.5  # (b, 3, SIDE, SIDE)
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
            places.expand(len(block), -1, -1),
        ]
        blocks.append(torch.cat(features, dim=2))  # (b, R, 239)
    return torch.cat(blocks).numpy()


def pool_windows(pool: Callable[..., Tensor], maps: Tensor, step: int, sees: int) -> Tensor:
    """maps (b, c, h, w) -> (b, R, c), pooled over the responses inside each window.

    Neighbours in a map are `step` pixels apart, and each sees `sees` × `sees` pixels.
    """
    pooled = pool(maps, (WINDOW - sees) // step + 1, STRIDE // step)  # (b, c, GRID, GRID)
    return pooled.flatten(2).transpose(1, 2)


# -- files ----------------------------------------------------------------------------------------


def write_lines(path: Path, lines: Iterable[str]) -> None:
    write_text(path, "".join(f"{line}\n" for line in lines))


def save_array(path: Path, array: np.ndarray) -> None:
    atomic_write(path, lambda file: np.save(file, array))


def make_split(out: Path, split: str, scenes: list[Scene], seed: int) -> np.ndarray:
    """Write a split without its features; returns them (n, R, 239), not standardised.

    Each picture has its own random generator, so that it does not depend on the other options.
    """
    images, folder = out / "scenes_images" / split, out / "scenes_precomp"
    for stale in images.glob(f"{split}_*.png"):
        stale.unlink()
    ids, records, captions, wrong = [], [], [], []
    pixels = np.empty((len(scenes), SIDE, SIDE, 3), dtype=np.uint8)
    for index, scene in enumerate(progress(scenes, len(scenes), f"drawing {split}")):
        rng = np.random.default_rng([seed, SPLITS.index(split), 1 + index])
        places, radii = lay_out(scene, rng)
        name = f"{split}_{index:05}.png"
        picture = draw(scene, places, radii, rng)
        picture.save(images / name, compress_level=1)
        pixels[index] = np.asarray(picture)
        for caption in write_captions(scene, rng):
            wrong += [
                json.dumps({"caption": len(captions), "kind": kind, "text": text})
                for kind, text in foils(caption, scene, rng).items()
            ]
            captions.append(caption.text())
        groups = [
            group._asdict() | {"radius": round(radius, 1), "centres": centres.round(1).tolist()}
            for group, centres, radius in zip(scene.groups, places, radii, strict=True)
        ]
        record = {"image": name, "groups": groups, "relation": scene.relation, "twin": scene.twin}
        records.append(json.dumps(record))
        ids.append(name)
    write_lines(folder / f"{split}_ids.txt", ids)
    write_lines(folder / f"{split}_caps.txt", captions)
    write_lines(folder / f"{split}_scenes.jsonl", records)
    write_lines(folder / f"{split}_foils.jsonl", wrong)
    save_array(folder / f"{split}_boxes.npy", np.repeat(window_boxes()[None], len(scenes), axis=0))
    return region_features(pixels)


def make_scenes(out: Path, seed: int, sizes: dict[str, int]) -> None:
    """Write the data set, `sizes` pictures in each split, and print what it holds.

    Raises:
        InputError: if the data set cannot have these sizes, before anything is written.
    """
    if sizes["test"] % 2:
        raise InputError(f"--test {sizes['test']}: test pictures are twins, give an even number")
    scenes = {
        split: draw_scenes(split, sizes[split], np.random.default_rng([seed, k, 0]))
        for k, split in enumerate(SPLITS)
    }
    folder = out / "scenes_precomp"
    for path in (folder, *(out / "scenes_images" / split for split in SPLITS)):
        path.mkdir(parents=True, exist_ok=True)

    features = {split: make_split(out, split, scenes[split], seed) for split in SPLITS}
    mean = features["train"].mean(axis=(0, 1), dtype=np.float64)
    std = features["train"].std(axis=(0, 1), dtype=np.float64) + 1e-6
    gain = np.ones(len(std))
    gain[-N_PLACE:] = PLACE_GAIN
    for split in SPLITS:
        standardised = ((features[split] - mean) / std).astype(np.float32)
        save_array(folder / f"{split}_ims.npy", standardised * gain.astype(np.float32))
        n, mb = sizes[split], standardised.nbytes / 1e6
        print(f"{split:6}{n:6,} pictures, {n * CAPTIONS:6,} captions, {mb:.1f} MB of features")
    print(f"{folder}: a model that sees no relations guesses between twins: R@1 50.0, rsum 499.6")


@one_line
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--out", default="data", type=Path, help="folder of the data sets")
    add("--seed", default=0, type=at_least(0), help="seed of scenes, pictures and captions")
    add("--train", default=2000, type=at_least(1), help="number of train pictures")
    add("--dev", default=200, type=at_least(1), help="number of dev pictures")
    add("--test", default=400, type=at_least(1), help="number of test pictures, even")
    opt = parser.parse_args()
    make_scenes(opt.out, opt.seed, {split: getattr(opt, split) for split in SPLITS})


if __name__ == "__main__":
    main()
