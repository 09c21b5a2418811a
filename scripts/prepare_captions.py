"""Captions and image ids in SCAN's layout, from Karpathy's splits or COCO's annotation files.

    python scripts/prepare_captions.py dataset_flickr30k.json --data_name f30k_precomp
    python scripts/prepare_captions.py dataset_coco.json --data_name coco_precomp

writes, from the files of Karpathy's caption_datasets.zip (Flickr8k, Flickr30K, COCO),

    DATA_PATH/DATA_NAME/{split}_caps.txt   one caption a line, the five of an image consecutive
    DATA_PATH/DATA_NAME/{split}_ids.txt    one image a line

for train (with restval, unless --no-restval), dev (Karpathy's val) and test; for COCO also testall,
of which test is then the first 1,000 images. --split NAME writes one of them. Captions are the raw
text, every run of white space (line breaks too) one blank; --tokens takes Karpathy's tokens.
The first five captions of an image are taken (--captions_per_image), as SCAN did where COCO has
six or seven; empty ones do not count, and an image with fewer is an error.

Ids are COCO's numbers for COCO and file names for Flickr; --ids takes another kind. `filename` is
the picture below the folder of all pictures (val2014/COCO_val2014_000000391895.jpg), `imgid` the
number in Karpathy's file. Ids are compared without folder, suffix, COCO's prefix and leading zeros.

The captions have Karpathy's order. For features that exist already it is theirs:

    python scripts/prepare_captions.py dataset_coco.json --data_name coco_precomp \\
        --split dev --order data/coco_precomp/dev_ids.txt

writes the captions of exactly those images, in that order. COCO's own files know no dev and test,
so they need it always:

    python scripts/prepare_captions.py --coco captions_train2014.json captions_val2014.json \\
        --data_name coco_precomp --split dev --order dev_ids.txt

There an image's captions are taken in the order of their numbers.

All files are written or none. Nothing is written that does not fit a {split}_ims.npy in the folder.
The JSON is read whole: COCO's 144 MB take 1.4 GB of memory.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import REPEATED, RegionFile
from errors import InputError, one_line
from train import at_least

KINDS = ("cocoid", "imgid", "filename")
SPLITS = {"train": "train", "restval": "train", "val": "dev", "test": "test"}  # Karpathy's, SCAN's
COCO_1K = 1000  # images of COCO's `test`, the first of `testall`


class Image(NamedTuple):
    names: dict[str, str]  # its id of each kind
    split: str | None  # Karpathy's; COCO's own files say none
    captions: list[str]  # on one line each


# -- ids and files, also for convert_bottom_up.py -------------------------------------------------


def image_key(name: str) -> str:
    """What all names of an image have in common.

    "val2014/COCO_val2014_000000391895.jpg", "000000391895.jpg" and "391895" -> "391895"; a name
    that is no number keeps all but folder and suffix.
    """
    file = name.strip().rpartition("/")[2]
    stem = re.sub(r"\.(jpe?g|png|webp|bmp|gif|tiff?)$", "", file, flags=re.IGNORECASE)
    number = re.fullmatch(r"(?:COCO_[a-z]+[0-9]+_)?0*([0-9]+)", stem)
    return number[1] if number else stem


def split_name(text: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", text):
        raise argparse.ArgumentTypeError(
            f"{text!r}: file names begin with it; letters, digits, . _ -"
        )
    return text


def few(names: Iterable[str], shown: int = 3) -> str:
    """'a, b, c and 12 more'."""
    names = list(names)
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def read_id_list(path: Path) -> list[str]:
    """The images an `_ids.txt` names, each once; files that say an id once a caption are taken too.

    Raises:
        InputError: if it is not UTF-8, has no or empty lines, or names an image in two places.
    """
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error}") from error
    ids = [line.strip() for line in (lines[:-1] if lines[-1] == "" else lines)]
    if not ids or not all(ids):
        where = f"line {ids.index('') + 1} is empty" if ids else "empty"
        raise InputError(f"{path}: {where}; expected one image id a line")
    runs = [(name, len(list(run))) for name, run in groupby(ids)]
    if len({length for _, length in runs}) == 1:
        ids = [name for name, _ in runs]
    times = Counter(map(image_key, ids))
    twice = [key for key, count in times.items() if count > 1]
    if twice:
        raise InputError(f"{path}: {len(twice):,} images stand there more than once: {few(twice)}")
    return ids


def refuse_existing(targets: Iterable[Path], overwrite: bool) -> None:
    """
    Raises:
        InputError: if a target is there and may not be replaced.
    """
    for target in targets:
        if target.exists() and not overwrite:
            raise InputError(f"{target}: is there already; --overwrite replaces it")


def ids_to_write(target: Path, ids: list[str], beside: Path, option: str, overwrite: bool) -> bool:
    """Whether `{split}_ids.txt` must be written: not where it names these images already.

    Raises:
        InputError: if it names others, or in another order, and may not be replaced: `beside`
            (the split's regions, or its captions) is there and has its order.
    """
    if not target.exists():
        return True
    there = read_id_list(target)
    if [*map(image_key, there)] == [*map(image_key, ids)]:
        return False
    if beside.is_file():
        raise InputError(
            f"{target}: {beside.name} is there and has its order, which is another than that of "
            f"the {len(ids):,} images to be written; keep to it with {option} {target}, or remove "
            f"both files"
        )
    refuse_existing([target], overwrite)
    return True


@contextlib.contextmanager
def new_files() -> Iterator[Callable[[Path], BinaryIO]]:
    """Files that appear together: written beside their targets, renamed when all are whole.

    What is yielded opens a target's temporary file. After an exception none is left.
    """
    files: dict[Path, BinaryIO] = {}

    def create(target: Path) -> BinaryIO:
        if target.is_dir():
            raise InputError(f"{target}: is a folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        files[target] = target.with_name(target.name + ".tmp").open("w+b")
        return files[target]

    try:
        yield create
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        for target, file in files.items():
            os.replace(file.name, target)
    except OSError as error:
        if error.filename is not None or not files:
            raise
        # Of a write that fails the system does not say where.
        folder = next(iter(files)).parent
        raise InputError(f"{folder}: {error.strerror or error}; nothing was written") from error
    finally:
        for file in files.values():
            with contextlib.suppress(OSError):  # what could not be written cannot be flushed either
                file.close()
            Path(file.name).unlink(missing_ok=True)


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Columns of text; the first and the last to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *middle, last in rows:
        cells = [value.rjust(width) for value, width in zip(middle, widths[1:-1], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells, last]))


# -- sources --------------------------------------------------------------------------------------


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON file, or not all of one: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def listed(content: dict, name: str, path: Path, what: str) -> list[dict]:
    """The list of objects under a name."""
    entries = content.get(name)
    if not isinstance(entries, list) or not entries:
        found = ", ".join(map(repr, content)) or "nothing"
        raise InputError(f"{path}: no list '{name}' in it, as {what} has; found {found[:200]}")
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise InputError(f"{path}: {name}[{number}] is no object; expected {what}")
    return entries


def on_one_line(caption: str) -> str:
    if not isinstance(caption, str):
        raise TypeError(f"a caption is text, not {caption!r:.40}")
    return " ".join(caption.split())


def listed_words(sentence: dict) -> list[str]:
    if not isinstance(sentence["tokens"], list):
        raise TypeError("the tokens of a sentence are a list")
    return sentence["tokens"]


def read_karpathy(path: Path, tokens: bool) -> list[Image]:
    """The images of a dataset_*.json of Karpathy's.

    Raises:
        InputError: if it is no such file.
    """
    images = []
    for number, entry in enumerate(listed(read_json(path), "images", path, "Karpathy's files")):
        try:
            names = {kind: str(entry[kind]) for kind in KINDS if kind in entry}
            if "filename" in names and entry.get("filepath"):
                names["filename"] = f"{entry['filepath']}/{names['filename']}"
            split = entry["split"]
            if split not in SPLITS:
                raise ValueError(f"split {split!r}, expected {', '.join(SPLITS)}")
            sentences = entry["sentences"]
            texts = [" ".join(listed_words(s)) if tokens else s["raw"] for s in sentences]
            images.append(Image(names, split, [*map(on_one_line, texts)]))
        except (KeyError, TypeError, ValueError) as error:
            missing = "no " if isinstance(error, KeyError) else ""
            raise InputError(
                f"{path}: images[{number}] is not as in Karpathy's files: {missing}{error}"
            ) from error
    return images


def read_coco(paths: list[Path]) -> list[Image]:
    """The images of COCO's captions_*.json, with their captions in the order of their numbers.

    Raises:
        InputError: if one is no such file, or two have an image in common.
    """
    try:
        from pycocotools.coco import COCO
    except ImportError as error:
        raise InputError(f"--coco: {error}; pip install -r requirements.txt") from error
    found: dict[int, Image] = {}
    for path in paths:
        coco = COCO()
        coco.dataset = content = read_json(path)
        for name, keys in (("images", {"id"}), ("annotations", {"id", "image_id", "caption"})):
            for number, entry in enumerate(listed(content, name, path, "COCO's captions_*.json")):
                if keys - entry.keys():
                    raise InputError(
                        f"{path}: {name}[{number}] has no '{min(keys - entry.keys())}'; expected "
                        f"COCO's captions_*.json"
                    )
                if not all(isinstance(entry[key], int) for key in keys - {"caption"}) or (
                    "caption" in keys and not isinstance(entry["caption"], str)
                ):
                    raise InputError(f"{path}: {name}[{number}]: expected whole numbers and text")
        content.pop("categories", None)  # of objects; captions have none
        with contextlib.redirect_stdout(io.StringIO()):  # it reports what it does
            coco.createIndex()
        if len(coco.imgs) < len(content["images"]) or len(coco.anns) < len(content["annotations"]):
            raise InputError(f"{path}: some ids of images or annotations stand there twice")
        twice = found.keys() & coco.imgs.keys()
        if twice:
            raise InputError(
                f"{path}: {len(twice):,} of its images are in an earlier file as well: "
                f"{few(map(str, sorted(twice)))}"
            )
        for image, entry in coco.imgs.items():
            names = {"cocoid": str(image)}
            if "file_name" in entry:
                names["filename"] = str(entry["file_name"])
            annotations = sorted(coco.imgToAnns.get(image, ()), key=lambda one: one["id"])
            found[image] = Image(
                names, None, [on_one_line(annotation["caption"]) for annotation in annotations]
            )
    return list(found.values())


# -- splits ---------------------------------------------------------------------------------------


def splits_of(images: list[Image], restval: bool = True) -> dict[str, list[Image]]:
    """SCAN's splits of Karpathy's images, in file order; those that have images."""
    splits: dict[str, list[Image]] = {split: [] for split in ("train", "dev", "test", "testall")}
    for image in images:
        if image.split != "restval" or restval:
            splits[SPLITS[image.split]].append(image)
    if any("cocoid" in image.names for image in images):
        splits["testall"] = splits["test"]
        splits["test"] = splits["testall"][:COCO_1K]
    return {split: members for split, members in splits.items() if members}


def by_name(images: list[Image], kind: str, source: str) -> dict[str, Image]:
    """The images by the key of one kind of id.

    Raises:
        InputError: if one has no such id, or two have the same.
    """
    found: dict[str, Image] = {}
    twice = []
    for image in images:
        name = image.names.get(kind)
        if name is None or not writable(name) or on_one_line(name) != name or not name:
            raise InputError(
                f"{source}: an image without a usable {kind}, {image.names}; --ids takes another"
            )
        if image_key(name) in found:
            twice.append(name)
        found[image_key(name)] = image
    if twice:
        raise InputError(f"{source}: {len(twice):,} images stand there twice: {few(twice)}")
    return found


def in_order(
    images: list[Image], ids: list[str], kind: str, order: Path, source: str
) -> list[Image]:
    """The images that ids name, in their order.

    Raises:
        InputError: if some are not known; if they all are known as another kind of id, it says so.
    """
    found = by_name(images, kind, source)
    unknown = [name for name in ids if image_key(name) not in found]
    if unknown:
        hint = ""
        for other in KINDS:
            known = {image_key(i.names[other]) for i in images if other in i.names}
            if other != kind and known.issuperset(map(image_key, ids)):
                hint = f"; they all are known with --ids {other}"
        raise InputError(
            f"{order}: {len(unknown):,} of its {len(ids):,} ids are no {kind} in {source}: "
            f"{few(unknown)}{hint}"
        )
    return [found[image_key(name)] for name in ids]


def check_members(
    split: str, chosen: list[Image], splits: dict[str, list[Image]], kind: str, order: Path
) -> None:
    """Of a split of Karpathy's: no image of another split; which ones are left out is printed.

    Raises:
        InputError: if an image belongs to another split: trained on, it must not be tested on.
    """
    if split not in splits:
        return
    members = splits["testall"] if split == "test" and "testall" in splits else splits[split]
    known = {id(image) for image in members}
    strangers = [i for i in chosen if id(i) not in known]
    if strangers:
        names = few(f"{i.names[kind]} ({i.split})" for i in strangers)
        raise InputError(
            f"{order}: {len(strangers):,} of its images are not in Karpathy's {split}: {names}; "
            f"a --split of another name takes them"
        )
    taken = {id(image) for image in chosen}
    left = [i.names[kind] for i in splits[split] if id(i) not in taken]
    if left:
        print(f"{order}: without {len(left):,} images of Karpathy's {split}: {few(left)}")


def writable(text: str) -> bool:
    """Whether a text can stand in a UTF-8 file (half a surrogate pair cannot), and has no NUL."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def first_captions(images: list[Image], ids: list[str], n: int) -> list[str]:
    """The first n captions of every image, end to end; empty ones do not count.

    Raises:
        InputError: if an image has fewer, or one that cannot be written.
    """
    captions: list[str] = []
    short = []
    for image, name in zip(images, ids, strict=True):
        own = [caption for caption in image.captions if caption][:n]
        if not all(map(writable, own)):
            raise InputError(f"image {name}: a caption with NUL or half a character (a surrogate)")
        if len(own) < n:
            short.append(f"{name} ({len(own)})")
        captions += own
    if short:
        raise InputError(
            f"{len(short):,} of {len(images):,} images have fewer than {n} captions: {few(short)}; "
            f"a smaller --captions_per_image takes them"
        )
    return captions


def check_regions(ims: Path, n_images: int, n_captions: int) -> None:
    """
    Raises:
        InputError: if the split's regions are there and are not of so many images.
    """
    if not ims.is_file():
        return
    regions = RegionFile(ims)
    if regions.num_rows == n_images:
        return
    if regions.num_rows == REPEATED * n_images == n_captions and regions.repeats():
        return
    raise InputError(
        f"{ims}: {regions.num_rows:,} rows, but {n_images:,} images with {n_captions:,} captions "
        f"were to be written; nothing was. --order FILE takes the images of the features' _ids.txt"
    )


# -- the command line -----------------------------------------------------------------------------


def choose(opt: argparse.Namespace, images: list[Image], source: str) -> dict[str, tuple]:
    """What to write: {split: (ids, images)}."""
    everywhere = all("cocoid" in image.names for image in images)
    kind = opt.ids or ("cocoid" if everywhere else "filename")
    if opt.order:
        ids = read_id_list(opt.order)
        chosen = in_order(images, ids, kind, opt.order, source)
        if not opt.coco:
            splits = splits_of(images, opt.restval)
            check_members(opt.split, chosen, splits, kind, opt.order)
        return {opt.split: (ids, chosen)}
    splits = splits_of(images, opt.restval)
    by_name(images, kind, source)
    if opt.split:
        if opt.split not in splits:
            raise InputError(
                f"--split {opt.split}: {source} has {', '.join(splits)}; another name needs --order"
            )
        splits = {opt.split: splits[opt.split]}
    return {
        split: ([image.names[kind] for image in members], members)
        for split, members in splits.items()
    }


def run(opt: argparse.Namespace) -> None:
    if bool(opt.coco) == bool(opt.karpathy):
        raise InputError("expected one of Karpathy's dataset_*.json, or --coco captions_*.json")
    if opt.coco and not opt.order:
        raise InputError(
            "--coco: COCO's files know no dev and test; name the images with --order FILE"
        )
    if opt.order and not opt.split:
        raise InputError(f"--order {opt.order}: of which split? add --split NAME")
    if opt.coco and opt.tokens:
        raise InputError("--tokens: COCO's files have none, only Karpathy's")
    images = read_coco(opt.coco) if opt.coco else read_karpathy(opt.karpathy, opt.tokens)
    source = ", ".join(str(path) for path in opt.coco or [opt.karpathy])
    folder = Path(opt.data_path) / opt.data_name
    table = [("split", "images", "captions", "file")]
    with new_files() as create:
        for split, (ids, chosen) in choose(opt, images, source).items():
            ims, caps, names = (folder / f"{split}_{f}" for f in ("ims.npy", "caps.txt", "ids.txt"))
            captions = first_captions(chosen, ids, opt.captions_per_image)
            check_regions(ims, len(ids), len(captions))
            written = {caps: captions}
            if ids_to_write(names, ids, ims, "--order", opt.overwrite):
                written[names] = ids
            refuse_existing([caps], opt.overwrite)
            for target, lines in written.items():
                create(target).write("".join(f"{line}\n" for line in lines).encode("utf-8"))
                n_captions = f"{len(captions):,}" if target == caps else ""
                table.append((split, f"{len(ids):,}", n_captions, str(target)))
    print_table(table)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("karpathy", nargs="?", default=None, type=Path, help="a dataset_*.json of Karpathy's")
    add("--coco", nargs="+", default=None, type=Path, help="or captions_*.json of COCO's own")
    add("--data_path", default="./data", help="folder of the data sets")
    add("--data_name", required=True, help="the data set's folder in data_path")
    add("--split", default=None, type=split_name, help="the split to write; None = all")
    add("--order", default=None, type=Path, help="file of the images wanted, in that order")
    add("--ids", default=None, choices=KINDS, help="None = cocoid for COCO, filename for others")
    add("--restval", default=True, action=argparse.BooleanOptionalAction, help="it joins train")
    add("--tokens", default=False, action="store_true", help="Karpathy's tokens, not the raw text")
    add("--captions_per_image", default=5, type=at_least(1), help="the first so many are taken")
    add("--overwrite", default=False, action="store_true", help="replace what is there")
    return parser


@one_line
def main() -> None:
    run(options().parse_args())


if __name__ == "__main__":
    main()
