"""Fetch SCAN's precomputed regions, captions and vocabularies, check them, put them in place.

    python scripts/download_data.py --data_name f30k_precomp       # 9.2 GB (coco_precomp: 36.7 GB)
    python scripts/download_data.py --data_name coco_precomp --splits test testall   # 1.8 GB
    python scripts/download_data.py --gdrive URL                   # a shared Google Drive folder
    python scripts/download_data.py --archive data.zip vocab.zip   # fetched by other means
    python scripts/download_data.py --check                        # only look: exit 0 or 1

writes DATA_PATH/DATA_NAME/{split}_caps.txt, {split}_ids.txt (if the source has it), {split}_ims.npy
and VOCAB_PATH/DATA_NAME_vocab.json. Existing files are never overwritten. The default source,
Kaggle, needs `pip install kagglehub`, and --gdrive needs `pip install gdown`. Both continue a
partial file when run again. Downloads go to DATA_PATH/DATA_NAME.part, or to KAGGLEHUB_CACHE.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import RegionFile, read_ids
from utils import InputError, atomic_write, one_line
from vocab import Vocabulary, read_captions, vocab_file

KAGGLE = "kuanghueilee/scan-features"
BY_HAND = f"or download kaggle.com/datasets/{KAGGLE} with a browser and pass it: --archive FILE"
IMAGES = {  # how many images a split may have; in some copies COCO's test is all of testall
    "f30k_precomp": {"train": [29_000], "dev": [1014], "test": [1000]},
    "coco_precomp": {"train": [113_287], "dev": [5000], "test": [1000, 5000], "testall": [5000]},
}
REGIONS = (36, 2048)  # regions per image, feature size
CAPTIONS = 5  # captions per image


def check_split(counts: list[int], caps: Path, ids: Path, ims: Path) -> str:
    """Describe the files of a split. Raises InputError if one is damaged or has a wrong size."""
    captions, regions = len(read_captions(caps)), RegionFile(ims)
    shape = (regions.num_rows, regions.num_regions, regions.img_dim)
    images = captions // CAPTIONS
    rows = captions if regions.repeats() else images
    if shape != (rows, *REGIONS) or images not in counts or captions % CAPTIONS:
        expected = " or ".join(f"{(n, *REGIONS)} and {CAPTIONS * n:,} captions" for n in counts)
        raise InputError(f"{ims}: expected {expected}, found {shape} and {captions:,} in {caps}")
    read_ids(ids, images)
    return f"{images:,} images {shape}, {captions:,} captions"


def state_of(data_name: str, part: str, paths: list[Path]) -> tuple[str, str]:
    """A split or the vocabulary is ("there", content), ("missing", names) or ("wrong", why)."""
    if missing := [p.name for p in paths if not p.is_file() and "_ids." not in p.name]:
        return "missing", ", ".join(missing)
    try:
        if part == "vocab":
            return "there", f"{len(Vocabulary.load(*paths)):,} words"
        return "there", check_split(IMAGES[data_name][part], *paths)
    except InputError as error:
        return "wrong", str(error)


def match(names: list[str], wanted: list[Path]) -> dict[Path, str]:
    """{wanted file: its path in a source}, in a folder of the same name or none; a vocab in any."""
    found = {}
    for path in wanted:
        for name in names:
            there = PurePath(name)
            in_folder = there.parent.name in ("", path.parent.name) or path.suffix == ".json"
            if there.name == path.name and in_folder:
                found[path] = name
    return found


@contextmanager
def errors_of(library: str) -> Iterator[None]:
    """Report any error of a download library in one line (kagglehub's share no base class)."""
    try:
        yield
    except ImportError as error:
        raise InputError(f"{error}: pip install {library}, {BY_HAND}") from error
    except Exception as error:
        raise InputError(f"{library}: {error}; run this again to continue, {BY_HAND}") from error


@errors_of("kagglehub")
def from_kaggle(wanted: list[Path]) -> dict[Path, Path]:
    """Fetch the wanted files that Kaggle has."""
    import kagglehub
    from kagglesdk import KaggleClient  # comes with kagglehub, which cannot list files
    from kagglesdk.datasets.types.dataset_api_service import ApiListDatasetFilesRequest

    request, names, more = ApiListDatasetFilesRequest(), [], True
    request.owner_slug, request.dataset_slug = KAGGLE.split("/")
    with KaggleClient() as client:
        while more:
            page = client.datasets.dataset_api_client.list_dataset_files(request)
            names += [file.name for file in page.dataset_files]
            request.page_token = more = page.next_page_token
    found = match(names, wanted)
    return {path: Path(kagglehub.dataset_download(KAGGLE, name)) for path, name in found.items()}


@errors_of("gdown")
def from_gdrive(url: str, wanted: list[Path], folder: Path) -> dict[Path, Path]:
    """The same from a shared Google Drive folder, into `folder`."""
    import gdown

    listed = gdown.download_folder(url, skip_download=True, quiet=True, timeout=60)
    ids, fetched = {file.path: file.id for file in listed}, {}
    for path, name in match(list(ids), wanted).items():
        output = f"{folder / ids[name]}/"  # gdown makes this folder and names the file
        file = gdown.download(id=ids[name], output=output, resume=True, retries=5, timeout=60)
        fetched[path] = Path(file)
    return fetched


def from_archive(archive: Path, wanted: list[Path], folder: Path) -> dict[Path, Path]:
    """The same from a .zip or .tar. Raises InputError if it is damaged."""
    is_zip, fetched = zipfile.is_zipfile(archive), {}
    try:
        with zipfile.ZipFile(archive) if is_zip else tarfile.open(archive) as packed:
            names = packed.namelist() if is_zip else [m.name for m in packed if m.isfile()]
            for path, name in match(names, wanted).items():
                print(f"unpacking {name}", file=sys.stderr)
                fetched[path] = folder / path.name
                packed_file = packed.open(name) if is_zip else packed.extractfile(name)
                with packed_file, fetched[path].open("wb") as file:
                    shutil.copyfileobj(packed_file, file)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, RuntimeError) as error:
        raise InputError(f"{archive}: not a whole .zip or .tar: {error}") from error
    return fetched


