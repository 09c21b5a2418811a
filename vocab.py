"""Words and their numbers: the tokenizer and SCAN's vocabulary JSON.

    python vocab.py --data_path data --data_name f30k_precomp

writes vocab/f30k_precomp_vocab.json from the train and dev captions, words seen at least 4 times.
A checkpoint of the official code needs the vocabulary file it was trained with: the numbers in it
came out of a Python 2 dict, in an order that cannot be computed again.
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


def tokenize(caption: str, split: Callable[[str], list[str]] | None = None) -> list[str]:
    """`nltk.word_tokenize(caption.lower())`: the words of a caption, without special tokens.

    Raises:
        TypeError: for bytes; the repr of bytes has cost other ports half their recall.
    """
    if not isinstance(caption, str):
        raise TypeError(f"a caption is text, not {type(caption).__name__}: decode it as UTF-8")
    split = split or sentence_splitter()
    words = NLTKWordTokenizer()
    return [word for sentence in split(caption.lower()) for word in words.tokenize(sentence)]


class Vocabulary:
    """Words and their numbers; unknown words are `<unk>`.

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
        """`<start> words <end>` as numbers; at least those two.

        Raises:
            InputError: for more than MAX_WORDS words; self-attention needs their square of memory.
        """
        words = tokenize(caption)
        if len(words) > MAX_WORDS:
            raise InputError(f"a caption of {len(words):,} words; at most {MAX_WORDS} are taken")
        return [self("<start>"), *map(self, words), self("<end>")]

    def fingerprint(self) -> str:
        """Changes when a word or its number does: a checkpoint fits one vocabulary only."""
        text = "\n".join(self.idx2word[i] for i in range(len(self)))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"word2idx": self.word2idx, "idx2word": self.idx2word, "idx": len(self)}
        write_text(path, json.dumps(content, ensure_ascii=False))

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Read SCAN's JSON.

        Raises:
            InputError: if it is missing, no JSON, has no special tokens, or its numbers are not
                0 … n−1, each the number of one word.
        """
        path = Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(
                f"{path}: no vocabulary here; name its folder with --vocab_path, or make one: "
                f"python vocab.py --data_path D --data_name N"
            ) from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not a JSON file: {error}") from error
        word2idx = content.get("word2idx") if isinstance(content, dict) else None
        if not isinstance(word2idx, dict) or not {*SPECIAL_TOKENS} <= word2idx.keys():
            raise InputError(f"{path}: expected SCAN's {{'word2idx': {{'<pad>': 0, …}}, …}}")
        numbers = list(word2idx.values())
        if {*map(type, numbers)} != {int} or sorted(numbers) != [*range(len(numbers))]:
            raise InputError(f"{path}: the {len(numbers)} words should have the numbers 0 … n−1")
        if word2idx["<pad>"] != 0:
            raise InputError(f"{path}: <pad> should be number 0, it is {word2idx['<pad>']}")
        vocab = cls(sorted(word2idx, key=word2idx.get))
        idx2word = content.get("idx2word")
        if idx2word is not None and idx2word != {str(i): w for i, w in vocab.idx2word.items()}:
            raise InputError(f"{path}: idx2word and word2idx disagree")
        try:
            vocab.fingerprint()
        except UnicodeEncodeError as error:  # JSON can hold half a character
            raise InputError(f"{path}: a word that is not text: {error}") from error
        return vocab


def build_vocab(captions: Iterable[str], threshold: int = 4) -> Vocabulary:
    """Words seen at least `threshold` times, in alphabetical order, after the special tokens."""
    counts = Counter(word for caption in captions for word in tokenize(caption))
    kept = sorted(word for word, count in counts.items() if count >= threshold)
    return Vocabulary([*SPECIAL_TOKENS, *(word for word in kept if word not in SPECIAL_TOKENS)])


def vocab_file(vocab_path: str | Path, data_name: str) -> Path:
    """Where SCAN keeps a data set's vocabulary.

    Raises:
        InputError: if `data_name` is a path, which would lead out of the folder.
    """
    if Path(data_name).name != data_name or data_name == "..":
        raise InputError(f"--data_name {data_name}: expected the name of a folder in --data_path")
    return Path(vocab_path) / f"{data_name}_vocab.json"


def read_captions(path: str | Path) -> list[str]:
    """The captions of a `{split}_caps.txt`, one a line, LF or CRLF.

    Raises:
        InputError: if the file is not UTF-8 (with the line), or a line is empty or holds NUL.
    """
    path = Path(path)
    lines = path.read_bytes().split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    captions = []
    for number, line in enumerate(lines, start=1):
        try:
            caption = line.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise InputError(f"{path}, line {number}: not UTF-8: {error}") from error
        if not caption or "\0" in caption:
            found = "empty" if not caption else "a NUL byte"
            raise InputError(f"{path}, line {number}: {found}; every line is one caption")
        captions.append(caption)
    return captions


def build_from_data(data_path: str | Path, data_name: str, threshold: int = 4) -> Vocabulary:
    """The vocabulary of a data set's train and dev captions."""
    folder = Path(data_path) / data_name
    files = [folder / f"{split}_caps.txt" for split in ("train", "dev")]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(f"{folder}: {' and '.join(missing)} not found; see the README, 'Data'")
    return build_vocab((c for file in files for c in read_captions(file)), threshold)


@one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data_path", default="./data", help="folder of the data sets")
    add("--data_name", default="f30k_precomp", help="its folder in data_path")
    add("--vocab_path", default="./vocab", help="folder to write into")
    add("--threshold", default=4, type=at_least(1), help="least count of a word")
    add("--overwrite", action="store_true", help="replace a vocabulary that is there")
    opt = parser.parse_args()
    path = vocab_file(opt.vocab_path, opt.data_name)
    if path.exists() and not opt.overwrite:
        raise InputError(f"{path}: is there already; --overwrite replaces it")
    vocab = build_from_data(opt.data_path, opt.data_name, opt.threshold)
    vocab.save(path)
    print(f"{len(vocab)} words written to {path}")


if __name__ == "__main__":
    main()
