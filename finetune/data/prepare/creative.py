"""The creative data set: Jane Austen's novels and Conan Doyle's stories, cut into passages and continuations.

A chapter is cut into sentences by a plain pattern ("Mr." ends one too), and these are taken in turn: at least
`PASSAGE_WORDS` words to continue, then at least `CONTINUATION_WORDS` that do. The rest at a chapter's end becomes a
record if its continuation has `LEAST_WORDS`. Validation and test records are the last chapters or stories of each
work.
"""

from __future__ import annotations

import bz2
import json
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from xml.etree import ElementTree

from finetune.data.prepare.upstream import Upstream
from finetune.errors import InputError

_NOVELS = "janeaustenr/data/"
_BOOK = "arthur-conan-doyle_the-adventures-of-sherlock-holmes"
_STORIES = f"{_BOOK}/src/epub/text/"
_NOVEL_SUMS = {
    "emma": "65594dab7e37779e5b36c8551886d35cef2149fb442793e49b9879a4287f33f2",
    "mansfieldpark": "c5903def1e79b8494097f9bc5c52d0fb173084450432c10dfd9647c0d3bd3e2d",
    "northangerabbey": "d4b8163fba67575e3125f532752baf7d86bf25dbf975aa596b92d3868cab9519",
    "persuasion": "758a227662b5f94785199b5c80a3d23533b397d476ddc43289181fb556d945a0",
    "prideprejudice": "9704d3d55b0e59f3e9f6d6032d192200f925ec7b2ba4f1dba402f179578ae3c9",
    "sensesensibility": "0fef9c0d7598e30a0c09e866e3db4117b4a47d31cbc28cc8783eb4abdad03593",
}
_STORY_SUMS = {
    "a-scandal-in-bohemia": "04db259cfb78b8540fd9ee772440b6c461b41e59954420784e667ef6f35cbbc1",
    "the-redheaded-league": "151fd4a83cedcc63a314313b6fe80e508c0c2545c4cba15b8df0f5557d8ec314",
    "a-case-of-identity": "3da1ec6203aca159c3a8594a73af4c595b5c799bfc675b5d112b8d79aace5cce",
    "the-boscombe-valley-mystery": "2d1800b7e363ddff8ad0cd13ea13b0b147169df50c250f5a8331bc2ac21915e3",
    "the-five-orange-pips": "ce329574bf5ccca4f3c9d2122a6f6e29fd1954465fccb07758fa6342d27f2f78",
    "the-man-with-the-twisted-lip": "cb7303ac79383f388498a35a84ba56f337fb0ec38feb173ae485ab2e4782c55a",
    "the-adventure-of-the-blue-carbuncle": "a8550337d012c09ad3f67237aa82165f2a6e9e4646d6cba4c0eeebed33259201",
    "the-adventure-of-the-speckled-band": "b59209c14d19744934312bdb7851a6dc977f31989081b54c790fa9cbaf6596f8",
    "the-adventure-of-the-engineers-thumb": "4d2a68e779f6983d33bdfa67ddaf75fa459928a813f3506129042bf8c69e2355",
    "the-adventure-of-the-noble-bachelor": "e7db620ad401a21f029a09835c4036144ec22fdd0e6d8689d36b3e2ea7d15978",
    "the-adventure-of-the-beryl-coronet": "2feb687fbd2faa6bb9d462a5d874a8b82ead2cc01eb6fd19e547d5d490007f21",
    "the-adventure-of-the-copper-beeches": "025f64c955c9afefd8f9eae792e42bc88a8cf45440c2fbc0322d190ce9f53367",
}
FICTION = Upstream(
    name="creative/fiction_continuation.jsonl.gz",
    sha256="5e4b64b8e7bc8fb036660a3be7029fee05085e57c51e212b9fde0ae66d6c7782",
    files={f"{_NOVELS}{name}.rda": digest for name, digest in _NOVEL_SUMS.items()}
    | {f"{_STORIES}{name}.xhtml": digest for name, digest in _STORY_SUMS.items()},
    addresses={
        "janeaustenr/": "https://raw.githubusercontent.com/juliasilge/janeaustenr/"
        "2b8d5936ca112bb0b3dfc9ebd97c64c345c09fcf",
        f"{_BOOK}/": f"https://raw.githubusercontent.com/standardebooks/{_BOOK}/"
        "23b2b6e0aa1350aaccaac91e1d0fe3bb6ed4c81f",
    },
    bring=f"git clone https://github.com/juliasilge/janeaustenr; git clone https://github.com/standardebooks/{_BOOK}",
    terms="Public-domain texts; Standard Ebooks dedicates its edition with CC0 1.0.",
)
PASSAGE_WORDS, CONTINUATION_WORDS, LEAST_WORDS = 110, 180, 120

# File: title, number of the first validation chapter and of the first test chapter.
_AUSTEN = {
    "emma": ("Emma", 48, 50),
    "mansfieldpark": ("Mansfield Park", 42, 44),
    "northangerabbey": ("Northanger Abbey", 27, 29),
    "persuasion": ("Persuasion", 21, 23),
    "prideprejudice": ("Pride and Prejudice", 53, 56),
    "sensesensibility": ("Sense and Sensibility", 43, 46),
}
_FIRST_VALIDATION_STORY, _FIRST_TEST_STORY = 10, 11
_CHAPTER = re.compile(r"chapter\b", re.IGNORECASE)
_SENTENCE_END = re.compile('(?<=[.!?]["”’\'])\\s+|(?<=[.!?])\\s+(?=["“A-Z])')
_WORD_JOINER = "\u2060"
_XHTML = "{http://www.w3.org/1999/xhtml}"


