"""Precomputed regions and captions in SCAN's layout.

    DATA_PATH/DATA_NAME/{split}_ims.npy    float32 or float16 (n, R, img_dim), one row an image, or
                                           each row five times over (older files)
    DATA_PATH/DATA_NAME/{split}_caps.txt   one caption a line, those of an image consecutive
    DATA_PATH/DATA_NAME/{split}_ids.txt    one image id a line (optional)
    DATA_PATH/DATA_NAME/{split}_boxes.npy  where the regions lie (optional, for pictures only)

Regions are read row by row from a memory map; captions are tokenised once.

Shape letters: B images (one an example of a batch), C captions (C = B in a batch), R regions,
L longest caption.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import distributed
from utils import InputError
from vocab import Vocabulary, read_captions

REPEATED = 5  # how often older files repeat each image


class Batch(NamedTuple):
    """Captions and their images, longest caption first."""

    images: Tensor  # (B, R, img_dim) float32
    captions: Tensor  # (C, L) word ids, padded with 0
    lengths: Tensor  # (C,) words of each caption, with <start> and <end>
    image_index: Tensor  # (B,) which image of the split
    caption_index: Tensor  # (C,) which caption of the split

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


def open_array(path: Path) -> np.memmap:
    """A .npy file, memory-mapped and never unpickled.

    Raises:
        FileNotFoundError: if it is missing.
        InputError: if it holds anything but one array.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever numpy's parser says of bytes that are no array
        raise InputError(f"{path}: not a readable .npy array: {error}") from error
    if not isinstance(array, np.memmap):
        raise InputError(f"{path}: not a single .npy array (an archive?)")
    return array


