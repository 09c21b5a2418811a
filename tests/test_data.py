"""SCAN's layout: what loads, and what is refused."""

import io
import pickle

import numpy as np
import pytest
import torch
from conftest import load_split

import data
from utils import InputError
from vocab import MAX_WORDS


@pytest.fixture
def folder(tiny):
    return tiny / "data" / "tiny"


@pytest.fixture
def load(tiny):
    return lambda split="dev", **options: load_split(tiny, split, **options)[0]


def test_an_example_is_a_caption_with_its_image(tiny, folder):
    dataset, vocab = load_split(tiny, "dev")
    assert (len(dataset), dataset.n_images, dataset.captions_per_image) == (50, 10, 5)
    image, words, image_index, caption_index = dataset[37]
    np.testing.assert_array_equal(image, np.load(folder / "dev_ims.npy")[7])
    assert words.tolist() == vocab.encode(dataset.texts[37])
    assert (image_index, caption_index, dataset.image_ids[7]) == (7, 37, "dev7")
    np.testing.assert_array_equal(dataset.image_of_caption, np.repeat(np.arange(10), 5))
    (folder / "dev_ids.txt").unlink()
    assert load_split(tiny, "dev")[0].image_ids == [str(i) for i in range(10)]


def test_images_and_captions_apart_are_the_same(load):
    dataset, seen = load(), 0
    images = torch.cat(list(dataset.image_blocks(3)))
    assert torch.equal(images, torch.stack([dataset.image(i) for i in range(10)]))
    assert torch.equal(torch.cat(list(dataset.image_blocks(3, slice(2, 9)))), images[2:9])
    for captions, lengths, _ in dataset.caption_blocks(torch.arange(len(dataset)), 7):
        assert captions.shape[1] == lengths.max()  # each block padded to its own longest
        for row, n in zip(captions, lengths, strict=True):
            assert torch.equal(row[:n], dataset.words(seen)) and not row[n:].any()
            seen += 1
    assert seen == 50


FORMS = {"float16": np.float16, "Fortran order": np.asfortranarray,
         "five times over": lambda images: np.repeat(images, 5, axis=0)}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_other_forms_load_as_the_usual_one(folder, load, form):
    images = np.load(folder / "dev_ims.npy").astype(np.float16).astype(np.float32)
    np.save(folder / "dev_ims.npy", FORMS[form](images))
    (folder / "dev_ids.txt").write_text("".join(f"dev{i // 5}\n" for i in range(50)))
    dataset = load()
    assert (dataset.n_images, len(dataset)) == (10, 50)
    assert dataset.image_ids == [f"dev{i}" for i in range(10)]
    blocks = torch.cat(list(dataset.image_blocks(4)))
    assert torch.equal(blocks, torch.from_numpy(images)) and torch.equal(dataset[33][0], blocks[6])


@pytest.mark.parametrize("n, most, n_images, per_image", [
    (10, None, 10, 1), (20, None, 10, 2), (30, 29, 10, 3), (50, 23, 5, 5),
])  # fmt: skip
def test_any_number_of_captions_that_divides(folder, load, n, most, n_images, per_image):
    (folder / "dev_caps.txt").write_text("a red dog\n" * n)
    dataset = load(max_captions=most)
    assert (len(dataset), dataset.n_images) == (most or n, n_images)
    assert dataset.captions_per_image == per_image
    assert len(list(dataset.image_blocks(1))) == len(dataset.image_ids) == n_images


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_of_batches(load, workers):
    dataset, seen, random_state = load("train"), [], torch.get_rng_state()
    for batch in data.train_loader(dataset, 16, workers, seed=3):
        assert batch.lengths.tolist() == sorted(batch.lengths.tolist(), reverse=True)
        assert batch.captions.shape[1] == batch.lengths.max()
        for k, caption in enumerate(batch.caption_index.tolist()):
            image, words, image_index, _ = dataset[caption]
            assert torch.equal(batch.images[k], image) and batch.image_index[k] == image_index
            assert torch.equal(batch.captions[k, : batch.lengths[k]], words)
        seen += batch.caption_index.tolist()
    assert sorted(seen) == list(range(150)) != seen
    assert torch.equal(torch.get_rng_state(), random_state)  # dropout draws from it


def test_the_order_depends_on_seed_and_epoch_alone():
    batches = data.ShuffledBatches(torch.ones(100), 32, seed=5)
    torch.manual_seed(1)
    first = list(batches)
    torch.manual_seed(2)
    assert list(batches) == first != list(data.ShuffledBatches(torch.ones(100), 32, seed=6))
    batches.set_epoch(0, start=2)
    assert list(batches) == first[2:]
    batches.set_epoch(1)
    assert list(batches) != first


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 34, 64, 65])
def test_no_batch_of_one(n):
    batches = data.ShuffledBatches(torch.ones(n), 32, seed=0)
    sizes = [len(batch) for batch in batches]
    assert len(sizes) == len(batches) and all(size > 1 for size in sizes)
    assert n - sum(sizes) == (n % 32 == 1)


