"""SCAN's layout: what loads, what is refused, and that memory does not grow with the file."""

import pickle
import zipfile

import numpy as np
import pytest
import torch
from conftest import write_split

from data import PrecompDataset, RegionFile, ShuffledBatches, collate, train_loader
from errors import InputError
from vocab import Vocabulary, build_from_data, vocab_file


@pytest.fixture
def vocab(tiny):
    return Vocabulary.load(vocab_file(tiny / "vocab", "tiny"))


def load(folder, vocab, split="dev", **others):
    return PrecompDataset(folder / "data", "tiny", split, vocab, **others)


def test_an_example_is_a_caption_with_its_image(tiny, vocab):
    dataset = load(tiny, vocab)
    array = np.load(tiny / "data/tiny/dev_ims.npy")
    assert (len(dataset), dataset.n_images, dataset.captions_per_image) == (50, 10, 5)
    image, words, image_index, caption_index = dataset[37]
    np.testing.assert_array_equal(image, array[7])
    assert words.tolist() == vocab.encode(dataset.texts[37])
    assert (image_index, caption_index) == (7, 37)
    np.testing.assert_array_equal(dataset.image_of_caption, np.repeat(np.arange(10), 5))
    assert dataset.image_ids[7] == "dev7"


def test_images_and_captions_apart_are_the_same(tiny, vocab):
    dataset = load(tiny, vocab)
    images = torch.cat(list(dataset.image_blocks(3)))
    assert torch.equal(images, torch.stack([dataset.image(i) for i in range(10)]))
    seen = 0
    for captions, lengths, _ in dataset.caption_blocks(torch.arange(len(dataset)), 7):
        assert captions.shape[1] == lengths.max()  # each block padded to its own longest
        for row, n in zip(captions, lengths, strict=True):
            assert torch.equal(row[:n], dataset.words(seen)) and not row[n:].any()
            seen += 1
    assert seen == 50


def test_images_repeated_five_times_load_as_once(tiny, vocab):
    once = load(tiny, vocab)
    images, example = torch.cat(list(once.image_blocks(4))), once[33]
    write_split(tiny / "data" / "tiny", "dev", 10, repeat=5)
    (tiny / "data/tiny/dev_ids.txt").write_text("".join(f"dev{i // 5}\n" for i in range(50)))
    again = load(tiny, vocab)
    assert (again.n_images, len(again)) == (10, 50)
    assert torch.equal(torch.cat(list(again.image_blocks(4))), images)
    assert torch.equal(again[33][0], example[0]) and again[33][2:] == example[2:]
    assert once.image_ids == again.image_ids


@pytest.mark.parametrize(("n_captions", "per_image"), [(10, 1), (20, 2), (30, 3)])
def test_any_number_of_captions_that_divides(tiny, vocab, n_captions, per_image):
    (tiny / "data/tiny/dev_caps.txt").write_text("a red dog\n" * n_captions)
    dataset = load(tiny, vocab)
    assert (dataset.n_images, dataset.captions_per_image) == (10, per_image)


def test_half_precision_files(tiny, vocab):
    write_split(tiny / "data" / "tiny", "dev", 10, dtype=np.float16)
    image = load(tiny, vocab)[0][0]
    assert image.dtype == torch.float32
    np.testing.assert_array_equal(image, np.load(tiny / "data/tiny/dev_ims.npy")[0])


def test_ids_are_optional(tiny, vocab):
    (tiny / "data/tiny/dev_ids.txt").unlink()
    assert load(tiny, vocab).image_ids == [str(i) for i in range(10)]


def test_first_captions_only(tiny, vocab):
    dataset = load(tiny, vocab, max_captions=23)
    assert (len(dataset), dataset.n_images) == (23, 5)
    assert len(list(dataset.image_blocks(1))) == 5


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch(tiny, vocab, workers):
    dataset = load(tiny, vocab, "train")
    loader = train_loader(dataset, 16, workers, seed=3)
    seen = []
    for batch in loader:
        assert batch.lengths.tolist() == sorted(batch.lengths.tolist(), reverse=True)
        assert batch.images.dtype == torch.float32
        for k, caption in enumerate(batch.caption_index.tolist()):
            image, words, image_index, _ = dataset[caption]
            assert torch.equal(batch.images[k], image) and batch.image_index[k] == image_index
            assert torch.equal(batch.captions[k, : batch.lengths[k]], words)
        seen += batch.caption_index.tolist()
    assert sorted(seen) == list(range(150))


def test_the_order_depends_on_seed_and_epoch_alone():
    batches = ShuffledBatches(torch.ones(100), 32, seed=5)
    first = list(batches)
    assert list(batches) == first
    batches.set_epoch(1)
    assert list(batches) != first
    assert list(ShuffledBatches(torch.ones(100), 32, seed=6)) != first


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 34, 64, 65])
def test_no_batch_of_one(n):
    batches = ShuffledBatches(torch.ones(n), 32, seed=0)
    sizes = [len(batch) for batch in batches]
    assert len(sizes) == len(batches) and all(size > 1 for size in sizes)
    assert n - sum(sizes) == (n % 32 == 1)


