"""Draw the built-in data set: pictures of coloured shapes with captions, in SCAN's layout.

    python scripts/make_scenes.py                     # into ./data, half a minute on one core

The same options give the same bytes:

    data/scenes_images/{train,dev,test}/*.png         96 × 96 pictures
    data/scenes_precomp/{split}_ims.npy               float32 (n, 36, 239), one row per picture
    data/scenes_precomp/{split}_caps.txt              one caption per line, five per picture
    data/scenes_precomp/{split}_ids.txt               file names of the pictures
    data/scenes_precomp/{split}_boxes.npy             float32 (n, 36, 4), x1 y1 x2 y2 in pixels
    data/scenes_precomp/{split}_scenes.jsonl          what was drawn, one JSON object per picture
    data/scenes_precomp/{split}_foils.jsonl           captions with one wrong word

A scene is two groups of one to three equal objects in a relation; a quarter of the scenes have a
third group. Every picture has a TWIN: the same groups in another relation. A caption is true of
its picture and false of the twin. A model that sees objects but not relations has to guess between
twins, which gives rsum 499.6 on test. A model with a higher rsum has read relations.

Two groups appear together in only one family of pictures (see FAMILY), in only one split.

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
from collections import namedtuple
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.random import Generator, default_rng
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import InputError, at_least, one_line, progress, write_text

SPLITS = ("train", "dev", "test")
CAPTIONS = 5  # per picture

# -- scenes ---------------------------------------------------------------------------------------

COUNT_WORDS = {1: ("a", "one"), 2: ("two",), 3: ("three",)}
IS = {1: "is", 2: "are", 3: "are"}
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

VALUES = {"count": COUNT_WORDS, "size": SIZE_WORDS, "colour": COLOURS, "shape": SHAPES}
Group = namedtuple("Group", VALUES)  # objects that look alike and stand close together
GROUPS = [Group(*values) for values in itertools.product(*VALUES.values())]


class Relation(NamedTuple):
    """Where the first group stands, seen from the second, and the words for it."""

    axis: int  # 0 = x, 1 = y
    sign: int  # -1: at smaller coordinates
    opposite: str
    prepositions: tuple[str, ...]
    side: str
    place: str  # in a picture of two groups


RELATIONS = {
    "left of": Relation(0, -1, "right of", ("left of", "to the left of"),
                        "to {their} left", "on the left"),
    "right of": Relation(0, 1, "left of", ("right of", "to the right of"),
                         "to {their} right", "on the right"),
    "above": Relation(1, -1, "below", ("above", "over"), "above {them}", "at the top"),
    "below": Relation(1, 1, "above", ("below", "under", "beneath"),
                      "below {them}", "at the bottom"),
}  # fmt: skip


class Scene(NamedTuple):
    """groups[0] is in `relation` to groups[1]; a third group may stand elsewhere."""

    groups: tuple[Group, ...]
    relation: str


THIRD_GROUP = 0.25  # share of scenes with one
# How many pictures show the same groups, each in another relation. A model learns relations from
# such pictures in one batch. Families of four put three times as many into a batch as twins do.
FAMILY = {"train": 4, "dev": 2, "test": 2}


@functools.cache
def may_meet(a: Group, b: Group, split: str) -> bool:
    """Whether two groups may share a picture of this split: 5/8 of pairs train, 1/8 dev, 2/8 test.

    Groups of one colour and shape never meet, because they would look like one group.
    """
    key = zlib.crc32(repr(sorted([tuple(a), tuple(b)])).encode())
    of_split = (*["train"] * 5, "dev", "test", "test")[key % 8] == split
    return of_split and (a.colour, a.shape) != (b.colour, b.shape)


def draw_scenes(split: str, n: int, rng: Generator) -> list[Scene]:
    """n different scenes, twins next to each other. A larger n only appends scenes.

    Raises InputError if the split has fewer than n scenes.
    """
    pairs = [pair for pair in itertools.combinations(GROUPS, 2) if may_meet(*pair, split)]
    used: set[frozenset[Group]] = set()  # pairs of groups
    scenes: list[Scene] = []
    for k in rng.permutation(len(pairs)):
        groups = [pairs[k][i] for i in rng.permutation(2)]
        if frozenset(groups) in used:
            continue
        if rng.random() < THIRD_GROUP:
            free = [
                c for c in GROUPS
                if all(may_meet(c, g, split) and frozenset((c, g)) not in used for g in groups)
            ]  # fmt: skip
            groups += [free[rng.integers(len(free))]] if free else []
        used.update(map(frozenset, itertools.combinations(groups, 2)))
        scenes += [Scene(tuple(groups), r) for r in draw_relations(FAMILY[split], rng)]
        if len(scenes) >= n:
            return scenes[:n]
    raise InputError(f"--{split} {n}: this split has only {len(scenes)} different scenes")


def draw_relations(n: int, rng: Generator) -> list[str]:
    """n different relations; the first two are opposite in two of three cases."""
    relations = rng.permutation(list(RELATIONS)).tolist()
    opposite = relations.index(RELATIONS[relations[0]].opposite)
    if rng.random() < 0.5:
        relations[1], relations[opposite] = relations[opposite], relations[1]
    return relations[:n]


# -- pictures -------------------------------------------------------------------------------------

SIDE = 96  # pixels of a picture
MARGIN = 2  # pixels from objects to the edge
APART = (7, 24)  # pixels between related groups, along the axis of the relation
SHIFT = 6  # pixels by which their centres may differ across the axis
OVERSAMPLE = 4


def cluster(count: int, radius: float, rng: Generator) -> np.ndarray:
    """Centres (count, 2) of objects that do not touch, around the middle of their box."""
    step, turn = 2 * radius + rng.uniform(1, 3), rng.uniform(0, 2 * math.pi)
    if count == 3 and rng.random() < 0.5:
        angles = turn + np.arange(3) * 2 * math.pi / 3
        centres = step / math.sqrt(3) * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    else:
        centres = np.arange(count)[:, None] * step * np.array([math.cos(turn), math.sin(turn)])
    return centres - (centres.min(axis=0) + centres.max(axis=0)) / 2


def lay_out(scene: Scene, rng: Generator) -> tuple[list[np.ndarray], list[float]]:
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


def stand_aside(middles: list, halves: list, rng: Generator) -> list[np.ndarray]:
    """A middle for the third group's box, clear of the two others; none after 40 tries."""
    *others, half = halves
    for _ in range(40):
        middle = rng.uniform(half + MARGIN, SIDE - half - MARGIN)
        gaps = [np.abs(middle - m) - half - h for m, h in zip(middles, others, strict=True)]
        if all(gap.max() >= 3 for gap in gaps):
            return [middle]
    return []


