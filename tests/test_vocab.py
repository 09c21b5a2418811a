"""Tokenizer and vocabulary."""

import json

import nltk
import pytest
from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

import vocab as vocab_module
from errors import InputError
from vocab import SPECIAL_TOKENS, Vocabulary, build_vocab, read_captions, tokenize

HOSTILE = [
    "🙂🙂", "naïve café", "a\tb", "it's 5 o'clock .", "x" * 2000, "dog " * 500, "<unk> <end>"
]  # fmt: skip


def test_words_are_lower_case_and_punctuation_stands_apart():
    words = tokenize("A man's dog, brown & small, can't swim.")
    assert words == "a man 's dog , brown & small , ca n't swim .".split()


def test_bytes_are_refused():
    with pytest.raises(TypeError, match="decode"):
        tokenize(b"a dog")


def punkt_that_knows(*abbreviations):
    parameters = PunktParameters()
    parameters.abbrev_types.update(abbreviations)
    return PunktSentenceTokenizer(parameters).tokenize


def test_where_the_untrained_splitter_differs():
    """It ends a sentence after an abbreviation, so that the full stop becomes a word."""
    untrained = PunktSentenceTokenizer().tokenize
    trained = punkt_that_knows("mr")
    assert tokenize("Mr. Smith walks.", trained) == ["mr.", "smith", "walks", "."]
    assert tokenize("Mr. Smith walks.", untrained) == ["mr", ".", "smith", "walks", "."]
    plain = "Two dogs run . One barks at 3.5 m !"
    assert tokenize(plain, trained) == tokenize(plain, untrained)


def test_missing_punkt_data_warns_once(monkeypatch):
    def nothing(*_, **__):
        raise LookupError

    monkeypatch.setattr(nltk.data, "find", nothing)
    vocab_module.sentence_splitter.cache_clear()
    with pytest.warns(UserWarning, match="nltk.downloader punkt_tab") as caught:
        tokenize("a dog.")
        tokenize("a cat.")
    assert len(caught) == 1
    vocab_module.sentence_splitter.cache_clear()


def test_trained_punkt_is_used_where_installed(monkeypatch):
    monkeypatch.setattr(nltk.data, "find", lambda *_: "found")
    vocab_module.sentence_splitter.cache_clear()
    assert vocab_module.sentence_splitter() is nltk.sent_tokenize
    vocab_module.sentence_splitter.cache_clear()


def test_threshold_and_order():
    vocab = build_vocab(["b a a"] * 3 + ["c b"], threshold=4)
    assert list(vocab.word2idx) == [*SPECIAL_TOKENS, "a", "b"]
    assert build_vocab(["c b", *["b a a"] * 3], threshold=4).word2idx == vocab.word2idx


def test_unknown_words_and_ends():
    vocab = build_vocab(["a dog"] * 4)
    assert vocab.encode("a zebra dog") == [1, 4, 3, 5, 2]
    assert vocab.encode("") == [1, 2]


@pytest.mark.parametrize("caption", HOSTILE)
def test_hostile_captions_are_encoded(caption):
    numbers = build_vocab(["a dog"] * 4).encode(caption)
    assert numbers[0] == 1 and numbers[-1] == 2
    assert 1 not in numbers[1:-1] and 2 not in numbers[1:-1]  # no caption can forge its ends


def test_json_round_trip(tmp_path):
    vocab = build_vocab(HOSTILE * 4)
    vocab.save(tmp_path / "v" / "x_vocab.json")
    again = Vocabulary.load(tmp_path / "v" / "x_vocab.json")
    assert again.word2idx == vocab.word2idx and again.idx2word == vocab.idx2word
    assert again.fingerprint() == vocab.fingerprint()
    assert set(map(type, again.idx2word)) == {int}
    content = json.loads((tmp_path / "v" / "x_vocab.json").read_text(encoding="utf-8"))
    assert set(content) == {"word2idx", "idx2word", "idx"} and content["idx"] == len(vocab)
    assert content["idx2word"]["0"] == "<pad>"


def spoil(content, how):
    word2idx = content["word2idx"]
    if how == "no special token":
        del word2idx["<unk>"]
    elif how == "hole":
        word2idx["dog"] = 99
    elif how == "twice":
        word2idx["dog"] = word2idx["a"]
    elif how == "text":
        word2idx["dog"] = "5"
    elif how == "bool":
        word2idx["<start>"] = True
    elif how == "disagree":
        content["idx2word"]["4"] = "zebra"
    else:
        content.clear()
    return content


@pytest.mark.parametrize(
    "how", ["no special token", "hole", "twice", "text", "bool", "disagree", "empty"]
)
def test_broken_vocabularies_are_refused(tmp_path, how):
    path = tmp_path / "v.json"
    build_vocab(["a dog"] * 4).save(path)
    path.write_text(json.dumps(spoil(json.loads(path.read_text()), how)))
    with pytest.raises(InputError, match="v.json"):
        Vocabulary.load(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_files_that_are_no_vocabulary_are_refused(tmp_path, content):
    (tmp_path / "v.json").write_bytes(content)
    with pytest.raises(InputError, match="v.json"):
        Vocabulary.load(tmp_path / "v.json")
    with pytest.raises(InputError, match="none.json"):
        Vocabulary.load(tmp_path / "none.json")


def test_reading_captions(tmp_path):
    path = tmp_path / "c.txt"
    path.write_bytes("\ufeffa dog\r\nder Bär\u2028läuft\r\n🙂\n".encode())
    assert read_captions(path) == ["a dog", "der Bär\u2028läuft", "🙂"]
    for bad, line in ((b"a\n\xff\n", "line 2: not UTF-8"), (b"a\n\nb\n", "line 2: empty"),
                      (b"a\0b\n", "line 1: a NUL byte")):  # fmt: skip
        path.write_bytes(bad)
        with pytest.raises(InputError, match=line):
            read_captions(path)