def fiction_records(files: dict[str, bytes]) -> bytes:
    """Convert novels and stories to records of this toolkit.

    Args:
        files: of `FICTION`.

    Returns:
        JSON lines, UTF-8: novels by file name, then the stories in the book's order.
    """
    numbers = count()
    lines: list[str] = []
    for file, (title, validation, test) in _AUSTEN.items():
        novel = read_r_strings(files[f"{_NOVELS}{file}.rda"])
        for number, paragraphs in enumerate(_chapters(novel), 1):
            origin = ("Jane Austen", title, f"chapter {number}", "r-cran-janeaustenr (Debian; public-domain text)")
            lines += _records(paragraphs, _split(number, validation, test), origin, numbers)
    stories = [content for path, content in files.items() if path.startswith(_STORIES)]
    for number, content in enumerate(stories, 1):
        name, paragraphs = _story(content)
        origin = ("Arthur Conan Doyle", "The Adventures of Sherlock Holmes", name,
                 "Standard Ebooks (CC0; US public-domain text)")  # fmt: skip
        lines += _records(paragraphs, _split(number, _FIRST_VALIDATION_STORY, _FIRST_TEST_STORY), origin, numbers)
    return "".join(lines).encode()


def passages(paragraphs: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield a chapter's passages and their continuations.

    Sentences of one paragraph are joined by a space, others by a line break.
    """
    sentences = [
        (sentence, place == 0)
        for paragraph in paragraphs
        for place, sentence in enumerate(_SENTENCE_END.split(paragraph))
    ]
    position = 0

    def take(least: int) -> tuple[str, int]:
        nonlocal position
        text, words = "", 0
        while position < len(sentences) and words < least:
            sentence, begins = sentences[position]
            text += ("\n" if begins else " ") * bool(text) + sentence
            words += len(sentence.split())
            position += 1
        return text, words

    while position < len(sentences):
        (passage, first), (continuation, second) = take(PASSAGE_WORDS), take(CONTINUATION_WORDS)
        if first >= PASSAGE_WORDS and second >= LEAST_WORDS:
            yield passage, continuation


def read_r_strings(content: bytes) -> list[str]:
    """Read an R data file (`.rda`, bzip2) with one character vector and nothing else; "" for a missing string.

    Raises:
        InputError: it contains something else.

    Source: R Internals, section 1.8, "Serialization Formats"; XDR, versions 2 and 3.
    """
    plain = bz2.decompress(content)
    position = 7

    def integer() -> int:
        nonlocal position
        position += 4
        return int(struct.unpack_from(">i", plain, position - 4)[0])

    def string() -> bytes:
        nonlocal position
        length = integer()
        position += max(length, 0)
        return plain[position - length : position] if length > 0 else b""

    def must_be(kind: int) -> None:
        if (found := integer() & 0xFF) != kind:
            raise InputError(f"an R data file with one vector of strings was expected: kind {found}, not {kind}")

    if plain[:4] not in (b"RDX2", b"RDX3") or plain[5:7] != b"X\n":
        raise InputError(f"not an R data file in binary form: it begins with {plain[:7]!r}")
    version = integer()
    position += 8  # versions of R
    if version == 3:
        string()  # native encoding
    must_be(2)  # a list of names and values
    must_be(1)
    must_be(9)
    string()  # the name
    must_be(16)
    strings = []
    for _ in range(integer()):
        must_be(9)
        strings.append(string().decode("utf-8"))
    return strings


def _chapters(lines: Sequence[str]) -> list[list[str]]:
    """Paragraphs of each chapter; lines before the first heading are no chapter."""
    found: list[list[str]] = []
    open_paragraph = False
    for line in (" ".join(line.split()) for line in lines):
        if _CHAPTER.match(line):
            found.append([])
            open_paragraph = False
        elif not found or not line:
            open_paragraph = False
        elif open_paragraph:
            found[-1][-1] += f" {line}"
        else:
            found[-1].append(line)
            open_paragraph = True
    return found


def _story(content: bytes) -> tuple[str, list[str]]:
    """Title and paragraphs of a chapter file of an electronic book."""
    page = ElementTree.fromstring(content)
    texts = ("".join(part.itertext()).replace(_WORD_JOINER, "") for part in page.iter(f"{_XHTML}p"))
    return page.findtext(f".//{_XHTML}title", ""), [" ".join(text.split()) for text in texts]


def _split(number: int, validation: int, test: int) -> str:
    return "train" if number < validation else "val" if number < test else "test"


def _records(
    paragraphs: Sequence[str], split: str, origin: tuple[str, str, str, str], numbers: Iterator[int]
) -> Iterator[str]:
    author, work, chapter, source = origin
    for passage, continuation in passages(paragraphs):
        record = {
            "id": f"fic-{next(numbers):05d}",
            "domain": "creative",
            "task": "continuation",
            "split": split,
            "messages": [
                {"role": "system", "content": f"You are a novelist writing in the style of {author}."},
                {"role": "user", "content": f"Continue this passage:\n\n{passage}"},
                {"role": "assistant", "content": continuation},
            ],
            "author": author,
            "work": work,
            "chapter": chapter,
            "source": source,
        }
        yield json.dumps(record, ensure_ascii=False) + "\n"