def ground(rng: Generator) -> Image.Image:
    """A pale, slightly uneven surface."""
    tone = rng.uniform(196, 228) + rng.uniform(-10, 10, size=3)
    surface = np.broadcast_to(tone, (SIDE, SIDE, 3)).copy()
    for cells, height in ((5, 9.0), (24, 4.0)):
        bumps = Image.fromarray(rng.normal(0, height, (cells, cells)).astype(np.float32))
        surface += np.asarray(bumps.resize((SIDE, SIDE), Image.Resampling.BICUBIC))[..., None]
    return Image.fromarray(surface.clip(0, 255).astype(np.uint8))


def draw(scene: Scene, places: list, radii: list[float], rng: Generator) -> Image.Image:
    """The picture of a scene, SIDE × SIDE; places and radii as lay_out gives them."""
    picture = ground(rng).resize([SIDE * OVERSAMPLE] * 2, Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(picture)
    for group, centres, radius in zip(scene.groups, places, radii, strict=True):
        for centre in centres:
            turn = rng.uniform(-8, 8) * math.pi / 180
            rotation = np.array([[math.cos(turn), math.sin(turn)],
                                 [-math.sin(turn), math.cos(turn)]])  # fmt: skip
            corners = (SHAPES[group.shape] * radius @ rotation + centre) * OVERSAMPLE
            fill = (np.array(COLOURS[group.colour]) + rng.uniform(-12, 12, 3)).clip(0, 255)
            inside, edge = (tuple(colour.astype(int).tolist()) for colour in (fill, 0.72 * fill))
            pen.polygon(corners.ravel().tolist(), inside, edge, OVERSAMPLE)
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


def draw_synonyms(group: Group, rng: Generator) -> tuple[int, int]:
    """Which of its words a caption uses for the group's count, and which for its size."""
    return rng.integers(len(COUNT_WORDS[group.count])), rng.integers(len(SIZE_WORDS[group.size]))


def noun_phrase(group: Group, synonyms: tuple[int, int]) -> str:
    """`two small blue squares`."""
    count, size = COUNT_WORDS[group.count][synonyms[0]], SIZE_WORDS[group.size][synonyms[1]]
    plural = "" if group.count == 1 else "es" if group.shape.endswith("s") else "s"
    return f"{count} {size} {group.colour} {group.shape}{plural}"


def write_captions(scene: Scene, rng: Generator) -> list[tuple[str, dict]]:
    """Five different captions, each with the synonyms that it uses for its groups.

    Every second caption describes the relation from the other group's side.
    """
    captions = []
    templates = SENTENCES + SENTENCES_OF_TWO * (len(scene.groups) == 2)
    for k, t in enumerate(rng.permutation(len(templates))[:CAPTIONS]):
        (a, b), relation = scene.groups[:2], RELATIONS[scene.relation]
        if k % 2:
            a, b, relation = b, a, RELATIONS[relation.opposite]
        with_third = len(scene.groups) == 3 and rng.random() < NAMES_THIRD
        aside = rng.choice(ASIDES) if with_third else None
        synonyms = {a: draw_synonyms(a, rng), b: draw_synonyms(b, rng)}
        them, their = ("it", "its") if b.count == 1 else ("them", "their")
        sentence = templates[t].format(
            a=noun_phrase(a, synonyms[a]), b=noun_phrase(b, synonyms[b]),
            is_a=IS[a.count], lies_a="lies" if a.count == 1 else "lie",
            is_b=IS[b.count], has_b="has" if b.count == 1 else "have",
            near_b=rng.choice(relation.prepositions),
            at_b=relation.side.format(them=them, their=their),
            where_a=relation.place, where_b=RELATIONS[relation.opposite].place,
        )  # fmt: skip
        if with_third:
            c = scene.groups[2]
            synonyms[c] = draw_synonyms(c, rng)
            sentence = aside.format(s=sentence, c=noun_phrase(c, synonyms[c]), is_c=IS[c.count])
        captions.append((f"{sentence.capitalize()}.", synonyms))
    return captions


def foils(text: str, synonyms: dict, scene: Scene, rng: Generator) -> dict[str, str]:
    """For each attribute, the caption with one word changed so that it is false of the picture.

    A count changes only between two and three, so that no other word has to change. A caption that
    names no group of several objects has no count foil.
    """
    texts = {}
    for attribute, values in VALUES.items():
        changes = [
            (group, other)
            for group in synonyms
            for value in values
            if (other := group._replace(**{attribute: value})) not in scene.groups
            and (attribute != "count" or min(group.count, value) > 1)
        ]
        if changes:
            group, other = changes[rng.integers(len(changes))]
            right, wrong = (noun_phrase(g, synonyms[group]) for g in (group, other))
            texts[attribute] = text.lower().replace(right, wrong).capitalize()
    return texts


# -- features of 36 windows -----------------------------------------------------------------------

GRID, WINDOW, STRIDE = 6, 36, 12  # windows overlap; (GRID − 1) · STRIDE + WINDOW = SIDE
N_COLOUR, N_EDGE, N_PART, N_PLACE = 16, 24, 80, 12
CORNERS = range(0, GRID * STRIDE, STRIDE)
BOXES = np.float32([(x, y, x + WINDOW, y + WINDOW) for y in CORNERS for x in CORNERS])  # (R, 4)
PLACE_GAIN = 3.0  # so that the 12 numbers of place count beside the 227 of content
FEATURE_BLOCK = 16  # pictures at a time


def window_places() -> Tensor:
    """The place of each window (R, N_PLACE): its corners, and sin and cos of its centre."""
    boxes = torch.from_numpy(BOXES) / SIDE
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    waves = [f(math.pi * k * centre) for k in (1, 2) for f in (torch.sin, torch.cos)]
    return torch.cat([boxes, *waves], dim=1)


def fixed_filters() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random colour filters, their biases, edge filters and part filters.

    They are the same for every data set, so that features of different data sets are comparable.
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
    and its place. The part filters run on the edge map.
    """
    colour, bias, edge, part = fixed_filters()
    places = window_places()
    features = []
    for block in torch.from_numpy(pixels).split(FEATURE_BLOCK):
        images = block.permute(0, 3, 1, 2).float() / 255 - 0.5  # (b, 3, SIDE, SIDE)
        colours = F.relu(F.conv2d(images, colour, bias))
        edges = F.relu(F.conv2d(images, edge))
        # A part sees 10 × 10 pixels: 4 × 4 cells of the halved edge map. An edge sees 3 × 3.
        parts = F.relu(F.conv2d(F.avg_pool2d(edges, 2), part))
        of_block = [
            F.unfold(F.avg_pool2d(images, STRIDE), WINDOW // STRIDE).transpose(1, 2),
            pool_windows(F.avg_pool2d, colours, step=1, sees=1),
            pool_windows(F.avg_pool2d, edges, step=1, sees=3),
            pool_windows(F.avg_pool2d, parts, step=2, sees=10),
            pool_windows(F.max_pool2d, parts, step=2, sees=10),
            places.expand(len(block), -1, -1),
        ]
        features.append(torch.cat(of_block, dim=2))  # (b, R, 239)
    return torch.cat(features).numpy()


def pool_windows(pool: Callable[..., Tensor], maps: Tensor, step: int, sees: int) -> Tensor:
    """maps (b, c, h, w) -> (b, R, c), pooled over the responses inside each window.

    Neighbours in a map are `step` pixels apart, and each sees `sees` × `sees` pixels.
    """
    pooled = pool(maps, (WINDOW - sees) // step + 1, STRIDE // step)  # (b, c, GRID, GRID)
    return pooled.flatten(2).transpose(1, 2)


# -- files ----------------------------------------------------------------------------------------


def make_split(out: Path, split: str, scenes: list[Scene], seed: int) -> np.ndarray:
    """Write a split without its features; returns them (n, R, 239), not standardised.

    Each picture has its own random generator, so that it does not depend on the other options.
    """
    folder, pixels = out / "scenes_precomp", []
    ids, captions, records, wrong = [], [], [], []
    for index, scene in enumerate(progress(scenes, len(scenes), f"drawing {split}")):
        rng = default_rng([seed, SPLITS.index(split), 1 + index])
        places, radii = lay_out(scene, rng)
        picture = draw(scene, places, radii, rng)
        ids.append(f"{split}_{index:05}.png")
        picture.save(out / "scenes_images" / split / ids[-1], compress_level=1)
        pixels.append(np.asarray(picture))
        for text, synonyms in write_captions(scene, rng):
            for kind, foil in foils(text, synonyms, scene, rng).items():
                wrong.append(json.dumps({"caption": len(captions), "kind": kind, "text": foil}))
            captions.append(text)
        groups = [
            group._asdict() | {"radius": round(radius, 1), "centres": centres.round(1).tolist()}
            for group, centres, radius in zip(scene.groups, places, radii, strict=True)
        ]
        record = {"image": ids[-1], "groups": groups, "relation": scene.relation, "twin": index ^ 1}
        records.append(json.dumps(record))
    texts = {"ids.txt": ids, "caps.txt": captions, "scenes.jsonl": records, "foils.jsonl": wrong}
    for name, lines in texts.items():
        write_text(folder / f"{split}_{name}", "".join(f"{line}\n" for line in lines))
    np.save(folder / f"{split}_boxes.npy", np.repeat(BOXES[None], len(scenes), axis=0))
    return region_features(np.stack(pixels))


def make_scenes(out: Path, seed: int, sizes: dict[str, int]) -> None:
    """Write the data set, `sizes` pictures in each split, and print what it holds.

    Raises InputError if the data set cannot have these sizes, before anything is written.
    """
    scenes = {}
    for k, split in enumerate(SPLITS):
        if sizes[split] % 2:
            raise InputError(
                f"--{split} {sizes[split]}: pictures come in twins; give an even number"
            )
        scenes[split] = draw_scenes(split, sizes[split], default_rng([seed, k, 0]))
    folder = out / "scenes_precomp"
    for path in (folder, *(out / "scenes_images" / split for split in SPLITS)):
        path.mkdir(parents=True, exist_ok=True)

    features = {split: make_split(out, split, scenes[split], seed) for split in SPLITS}
    mean = features["train"].mean(axis=(0, 1), dtype=np.float64)
    std = features["train"].std(axis=(0, 1), dtype=np.float64) + 1e-6
    gain = np.ones(len(std), dtype=np.float32)
    gain[-N_PLACE:] = PLACE_GAIN
    for split, n in sizes.items():
        standardised = ((features[split] - mean) / std).astype(np.float32) * gain
        np.save(folder / f"{split}_ims.npy", standardised)
        mb = standardised.nbytes / 1e6
        print(f"{split:6}{n:6,} pictures, {n * CAPTIONS:6,} captions, {mb:.1f} MB of features")
    print(f"{folder}: a model that sees no relations guesses between twins: R@1 50.0, rsum 499.6")


@one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", default="data", type=Path, help="folder of the data sets")
    parser.add_argument("--seed", default=0, type=at_least(0), help="of everything drawn")
    for split, n in (("train", 2000), ("dev", 200), ("test", 400)):
        what = f"number of {split} pictures, even (default: {n})"
        parser.add_argument(f"--{split}", default=n, type=at_least(1), help=what)
    opt = parser.parse_args()
    make_scenes(opt.out, opt.seed, {split: getattr(opt, split) for split in SPLITS})


if __name__ == "__main__":
    main()