class RegionFile:
    """A `{split}_ims.npy`, one row an image.

    The file is mapped anew for every read, so memory does not grow with what was read, and a copy
    in a worker process needs no open file.

    Raises:
        InputError: if it is no float array of rank 3, or its width or number of regions is not
            what was asked for.
    """

    def __init__(
        self, path: Path, img_dim: int | None = None, num_regions: int | None = None
    ) -> None:
        self.path = path
        rows = open_array(path)
        if rows.ndim != 3 or min(rows.shape) < 1:
            raise InputError(
                f"{path}: expected regions as (images, regions, img_dim), found {rows.shape}"
            )
        if rows.dtype not in (np.float32, np.float16):
            raise InputError(f"{path}: expected float32 or float16, found {rows.dtype}")
        self.num_rows, self.num_regions, self.img_dim = rows.shape
        order = "C" if rows.flags.c_contiguous else "F"
        self._layout = (rows.dtype, "r", rows.offset, rows.shape, order)
        for name, asked in (("num_regions", num_regions), ("img_dim", img_dim)):
            if asked is not None and asked != getattr(self, name):
                raise InputError(
                    f"{path}: {name} is {getattr(self, name)} in the file {rows.shape}, "
                    f"but {asked} was asked for (--{name}, or the checkpoint)"
                )

    def __getitem__(self, rows: int | slice) -> np.ndarray:
        """Rows as float32 (…, R, img_dim), checked to be finite."""
        regions = np.array(np.memmap(self.path, *self._layout)[rows], dtype=np.float32)
        if not np.isfinite(regions).all():
            first = rows.start if isinstance(rows, slice) else rows
            raise InputError(f"{self.path}: NaN or infinite features in row {first} or soon after")
        return regions

    def repeats(self) -> bool:
        """Whether each image stands five times over (looked at in three places)."""
        if self.num_rows % REPEATED:
            return False
        groups = self.num_rows // REPEATED
        return all(
            np.array_equal(self[REPEATED * g], self[REPEATED * g + k])
            for g in {0, groups // 2, groups - 1}
            for k in range(1, REPEATED)
        )


class Captions:
    """Captions as word ids, in one array: worker processes share it instead of copying lists.

    Raises:
        InputError: for a caption that is too long, with its line in `source`.
    """

    def __init__(
        self, texts: list[str], vocab: Vocabulary, source: str | Path = "captions"
    ) -> None:
        self.texts = texts
        encoded = []
        for line, text in enumerate(texts, start=1):
            try:
                encoded.append(vocab.encode(text))
            except InputError as error:
                raise InputError(f"{source}, line {line}: {error}") from None
        self.lengths = torch.tensor([len(words) for words in encoded])
        self._words = torch.tensor([word for words in encoded for word in words])
        self._ends = self.lengths.cumsum(0)

    def __len__(self) -> int:
        return len(self.texts)

    def words(self, index: int) -> Tensor:
        """Caption `index`: (length,) word ids with <start> and <end>."""
        end = self._ends[index]
        return self._words[end - self.lengths[index] : end]

    def caption_blocks(self, order: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The captions `order` names: padded (≤ size, longest of the block), lengths, indices."""
        for block in order.split(size):
            yield *pad([self.words(int(i)) for i in block]), block


class PrecompDataset(Captions, Dataset):
    """One split: an example is a caption with its image.

    Images and captions can also be gone through apart (`image_blocks`, `caption_blocks`), so
    that an evaluation encodes each image once.

    Args:
        max_captions: keep only the first so many captions (the official code cuts dev at 5,000).
        img_dim, num_regions: refuse a file of other sizes; None takes what the file holds.

    Raises:
        InputError: for missing files, files of a wrong kind, or counts that do not fit.
    """

    def __init__(
        self,
        data_path: str | Path,
        data_name: str,
        split: str,
        vocab: Vocabulary,
        img_dim: int | None = None,
        num_regions: int | None = None,
        max_captions: int | None = None,
    ) -> None:
        self.name, self.split = data_name, split
        ims, caps, ids = find_files(data_path, data_name, split)
        self.regions = RegionFile(ims, img_dim, num_regions)
        texts = read_captions(caps)
        self.row_step = self._row_step(len(texts), caps)
        self.n_images = self.regions.num_rows // self.row_step
        self.captions_per_image = len(texts) // self.n_images
        if max_captions:
            texts = texts[:max_captions]
            self.n_images = min(self.n_images, -(-len(texts) // self.captions_per_image))
        super().__init__(texts, vocab, caps)
        self.image_ids = read_ids(ids, self.regions.num_rows // self.row_step)[: self.n_images]

    def _row_step(self, n_captions: int, caps: Path) -> int:
        rows = self.regions.num_rows
        if n_captions == rows:
            return REPEATED if self.regions.repeats() else 1
        if n_captions == 0 or n_captions % rows:
            raise InputError(
                f"{caps}: {n_captions} captions do not fit the {rows} images of "
                f"{self.regions.path.name}: expected {REPEATED * rows}, or another multiple"
            )
        return 1

    @property
    def image_of_caption(self) -> np.ndarray:
        """(n_captions,) the image each caption belongs to."""
        return np.arange(len(self)) // self.captions_per_image

    def image(self, index: int) -> Tensor:
        """Image `index` of the split: (R, img_dim) float32."""
        return torch.from_numpy(self.regions[index * self.row_step])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int, int]:
        image = index // self.captions_per_image
        return self.image(image), self.words(index), image, index

    def image_blocks(self, size: int, images: slice | None = None) -> Iterator[Tensor]:
        """All images or some, each once, in order: (≤ size, R, img_dim) at a time."""
        images = images or slice(0, self.n_images)
        for start in range(images.start, images.stop, size):
            stop = min(start + size, images.stop)
            rows = slice(start * self.row_step, stop * self.row_step, self.row_step)
            yield torch.from_numpy(self.regions[rows])


def find_files(data_path: str | Path, data_name: str, split: str) -> tuple[Path, Path, Path]:
    """The paths of a split's regions, captions and (optional) ids.

    Raises:
        InputError: naming the folder, what it lacks, and how to get it.
    """
    folder = Path(data_path) / data_name
    ims, caps, ids = (folder / f"{split}_{kind}" for kind in ("ims.npy", "caps.txt", "ids.txt"))
    if caps.is_file() and not ims.is_file():
        raise InputError(
            f"{ims}: not found, though {caps.name} is there. Make the regions with "
            "scripts/convert_bottom_up.py (from bottom-up attention's TSV) or "
            "scripts/extract_features.py (from pictures), or fetch them with "
            "scripts/download_data.py"
        )
    if not ims.is_file() or not caps.is_file():
        splits = sorted(file.name.removesuffix("_ims.npy") for file in folder.glob("*_ims.npy"))
        raise InputError(
            f"{folder}: {split}_ims.npy and {split}_caps.txt not found (splits there: "
            f"{', '.join(splits) or 'none'}). Fetch SCAN's features (README, 'Data') and name "
            "their folder with --data_path, or make the small embedded data set: "
            "python scripts/make_scenes.py, then --data_name scenes_precomp"
        )
    return ims, caps, ids


def read_ids(path: Path, n_images: int) -> list[str]:
    """The image ids of a split, one an image: `{split}_ids.txt`, or numbers where it is missing.

    Files that say each id once for every caption are taken as well.

    Raises:
        InputError: if the number of ids does not fit.
    """
    if not path.is_file():
        return [str(image) for image in range(n_images)]
    ids = path.read_text(encoding="utf-8", errors="replace").split("\n")
    ids = [line.strip() for line in (ids[:-1] if ids[-1] == "" else ids)]
    if not ids or len(ids) % n_images:
        raise InputError(f"{path}: {len(ids)} ids do not fit {n_images} images")
    return ids[:: len(ids) // n_images]


def read_boxes(path: Path, n_images: int, num_regions: int) -> np.ndarray | None:
    """The boxes of the regions, `{split}_boxes.npy`, memory-mapped: (n_images, R, 4), or None.

    x1 y1 x2 y2, as shares of the picture (all ≤ 1) or in its pixels.

    Raises:
        InputError: if there is a file, and it is no such array.
    """
    if not path.is_file():
        return None
    boxes = open_array(path)
    if boxes.shape != (n_images, num_regions, 4) or boxes.dtype.kind != "f":
        raise InputError(
            f"{path}: expected float boxes ({n_images}, {num_regions}, 4), found {boxes.shape} "
            f"{boxes.dtype}"
        )
    return boxes


def pad(captions: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Captions of any lengths -> padded (C, L) and lengths (C,)."""
    lengths = torch.tensor([len(words) for words in captions])
    return torch.nn.utils.rnn.pad_sequence(captions, batch_first=True), lengths


def collate(examples: list[tuple[Tensor, Tensor, int, int]]) -> Batch:
    """Examples of a PrecompDataset -> Batch."""
    examples = sorted(examples, key=lambda example: len(example[1]), reverse=True)
    images, words, image_index, caption_index = zip(*examples, strict=True)
    indices = torch.tensor(image_index), torch.tensor(caption_index)
    return Batch(torch.stack(images), *pad(list(words)), *indices)


class ShuffledBatches:
    """A batch sampler whose order depends on (seed, epoch) alone: call `set_epoch` each epoch.

    `set_epoch(epoch, start)` leaves out the first `start` batches of an epoch.

    A last batch of one example is left out: it has no negative, and no batch statistics. Each of
    several processes gets its share of a batch, longest captions first as `collate` has them; a
    last batch with fewer examples than processes is left out.

    lengths: words of each example's caption.
    """

    def __init__(self, lengths: Tensor, batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        whole, rest = divmod(len(self.lengths), self.batch_size)
        return whole + (rest >= max(2, distributed.world_size()))

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        for batch in order.split(self.batch_size)[self.start : len(self)]:
            batch = batch[self.lengths[batch].argsort(descending=True, stable=True)]
            yield batch[distributed.rank_slice(len(batch))].tolist()


def train_loader(
    dataset: PrecompDataset, batch_size: int, workers: int, seed: int, pin_memory: bool = False
) -> DataLoader:
    """Shuffled batches for training; `loader.batch_sampler.set_epoch(e)` before each epoch.

    The order comes from the sampler's seed; no random number of torch's own is used up.
    """
    return DataLoader(
        dataset,
        batch_sampler=ShuffledBatches(dataset.lengths, batch_size, seed),
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        generator=torch.Generator(),
        worker_init_fn=_leave_signals_to_main,
    )


def _leave_signals_to_main(worker: int) -> None:
    """Ctrl-C reaches every process; the main process ends the run, and its workers with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
