"""Text to tokens: corpora, the split into training, validation and test, and vocabularies.

Nothing of the test text reaches training. A file is cut into three contiguous pieces, 80 %, 10 % and 10 %, at
the end of a paragraph where there is one. A built-in corpus consists of documents (topics, modules): whole
documents go to one split, in an order drawn from the hash of their names, and a paragraph that occurred before,
in whichever document, is dropped first. The vocabulary is built on the training text alone.
"""

import hashlib
import json
import re
import sysconfig
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

BUILT_IN = ("python-docs", "python-source")
TOKENIZERS = ("word", "char", "bpe")
UNKNOWN = "<unk>"
SOURCE_CHARACTERS = 4_000_000  # about the Penn Treebank's size

# Every character belongs to exactly one piece, so decoding is concatenation. A line's indentation is one piece.
PIECES = {"word": re.compile(r"\n\s*| ?\w+| ?([^\w\s])\1{0,3}|\s"), "char": re.compile(r"[\s\S]")}


class Corpus(NamedTuple):
    """Three texts of which none contains another's."""

    name: str
    train: str
    validation: str
    test: str

    @property
    def fingerprint(self) -> str:
        """Return a hash of the texts, by which a resumed run knows its data again."""
        return hashlib.sha256("\0".join(self[1:]).encode()).hexdigest()[:16]


class Data(NamedTuple):
    """A corpus as token ids: three int64 tensors [N]."""

    tokenizer: "Tokenizer"
    train: Tensor
    validation: Tensor
    test: Tensor


# --- corpora -----------------------------------------------------------------------------------------------------


def load_corpus(name: str) -> Corpus:
    """Load "python-docs", "python-source" or the UTF-8 text file `name`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is empty, too short to be split, or not UTF-8.
    """
    if name == "python-docs":
        return Corpus(name, *_split_documents(_python_docs()))
    if name == "python-source":
        return Corpus(name, *_split_documents(_python_source()))
    return Corpus(name, *_split_text(read_text(name), name))


def read_text(path: str | Path) -> str:
    """Return the text of a UTF-8 file with Unix line ends; raise a clear error where it is none."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data: {path} is not a file, expected a text file or one of {', '.join(BUILT_IN)}")
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {path} is not UTF-8 text: byte 0x{raw[error.start]:02x} at offset {error.start}; "
                         "unpack or convert it first, for example with xz -d or iconv") from error
    if not text.strip():
        raise ValueError(f"data: {path} is empty, expected text")
    return text.replace("\r\n", "\n")


def _python_docs() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError("data: this Python lacks pydoc_data, choose --data python-source or a file") from error
    return topics


def _python_source() -> dict[str, str]:
    """Return modules of the standard library, without tests, until there are SOURCE_CHARACTERS of them."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"}
    names = [p.relative_to(root) for p in root.rglob("*.py")]
    names = [name for name in names if not left_out & set(name.parts)]
    documents, size = {}, 0
    for name in sorted(names, key=_hash):
        text = (root / name).read_text(encoding="utf-8", errors="replace")
        documents[str(name)] = text
        size += len(text)
        if size >= SOURCE_CHARACTERS:
            break
    if not documents:
        raise ValueError(f"data: no .py files of the standard library in {root}, choose a file")
    return documents


def _hash(name) -> bytes:
    return hashlib.sha256(str(name).encode()).digest()


def _split_documents(documents: dict[str, str]) -> list[str]:
    """Drop repeated paragraphs, then give whole documents to test, validation and training, in order of hash."""
    seen: set[str] = set()
    unique = []
    for name in sorted(documents, key=_hash):
        paragraphs = []
        for paragraph in documents[name].split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                paragraphs.append(paragraph.strip("\n"))
        if paragraphs:
            unique.append("\n\n".join(paragraphs) + "\n\n")
    share = sum(map(len, unique)) // 10
    test, rest = _take(unique, share)
    validation, train = _take(rest, share)
    return ["".join(part) for part in (train, validation, test)]


def _take(documents: list[str], size: int) -> tuple[list[str], list[str]]:
    """Take each document that still fits into `size` characters; return those taken and the others."""
    taken, others = [], []
    for document in documents:
        fits = sum(map(len, taken)) + len(document) <= size
        (taken if fits else others).append(document)
    return taken, others


