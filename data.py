"""Precomputed regions and captions in SCAN's layout.

    DATA_PATH/DATA_NAME/{split}_ims.npy    float32 or float16 (n, R, img_dim), one row per image, or
                                           each row repeated five times (older files)
    DATA_PATH/DATA_NAME/{split}_caps.txt   one caption per line, those of an image consecutive
    DATA_PATH/DATA_NAME/{split}_ids.txt    one image id per line (optional)
    DATA_PATH/DATA_NAME/{split}_boxes.npy  boxes of the regions (optional, for figures only)

Shape letters: B images (one per example of a batch), C captions (C = B in a batch), R regions,
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
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


def open_array(path: Path) -> np.memmap:
    """A .npy file, memory-mapped and never unpickled. Raises InputError if it is damaged."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:  # numpy raises errors of many types on damaged files
        raise InputError(f"{path}: not a readable .npy array: {error}") from error


class RegionFile:
    """The regions in a `{split}_ims.npy`, by row.

    The file is mapped again for every read, so memory does not grow with the rows read, and a copy
    in a worker process needs no open file. Raises InputError for a wrong dtype, rank or size.
    """

    def __init__(
        self, path: Path, img_dim: int | None = None, num_regions: int | None = None
    ) -> None:
        self.path = path
        rows = open_array(path)
        if rows.ndim != 3 or not rows.size or rows.dtype not in (np.float32, np.float16):
            found = f"found {rows.dtype} {rows.shape}"
            raise InputError(f"{path}: expected float32 or float16 (images, R, img_dim), {found}")
        self.num_rows, self.num_regions, self.img_dim = rows.shape
        order = "C" if rows.flags.c_contiguous else "F"
        self._layout = (rows.dtype, "r", rows.offset, rows.shape, order)
        for name, asked in (("num_regions", num_regions), ("img_dim", img_dim)):
            found = getattr(self, name)
            if asked not in (None, found):
                raise InputError(f"{path}: {name} is {found}; the model or --{name} has {asked}")

    def __getitem__(self, rows: int | slice) -> np.ndarray:
        """Rows as float32 (…, R, img_dim), checked to be finite."""
        regions = np.array(np.memmap(self.path, *self._layout)[rows], dtype=np.float32)
        if not np.isfinite(regions).all():
            first = rows.start if isinstance(rows, slice) else rows
            raise InputError(f"{self.path}: NaN or infinite features in row {first} or soon after")
        return regions

    def repeats(self) -> bool:
        """Whether each row is repeated five times (checked in three places)."""
        n_images, rest = divmod(self.num_rows, REPEATED)
        starts = {REPEATED * image for image in (0, n_images // 2, n_images - 1)}
        return not rest and all((self[k : k + REPEATED] == self[k]).all() for k in starts)


class Captions:
    """Captions as word ids, in one array: worker processes share it instead of copying lists.

    Raises InputError for a caption that is too long, naming its line in `source`.
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
        """The captions in `order`, in blocks: padded captions (≤ size, L), lengths, indices."""
        for block in order.split(size):
            yield *pad([self.words(int(i)) for i in block]), block


class PrecompDataset(Captions, Dataset):
    """One split: an example is a caption with its image.

    Evaluation reads images and captions separately (`image_blocks`, `caption_blocks`).
    Raises InputError for missing or invalid files, or counts that do not match.

    img_dim, num_regions: the sizes that the file must have; None accepts any.
    max_captions: keep only this many captions, the first (the official code cuts dev at 5,000).
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
        texts, rows = read_captions(caps), self.regions.num_rows
        if len(texts) % rows:
            raise InputError(f"{caps}: {len(texts)} captions do not fit the {rows} images of {ims}")
        self.row_step = REPEATED if len(texts) == rows and self.regions.repeats() else 1
        n_images = rows // self.row_step
        self.captions_per_image = len(texts) // n_images
        super().__init__(texts[: max_captions or None], vocab, caps)
        self.n_images = int(self.image_of_caption[-1]) + 1
        self.image_ids = read_ids(ids, n_images)[: self.n_images]

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
        """All images or those of a slice, each once, in order, in blocks (≤ size, R, img_dim)."""
        images = images or slice(0, self.n_images)
        for start in range(images.start, images.stop, size):
            stop = min(start + size, images.stop)
            rows = slice(start * self.row_step, stop * self.row_step, self.row_step)
            yield torch.from_numpy(self.regions[rows])


def find_files(data_path: str | Path, data_name: str, split: str) -> tuple[Path, Path, Path]:
    """A split's files: regions, captions, (optional) ids. Raises InputError if one is missing."""
    folder = Path(data_path) / data_name
    ims, caps, ids = (folder / f"{split}_{kind}" for kind in ("ims.npy", "caps.txt", "ids.txt"))
    if missing := [file.name for file in (ims, caps) if not file.is_file()]:
        splits = sorted(file.name.removesuffix("_ims.npy") for file in folder.glob("*_ims.npy"))
        raise InputError(
            f"{folder}: {' and '.join(missing)} not found (splits: {', '.join(splits) or 'none'}). "
            "Is --data_path right? Of scripts/, download_data.py fetches SCAN's data, "
            "extract_features.py and convert_bottom_up.py make regions, make_scenes.py small data"
        )
    return ims, caps, ids


def read_ids(path: Path, n_images: int) -> list[str]:
    """The image ids of a split, one per image: `{split}_ids.txt`, or numbers if it is missing.

    The file may repeat an id for each caption. Raises InputError if the number of ids is wrong.
    """
    if not path.is_file():
        return [str(image) for image in range(n_images)]
    ids = path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")
    if len(ids) % n_images:
        raise InputError(f"{path}: {len(ids)} ids do not fit {n_images} images")
    return [line.strip() for line in ids[:: len(ids) // n_images]]


def read_boxes(path: Path, n_images: int, num_regions: int) -> np.ndarray | None:
    """The region boxes of `{split}_boxes.npy`, memory-mapped (n_images, R, 4); None without it.

    x1 y1 x2 y2, in pixels or as fractions (all ≤ 1). Raises InputError for a wrong shape or type.
    """
    if not path.is_file():
        return None
    boxes = open_array(path)
    shape = (n_images, num_regions, 4)
    if boxes.shape != shape or boxes.dtype.kind != "f":
        raise InputError(f"{path}: expected float boxes {shape}, found {boxes.dtype} {boxes.shape}")
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


def size_augmentation(batch: Batch, p: float) -> Batch:
    """Zero each region and drop each word with probability p (VSE∞); <start> and <end> stay."""
    images, captions, lengths, *indices = batch
    regions = torch.rand(images.shape[:2], device=images.device) >= p  # (B, R)
    place = torch.arange(captions.shape[1], device=captions.device)  # (L,)
    end = lengths.unsqueeze(1) - 1
    words = (torch.rand(captions.shape, device=captions.device) >= p) & (place < end)
    words |= (place == 0) | (place == end)  # (C, L)
    order = words.argsort(dim=1, descending=True, stable=True)  # kept words first, in order
    captions, lengths = (captions * words).gather(1, order), words.sum(1)
    return Batch(images * regions.unsqueeze(2), captions[:, : lengths.max()], lengths, *indices)


class ShuffledBatches:
    """A batch sampler whose order depends only on seed and epoch: call `set_epoch` each epoch.

    A last batch of one example is left out: it has no negative and no batch statistics. With
    several processes each gets its share of a batch, longest captions first as in `collate`. A
    last batch with fewer examples than processes is left out too.

    lengths: (C,) words of each example's caption.
    """

    def __init__(self, lengths: Tensor, batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, and skip its first `start` batches."""
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
    """Shuffled batches for training; `loader.batch_sampler.set_epoch(e)` before each epoch."""
    return DataLoader(
        dataset,
        batch_sampler=ShuffledBatches(dataset.lengths, batch_size, seed),
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # so that torch's default generator is not used
        worker_init_fn=_leave_signals_to_main,
    )


def _leave_signals_to_main(worker: int) -> None:
    """Ctrl-C reaches every process; the main process ends the run and its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