def test_hostile_captions_load(tiny, vocab):
    texts = ["🙂", "dog " * 500, "naïve", "a\tb\r", "x" * 5000] * 10
    (tiny / "data/tiny/dev_caps.txt").write_bytes("\n".join(texts).encode())
    dataset = load(tiny, vocab)
    assert dataset.lengths.max() == 502 and dataset.lengths.min() == 3
    collate([dataset[i] for i in range(10)])


def test_resident_memory_does_not_grow_with_the_file(tmp_path):
    """600 MB gone through row by row and block by block leave less than 150 MB behind."""
    path = tmp_path / "big_ims.npy"
    np.lib.format.open_memmap(path, "w+", np.float16, (4096, 36, 2048)).flush()
    regions = RegionFile(path)

    def resident():
        with open("/proc/self/status") as status:
            return sum(
                int(line.split()[1]) for line in status if line.startswith(("RssAnon", "RssFile"))
            )

    before, peak = resident(), 0
    for row in range(0, regions.num_rows, 8):
        regions[slice(row, row + 8)]
        peak = max(peak, resident())
    assert peak - before < 150_000


def test_a_pickled_region_file_reopens_instead_of_copying(tiny):
    regions = RegionFile(tiny / "data/tiny/train_ims.npy")
    copied = pickle.dumps(regions)
    assert len(copied) < 2000
    np.testing.assert_array_equal(pickle.loads(copied)[3], regions[3])


def region_file(path, how):
    rng = np.random.default_rng(0)
    good = rng.normal(size=(10, 6, 8)).astype(np.float32)
    if how == "rank 2":
        np.save(path, good[0])
    elif how == "integers":
        np.save(path, good.astype(int))
    elif how == "double":
        np.save(path, good.astype(float))
    elif how == "objects":
        np.save(path, np.array([{}, "x"], dtype=object), allow_pickle=True)
    elif how == "no images":
        np.save(path, good[:0])
    elif how == "transposed":
        np.save(path, good.transpose(0, 2, 1))
    elif how == "fortran":
        np.save(path, np.asfortranarray(good).T)
    elif how == "nan":
        good[4, 2, 1] = np.nan
        np.save(path, good)
    elif how == "infinite":
        good[9, 5, 7] = np.inf
        np.save(path, good)
    elif how == "truncated":
        np.save(path, good)
        path.write_bytes(path.read_bytes()[:500])
    elif how == "empty file":
        path.write_bytes(b"")
    elif how == "archive":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.npy", b"x")
    elif how == "pickle":
        path.write_bytes(pickle.dumps({"a": 1}))
    elif how == "other images":
        np.save(path, good[:7])


@pytest.mark.parametrize(
    "how",
    ["rank 2", "integers", "double", "objects", "no images", "transposed", "fortran", "nan",
     "infinite", "truncated", "empty file", "archive", "pickle", "other images"],
)  # fmt: skip
def test_unusable_regions_are_refused_by_name(tiny, vocab, how):
    region_file(tiny / "data/tiny/dev_ims.npy", how)
    with pytest.raises(InputError, match="dev_"):
        dataset = load(tiny, vocab, img_dim=8, num_regions=6)
        list(dataset.image_blocks(4))


def test_missing_files_name_the_folder_and_both_ways_on(tiny, vocab):
    with pytest.raises(InputError) as error:
        load(tiny, vocab, "testall")
    for part in ("data/tiny", "testall_ims.npy", "testall_caps.txt", "dev, test, train",
                 "Download", "make_scenes.py"):  # fmt: skip
        assert part in str(error.value)


@pytest.mark.parametrize("change", [-1, 1])
def test_caption_counts_that_do_not_fit_are_refused(tiny, vocab, change):
    path = tiny / "data/tiny/dev_caps.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:change] if change < 0 else [*lines, "a dog"]))
    with pytest.raises(InputError, match=f"{50 + change} captions do not fit the 10 images"):
        load(tiny, vocab)


def test_ids_that_do_not_fit_are_refused(tiny, vocab):
    (tiny / "data/tiny/dev_ids.txt").write_text("a\nb\n")
    with pytest.raises(InputError, match="2 ids do not fit 10 images"):
        load(tiny, vocab)


def test_a_workers_error_is_one_line(tiny, vocab):
    region_file(tiny / "data/tiny/dev_ims.npy", "nan")
    with pytest.raises(InputError) as error:
        list(train_loader(load(tiny, vocab), 25, workers=1, seed=0))
    assert "\n" not in str(error.value) and "row 4" in str(error.value)


def test_vocabulary_of_a_missing_data_set(tmp_path):
    with pytest.raises(InputError, match="train_caps.txt and dev_caps.txt not found"):
        build_from_data(tmp_path, "nothing")