def _split_text(text: str, name: str) -> list[str]:
    first = _boundary(text, len(text) * 8 // 10)
    second = _boundary(text, max(first, len(text) * 9 // 10))
    parts = [text[:first], text[first:second], text[second:]]
    if not all(part.strip() for part in parts):
        raise ValueError(f"data: {name} has {len(text)} characters, too few to split into training, validation, test")
    return parts


def _boundary(text: str, start: int) -> int:
    """Return the first end of a paragraph, else line, else word, soon after `start`; else `start`."""
    for end in ("\n\n", "\n", " "):
        found = text.find(end, start, start + len(text) // 50)
        if found >= 0:
            return found + len(end)
    return start


# --- vocabularies ------------------------------------------------------------------------------------------------


class Tokenizer:
    """A table of words or characters; id 0 is `<unk>`.

    Words keep the space before them and line ends keep the indentation after them, so that `decode` needs only
    to concatenate.
    """

    def __init__(self, kind: str, tokens: list[str]):
        self.kind, self.tokens = kind, tokens
        self.ids = {token: i for i, token in enumerate(tokens)}

    @classmethod
    def build(cls, kind: str, text: str, vocab_size: int) -> "Tokenizer":
        """Keep the `vocab_size - 1` most frequent pieces of `text`; those that occur once teach what `<unk>` is."""
        counts = Counter(_pieces(kind, text))
        counts.pop(UNKNOWN, None)
        common = sorted((piece for piece, count in counts.items() if count > 1), key=lambda p: (-counts[p], p))
        if not common:
            raise ValueError(f"data: no {kind} occurs twice in the training text ({len(text)} characters)")
        return cls(kind, [UNKNOWN, *common[: vocab_size - 1]])

    def __len__(self):
        return len(self.tokens)

    def encode(self, text: str) -> Tensor:
        """Return the ids of `text`, int64 [N]."""
        return torch.tensor([self.ids.get(piece, 0) for piece in _pieces(self.kind, text)], dtype=torch.int64)

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids`; an unknown word reads ` <unk>`."""
        return "".join(self.tokens[i] if i or self.kind == "char" else f" {UNKNOWN}" for i in ids)

    def to_json(self) -> str:
        """Return what `tokenizer_from_json` reads."""
        return json.dumps({"kind": self.kind, "tokens": self.tokens}, ensure_ascii=False, indent=0)


class BPETokenizer(Tokenizer):
    """Byte-pair encoding of bytes, by the `tokenizers` library: any text has ids, none is unknown."""

    def __init__(self, bpe):
        self.kind, self.bpe = "bpe", bpe

    @classmethod
    def build(cls, kind: str, text: str, vocab_size: int) -> "BPETokenizer":
        """Learn merges on `text` until there are `vocab_size` tokens."""
        from tokenizers import Tokenizer as BPE
        from tokenizers import decoders, models, pre_tokenizers, trainers

        if vocab_size < 256:
            raise ValueError(f"data: vocab_size is {vocab_size}, bpe needs at least 256, one for each byte")
        bpe = BPE(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, show_progress=False,
                                      initial_alphabet=alphabet)
        bpe.train_from_iterator(text.splitlines(keepends=True), trainer)
        return cls(bpe)

    def __len__(self):
        return self.bpe.get_vocab_size()

    def encode(self, text: str) -> Tensor:
        return torch.tensor(self.bpe.encode(text).ids, dtype=torch.int64)

    def decode(self, ids: list[int]) -> str:
        return self.bpe.decode(ids, skip_special_tokens=False)

    def to_json(self) -> str:
        return json.dumps({"kind": "bpe", "bpe": json.loads(self.bpe.to_str())}, ensure_ascii=False, indent=0)


def _pieces(kind: str, text: str):
    return (match[0] for match in PIECES[kind].finditer(text))


def build_tokenizer(kind: str, text: str, vocab_size: int) -> Tokenizer:
    """Build a "word", "char" or "bpe" vocabulary of at most `vocab_size` tokens on `text`."""
    if kind not in TOKENIZERS:
        raise ValueError(f"data: tokenizer is {kind!r}, expected one of {', '.join(TOKENIZERS)}")
    if vocab_size < 2:
        raise ValueError(f"data: vocab_size is {vocab_size}, expected at least 2")
    return (BPETokenizer if kind == "bpe" else Tokenizer).build(kind, text, vocab_size)


def tokenizer_from_json(text: str) -> Tokenizer:
    """Read what `Tokenizer.to_json` wrote."""
    stored = json.loads(text)
    if stored["kind"] == "bpe":
        from tokenizers import Tokenizer as BPE

        return BPETokenizer(BPE.from_str(json.dumps(stored["bpe"])))
    return Tokenizer(stored["kind"], stored["tokens"])


def tokenize(corpus: Corpus, tokenizer: Tokenizer, seq_len: int) -> Data:
    """Encode the three texts of `corpus`.

    Raises:
        ValueError: a split has too few tokens to train on windows of `seq_len`, or to test on.
    """
    data = Data(tokenizer, *(tokenizer.encode(text) for text in corpus[1:]))
    for split, needed in (("train", seq_len + 1), ("validation", 2), ("test", 2)):
        found = len(getattr(data, split))
        if found < needed:
            raise ValueError(f"data: the {split} split of {corpus.name} has {found} tokens, expected at least {needed} "
                             f"(seq_len {seq_len}): use more text or a smaller seq_len")
    return data