def fetch(opt: argparse.Namespace, wanted: list[Path], folder: Path) -> dict[Path, Path]:
    """Fetch the wanted files that the chosen source has: {wanted file: where it is now}."""
    folder.mkdir(parents=True, exist_ok=True)
    if opt.gdrive:
        return from_gdrive(opt.gdrive, wanted, folder)
    if not opt.archive:
        os.environ.setdefault("KAGGLEHUB_CACHE", str(folder.absolute()))
        return from_kaggle(wanted)
    unpacked = [from_archive(archive, wanted, folder) for archive in opt.archive]
    return {path: file for files in unpacked for path, file in files.items()}


def place(fetched: Path, target: Path) -> None:
    """Hard-link a file to its place, which copies nothing; on another disk, copy it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(fetched.resolve(), target)
    except OSError:  # another disk, or one without hard links
        with fetched.open("rb") as file:
            atomic_write(target, lambda copy: shutil.copyfileobj(file, copy))


def run(opt: argparse.Namespace) -> None:
    known, folder = IMAGES[opt.data_name], opt.data_path / opt.data_name
    parts = {"vocab": [vocab_file(opt.vocab_path, opt.data_name)]}
    for split in opt.splits or known:
        if split not in known:
            raise InputError(f"--splits {split}: {opt.data_name} has {', '.join(known)}")
        parts[split] = [folder / f"{split}_{kind}" for kind in ("caps.txt", "ids.txt", "ims.npy")]
    states = {part: state_of(opt.data_name, part, paths) for part, paths in parts.items()}
    for part, (state, text) in states.items():
        print(f"{part:8} {state:8} {text}", flush=True)
    if opt.check:
        sys.exit(any(state != "there" for state, _ in states.values()))
    if wrong := [text for state, text in states.values() if state == "wrong"]:
        raise InputError(f"{wrong[0]}; delete the wrong file and run this again")
    parts = {part: paths for part, paths in parts.items() if states[part][0] == "missing"}
    if not parts:
        return
    part_folder = folder.with_name(f"{folder.name}.part")
    wanted = [path for paths in parts.values() for path in paths if not path.is_file()]
    fetched, problems = fetch(opt, wanted, part_folder), []
    for part, paths in parts.items():
        state, text = state_of(opt.data_name, part, [fetched.get(path, path) for path in paths])
        if state != "there":
            problems.append(f"{part} {state}: {text}")
            continue
        for path in {*paths} & {*fetched}:
            place(fetched[path], path)
        print(f"{part:8} fetched  {text}", flush=True)
    if problems:
        raise InputError(f"{'; '.join(problems)} (in this source; delete a file that is wrong)")
    shutil.rmtree(part_folder)


@one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data_name", default="f30k_precomp", choices=IMAGES, help="default: %(default)s")
    add("--data_path", default="./data", type=Path, help="folder of the data sets")
    add("--vocab_path", default="./vocab", type=Path, help="folder of the vocabularies")
    add("--splits", nargs="+", help="train, dev, test, testall; default: all of the data set")
    add("--check", action="store_true", help="only check; exit 1 if a file is missing or wrong")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--gdrive", metavar="URL", help="a shared Google Drive folder")
    source.add_argument("--archive", nargs="+", type=Path, metavar="FILE", help=".zip or .tar")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
