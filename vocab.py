"""Words and their ids: the tokenizer and SCAN's vocabulary JSON.

    python vocab.py --data_path data --data_name f30k_precomp

writes vocab/f30k_precomp_vocab.json: the words seen at least 4 times in the train and dev captions.
A checkpoint of the official code needs the vocabulary file it was trained with: the ids in it
follow the order of a Python 2 dict, which cannot be computed again.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import nltk
import numpy as np
from nltk.tokenize import NLTKWordTokenizer
from nltk.tokenize.punkt import PunktSentenceTokenizer

import distributed
from utils import InputError, at_least, one_line, write_text

SPECIAL_TOKENS = ("<pad>", "<start>", "<end>", "<unk>")
MAX_WORDS = 512  # of a caption; Flickr30K's longest has 81


@functools.cache
def sentence_splitter() -> Callable[[str], list[str]]:
    """nltk's trained Punkt for English where its data is installed, else the untrained one."""
    try:
        nltk.data.find("tokenizers/punkt_tab/english")
    except LookupError:
        if distributed.is_main_process():
            print(
                "note: nltk's Punkt data is missing, so 'mr. smith' is split differently; "
                "to get it: python -m nltk.downloader punkt_tab",
                file=sys.stderr,
            )
        return PunktSentenceTokenizer().tokenize
    return nltk.sent_tokenize


def tokenize(caption: str) -> list[str]:
    """`nltk.word_tokenize(caption.lower())`: the words of a caption, without special tokens."""
    words, sentences = NLTKWordTokenizer(), sentence_splitter()(caption.lower())
    return [word for sentence in sentences for word in words.tokenize(sentence)]


class Vocabulary:
    """Words and their ids; unknown words are `<unk>`.

    The JSON is SCAN's: {"word2idx": {word: i}, "idx2word": {"i": word}, "idx": n}.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self.idx2word = dict(enumerate(words))
        self.word2idx = {word: index for index, word in self.idx2word.items()}

    def __len__(self) -> int:
        return len(self.idx2word)

    def __call__(self, word: str) -> int:
        return self.word2idx.get(word, self.word2idx["<unk>"])

    def encode(self, caption: str) -> list[int]:
        """`<start> words <end>` as ids.

        Raises InputError for more than MAX_WORDS words: self-attention takes quadratic memory.
        """
        words = tokenize(caption)
        if len(words) > MAX_WORDS:
            raise InputError(f"a caption of {len(words):,} words; at most {MAX_WORDS} are taken")
        return [self("<start>"), *map(self, words), self("<end>")]

    def fingerprint(self) -> str:
        """Changes when a word or its id changes: a checkpoint fits only one vocabulary."""
        text = "\n".join(self.idx2word.values())
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"word2idx": self.word2idx, "idx2word": self.idx2word, "idx": len(self)}
        write_text(path, json.dumps(content, ensure_ascii=False))

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Read SCAN's JSON. Raises InputError if it is missing or invalid."""
        try:
            word2idx = json.loads(Path(path).read_text(encoding="utf-8"))["word2idx"]
            vocab = cls(sorted(word2idx, key=lambda word: word2idx[word]))
            vocab.fingerprint()  # JSON can hold half a character, which is not valid text
        except FileNotFoundError:
            raise InputError(
                f"{path}: no vocabulary here; name its folder with --vocab_path, or make one: "
                f"python vocab.py --data_path D --data_name N"
            ) from None
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise InputError(f"{path}: not SCAN's {{'word2idx': …}}: {error}") from error
        special = [vocab.word2idx.get(word) for word in SPECIAL_TOKENS]
        if vocab.word2idx != word2idx or special[0] != 0 or None in special:
            raise InputError(
                f"{path}: expected words with the numbers 0 … {len(vocab) - 1}, <pad> with 0, and "
                "<start>, <end>, <unk>"
            )
        return vocab


def build_vocab(captions: Iterable[str], threshold: int = 4) -> Vocabulary:
    """Words seen at least `threshold` times, in alphabetical order, after the special tokens."""
    counts = Counter(word for caption in captions for word in tokenize(caption))
    kept = sorted(word for word, count in counts.items() if count >= threshold)
    return Vocabulary([*SPECIAL_TOKENS, *(word for word in kept if word not in SPECIAL_TOKENS)])


def vocab_file(vocab_path: str | Path, data_name: str) -> Path:
    """Where SCAN keeps a data set's vocabulary. Raises InputError if `data_name` is a path."""
    if Path(data_name).name != data_name or data_name == "..":
        raise InputError(f"--data_name {data_name}: expected the name of a folder in --data_path")
    return Path(vocab_path) / f"{data_name}_vocab.json"


def read_captions(path: str | Path) -> list[str]:
    """The captions of a `{split}_caps.txt`, one per line, LF or CRLF.

    Raises InputError naming a line that is not UTF-8, is empty, or holds NUL.
    """
    captions = []
    for number, line in enumerate(Path(path).read_bytes().removesuffix(b"\n").split(b"\n"), 1):
        try:
            captions.append(line.decode("utf-8-sig").strip())
        except UnicodeDecodeError as error:
            raise InputError(f"{path}, line {number}: not UTF-8: {error}") from error
        if not captions[-1] or "\0" in captions[-1]:
            raise InputError(f"{path}, line {number}: empty, or NUL; every line is one caption")
    return captions


def build_from_data(data_path: str | Path, data_name: str, threshold: int = 4) -> Vocabulary:
    """The vocabulary of a data set's train and dev captions."""
    files = (Path(data_path) / data_name / f"{split}_caps.txt" for split in ("train", "dev"))
    return build_vocab((caption for file in files for caption in read_captions(file)), threshold)


def read_word_vectors(
    path: str | Path, vocab: Vocabulary, word_dim: int
) -> tuple[list[int], np.ndarray]:
    """Pretrained vectors of a vocabulary's words: the word ids, and the vectors (n, word_dim).

    path: GloVe's text format, one word per line: the word and its vector, separated by spaces.

    Raises InputError if it has none of the words, or vectors of another size.
    """
    found = {}
    with Path(path).open(encoding="utf-8") as file:
        for line in file:
            word, *vector = line.rstrip().rsplit(" ", word_dim)  # some words have spaces
            if word in vocab.word2idx:
                found[vocab.word2idx[word]] = vector
    try:
        vectors = np.array([*found.values()], dtype=np.float32)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    if vectors.shape != (len(found), word_dim) or not np.isfinite(vectors).all():
        raise InputError(
            f"{path}: expected vectors of --word_dim {word_dim} numbers, found {vectors.shape} for "
            f"{len(found)} of the {len(vocab)} words"
        )
    return [*found], vectors


@one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data_path", default="./data", help="folder of the data sets")
    add("--data_name", default="f30k_precomp", help="the data set's folder in data_path")
    add("--vocab_path", default="./vocab", help="folder to write into")
    add("--threshold", default=4, type=at_least(1), help="minimum count of a word")
    add("--overwrite", action="store_true", help="replace an existing vocabulary")
    opt = parser.parse_args()
    path = vocab_file(opt.vocab_path, opt.data_name)
    if path.exists() and not opt.overwrite:
        raise InputError(f"{path}: is there already; --overwrite replaces it")
    vocab = build_from_data(opt.data_path, opt.data_name, opt.threshold)
    vocab.save(path)
    print(f"{len(vocab)} words written to {path}")


if __name__ == "__main__":
    main()