def test_a_region_file_is_opened_anew_for_each_read(folder):
    """A copy in a worker process holds no data and no open file, a moved file is missed at once."""
    regions = data.RegionFile(folder / "train_ims.npy")
    copied = pickle.dumps(regions)
    assert len(copied) < 2000
    np.testing.assert_array_equal(pickle.loads(copied)[3], regions[3])
    regions[3][:] = 0  # a read is a copy: the file stays as it is
    assert regions[3].any()
    (folder / "train_ims.npy").rename(folder / "moved.npy")
    with pytest.raises(FileNotFoundError, match="train_ims.npy"):
        regions[0]


def npy(array, place=(), value=None):
    """The bytes of a .npy file, with `value` at `place`."""
    array, file = array.copy(), io.BytesIO()
    if value is not None:
        array[place] = value
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


GOOD = np.random.default_rng(0).normal(size=(10, 6, 8)).astype(np.float32)
UNUSABLE = {
    "rank 2": npy(GOOD[0]),
    "double": npy(GOOD.astype(float)),
    "objects": npy(np.array([{}, "x"], dtype=object)),
    "no images": npy(GOOD[:0]),
    "nan": npy(GOOD, (4, 2, 1), np.nan),
    "infinite": npy(GOOD, (9, 5, 7), np.inf),
    "truncated": npy(GOOD)[:500],
}


@pytest.mark.parametrize("how", UNUSABLE)
def test_unusable_regions_are_refused_by_name(folder, load, how):
    (folder / "dev_ims.npy").write_bytes(UNUSABLE[how])
    with pytest.raises(InputError, match="dev_"):
        list(load().image_blocks(4))


def test_missing_files_name_the_folder_and_the_ways_on(folder):
    (folder / "dev_ims.npy").unlink()  # captions alone are what the data sets come with
    missing = {"dev": "dev_ims.npy not found", "testall": "testall_ims.npy and testall_caps.txt"}
    for split, files in missing.items():
        with pytest.raises(InputError) as error:
            data.find_files(folder.parent, "tiny", split)
        for part in ("data/tiny", files, "splits: test, train", "--data_path", "download_data.py"):
            assert part in str(error.value)


@pytest.mark.parametrize("name, lines, message", [
    ("dev_caps.txt", 49, "49 captions do not fit the 10 images"),
    ("dev_caps.txt", 0, "line 1: empty"), ("dev_ids.txt", 2, "2 ids do not fit 10 images"),
])  # fmt: skip
def test_counts_that_do_not_fit_are_refused(folder, load, name, lines, message):
    (folder / name).write_text("a dog\n" * lines)
    with pytest.raises(InputError, match=f"{name}.*{message}"):
        load()


def test_boxes_are_optional_and_have_to_fit(folder):
    path = folder / "dev_boxes.npy"
    assert data.read_boxes(path, 10, 6) is None
    np.save(path, np.ones((10, 6, 4), np.float32))
    assert data.read_boxes(path, 10, 6).shape == (10, 6, 4)
    for boxes in (np.ones((10, 5, 4)), np.ones((10, 6, 4), int)):
        np.save(path, boxes)
        with pytest.raises(InputError, match="dev_boxes.npy: expected float boxes"):
            data.read_boxes(path, 10, 6)


def test_captions_of_any_text_load_up_to_a_length(folder, load):
    path, longest = folder / "dev_caps.txt", "dog " * MAX_WORDS
    texts = ["🙂", longest, "naïve", "a\tb\r", "x" * 5000] * 10
    path.write_bytes("\n".join(texts).encode())
    dataset = load()
    assert dataset.lengths.max() == MAX_WORDS + 2 and dataset.lengths.min() == 3
    texts[6] += "dog"
    path.write_text("\n".join(texts))
    with pytest.raises(InputError, match=r"dev_caps\.txt, line 7: .* 513 words; at most 512"):
        load()


def test_a_workers_error_is_one_line(folder, load):
    (folder / "dev_ims.npy").write_bytes(UNUSABLE["nan"])
    with pytest.raises(InputError) as error:
        list(data.train_loader(load(), 25, workers=1, seed=0))
    assert "\n" not in str(error.value) and "row 4" in str(error.value)


def test_size_augmentation_leaves_out_regions_and_words():
    torch.manual_seed(0)
    lengths, index = torch.tensor([30, 12, 3, 2] * 50), torch.arange(200)
    place = torch.arange(30).expand(200, -1)
    captions = (place + 10).masked_fill(place >= lengths[:, None], 0)  # 10 11 12 … 0 0
    batch = data.Batch(torch.rand(200, 36, 4) + 1, captions, lengths, index, index)
    images, words, new_lengths, *indices = data.size_augmentation(batch, 0.2)
    assert all(torch.equal(a, b) for a, b in zip(indices, batch[3:], strict=True))
    dropped = (images == 0).all(2)
    assert torch.equal(images[~dropped], batch.images[~dropped]) and not images[dropped].any()
    assert dropped.float().mean() == pytest.approx(0.2, abs=0.02)
    for row, length, old in zip(words.tolist(), new_lengths, lengths.tolist(), strict=True):
        kept = row[:length]
        assert kept == sorted(set(kept)) and not any(row[length:])  # in order, then padding
        assert (kept[0], kept[-1]) == (10, 9 + old)  # <start> and <end>
    assert ((new_lengths - 2).sum() / (lengths - 2).sum()).item() == pytest.approx(0.8, abs=0.02)
