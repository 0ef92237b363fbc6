"""Tokenizers: from text to ids and back without losing a byte.

`config.data.tokenizer` is one word: "bytes" (256 bytes and an end), "bpe(4096)" (byte-level byte-pair encoding, trained
on the train split) or the path of a `tokenizer.json` that Hugging Face's `tokenizers` has saved. Whatever a tokenizer
encodes it decodes to the same text; one that would change the text is an error, since bits per byte would then be those
of another text.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np

from tokenlab.core.errors import ConfigError, DataError, suggest

NUM_BYTES = 256
END = "<|endoftext|>"
"""The name of the end of a document in a vocabulary that is trained here."""

END_NAMES = (
    END,
    "<|end_of_text|>",
    "<|eos|>",
    "<eos>",
    "</s>",
    "[EOS]",
    "<|im_end|>",
    "[SEP]",
)
"""Names under which saved tokenizers keep the end of a document; the first that a vocabulary has is taken."""

PAD, CLS, MASK = "<|pad|>", "<|cls|>", "<|mask|>"
"""Names of what rows for an encoder need, in a vocabulary that is trained here."""

SPECIAL_NAMES = {
    "pad": (PAD, "[PAD]", "<pad>"),
    "cls": (CLS, "[CLS]", "<cls>", "<s>"),
    "mask": (MASK, "[MASK]", "<mask>"),
}
"""Names under which saved tokenizers keep them; the first that a vocabulary has is taken."""

WORDS = ("bytes", "bpe(4096)")
CHUNK = 1 << 20
"""Characters that are encoded in one go, or one document."""

_BPE = re.compile(r"bpe\(\s*(\d{1,9})\s*\)")
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

Ids: TypeAlias = Sequence[int] | np.ndarray


class Specials(NamedTuple):
    """Ids that stand for no text, for an encoder.

    Attributes:
      pad: fills rows.
      cls: begins a row.
      sep: ends a document, or one text of a pair: the tokenizer's `end`.
      mask: stands in the place of a hidden token.
    """

    pad: int
    cls: int
    sep: int
    mask: int


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back.

    Attributes:
      name: as `config.data.tokenizer` says it, for messages.
      vocab_size: V; ids are in [0, V).
      end: the id that follows a document; no text encodes to it.
      byte_lengths: int32 [V], how many bytes of text (UTF-8) each id stands for; 0 for special tokens.
      specials: what an encoder needs, or None where the vocabulary does not have all of it.
      fingerprint: two tokenizers with the same one give the same ids.
    """

    name: str
    vocab_size: int
    end: int
    byte_lengths: np.ndarray
    specials: Specials | None
    fingerprint: str

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, int32 [T], without the end.

        Raises:
          DataError: the text is no Unicode (a lone surrogate), or would not come back as it is.
        """
        ...

    def encode_each(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """`encode` of each text in turn, several at a time where that is quicker."""
        ...

    def to_bytes(self, ids: Ids) -> bytes:
        """The bytes that ids [T] stand for; nothing for special tokens. Raises DataError for an id outside [0, V)."""
        ...

    def decode(self, ids: Ids) -> str:
        """The text of ids [T]; what is no UTF-8, such as half a character, becomes U+FFFD. Raises as `to_bytes`."""
        ...


class Decoder:
    """Decodes ids as they come, and never emits half a character.

    All that `push` and `finish` return is, joined, the text of all ids.

    Args:
      tokenizer: that gave the ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Ids) -> str:
        """The characters that are complete with these ids; "" while one is not."""
        return self._decoder.decode(self._tokenizer.to_bytes(ids))

    def finish(self) -> str:
        """U+FFFD where a character was begun and not ended, else ""; the decoder can then begin anew."""
        return self._decoder.decode(b"", final=True)


class ByteTokenizer:
    """A byte of UTF-8 is its own id; 256 is the end of a document. See `Tokenizer`.

    Args:
      encoder: also have the ids 257 for padding, 258 for CLS and 259 for the mask.
    """

    name = "bytes"
    end = NUM_BYTES

    def __init__(self, encoder: bool = False) -> None:
        self.vocab_size = NUM_BYTES + (4 if encoder else 1)
        self.fingerprint = "bytes for an encoder" if encoder else "bytes"
        self.byte_lengths = (np.arange(self.vocab_size) < NUM_BYTES).astype(np.int32)
        self.specials = Specials(NUM_BYTES + 1, NUM_BYTES + 2, self.end, NUM_BYTES + 3) if encoder else None

    def encode(self, text: str) -> np.ndarray:
        """See `Tokenizer.encode`."""
        return np.frombuffer(_utf8(text), np.uint8).astype(np.int32)

    def encode_each(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """See `Tokenizer.encode_each`."""
        return map(self.encode, texts)

    def to_bytes(self, ids: Ids) -> bytes:
        """See `Tokenizer.to_bytes`."""
        ids = checked_ids(ids, self.vocab_size)
        return ids[ids < NUM_BYTES].astype(np.uint8).tobytes()

    def decode(self, ids: Ids) -> str:
        """See `Tokenizer.decode`."""
        return self.to_bytes(ids).decode("utf-8", errors="replace")


class HuggingFaceTokenizer:
    """A tokenizer of Hugging Face's library; see `Tokenizer`.

    Special tokens that stand in a text are ordinary text there. Some tokenizers put a space before a text; it is taken
    off again by `decode`, not by `to_bytes`.

    Args:
      text: what a `tokenizer.json` holds.
      name: for messages.

    Raises:
      DataError: the text is no such file, or has no token for the end of a document.
    """

    def __init__(self, text: str, name: str):
        from tokenizers import Tokenizer as Library

        self.name = name
        try:
            self._library = Library.from_str(text)
        except Exception as error:  # the library raises plain ones
            raise DataError(
                f"tokenizer {name!r}: it is no tokenizer.json as Hugging Face's tokenizers writes it "
                f"({' '.join(str(error).split())})."
            ) from error
        # A file may say how a batch is cut and padded; a text is encoded whole.
        self._library.no_truncation()
        self._library.no_padding()
        self._library.encode_special_tokens = True
        known = self._library.get_vocab(with_added_tokens=True)
        self.end = self._end(known)
        self.vocab_size = max(known.values()) + 1
        named = {
            what: next((known[name] for name in names if name in known), None)
            for what, names in SPECIAL_NAMES.items()
        }
        self.specials = None if None in named.values() else Specials(sep=self.end, **named)
        self._pieces = _pieces(self._library, known, self.vocab_size)
        self._pieces[self.end] = b""
        self.byte_lengths = np.array([len(piece) for piece in self._pieces], np.int32)
        content = json.dumps(json.loads(self._library.to_str()), sort_keys=True)
        self.fingerprint = f"tokenizer:{hashlib.sha256(content.encode()).hexdigest()[:16]}"
        self._adds_space = self._finds_space()

    def __reduce__(self) -> tuple[Any, ...]:
        # The library's own pickle forgets that special tokens are text.
        return HuggingFaceTokenizer, (self._library.to_str(), self.name)

    def _end(self, known: dict[str, int]) -> int:
        for name in END_NAMES:
            if name in known:
                return known[name]
        added = self._library.get_added_tokens_decoder().values()
        special = ", ".join(token.content for token in added if token.special) or "none"
        raise DataError(
            f"tokenizer {self.name!r} has no token for the end of a document; expected one of {', '.join(END_NAMES)}. "
            f"Its special tokens: {special}."
        )

    def _finds_space(self) -> bool:
        """Whether a space is put before a text: seen at the first word of the vocabulary that can be encoded."""
        for piece in self._pieces:
            word = piece.strip()
            if word.isalnum() and word.isascii():
                ids = self._library.encode(word.decode("ascii"), add_special_tokens=False).ids
                found = self.to_bytes(ids)
                if found in (word, b" " + word):
                    return found != word
        return False

    def encode(self, text: str) -> np.ndarray:
        """See `Tokenizer.encode`."""
        return next(self.encode_each([text]))

    def encode_each(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """See `Tokenizer.encode_each`."""
        for chunk in _chunks(texts):
            wanted = [_utf8(text) for text in chunk]
            found = self._library.encode_batch_fast(chunk, add_special_tokens=False)
            for content, encoding in zip(wanted, found, strict=True):
                yield self._kept(content, encoding.ids)

    def _kept(self, content: bytes, ids: list[int]) -> np.ndarray:
        """The ids, when they stand for `content`."""
        if self.end in ids:
            name = self._library.id_to_token(self.end)
            raise DataError(
                f"tokenizer {self.name!r} takes {name!r} in a text for the end of the document; expected a vocabulary "
                "that has it as a special token only, or text without it."
            )
        found = b"".join(map(self._pieces.__getitem__, ids))
        if found not in (content, b" " + content):
            found = found.removeprefix(b" ") if self._adds_space else found
            pairs = zip(found, content, strict=False)
            place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(found), len(content)))
            raise DataError(
                f"tokenizer {self.name!r} does not keep the text: from byte {place} on {_excerpt(content, place)} "
                f"comes back as {_excerpt(found, place)}; expected one that decodes what it encodes, such as "
                "byte-level BPE."
            )
        return np.array(ids, np.int32)

    def to_bytes(self, ids: Ids) -> bytes:
        """See `Tokenizer.to_bytes`."""
        return b"".join(map(self._pieces.__getitem__, checked_ids(ids, self.vocab_size).tolist()))

    def decode(self, ids: Ids) -> str:
        """See `Tokenizer.decode`."""
        text = self.to_bytes(ids).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self._adds_space else text

    def to_json(self) -> str:
        """What the `tokenizer.json` holds that `config.data.tokenizer` can name."""
        return self._library.to_str(pretty=True)

    def save(self, path: str | Path) -> None:
        """Write that file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")


def build(word: str, texts: Iterable[str], *, encoder: bool = False) -> Tokenizer:
    """The tokenizer that `config.data.tokenizer` names.

    Args:
      word: "bytes", "bpe(V)" or a path.
      texts: of the train split; read only to train "bpe(V)".
      encoder: with `Specials`.

    Raises:
      ConfigError: V is too small.
      DataError: there is no such file, it cannot be used or lacks special tokens, or the texts do not have V tokens.
    """
    if word == "bytes":
        return ByteTokenizer(encoder)
    if found := _BPE.fullmatch(word.strip()):
        return train_bpe(texts, int(found[1]), encoder=encoder)
    loaded = load(word)
    if encoder and loaded.specials is None:
        wanted = "; ".join(f"{what}: {' or '.join(names)}" for what, names in SPECIAL_NAMES.items())
        raise DataError(
            f"tokenizer {word!r} cannot serve an encoder: it lacks a token for padding, for the beginning of a row or "
            f"for what is hidden; expected one of each ({wanted}). 'bytes' and 'bpe(4096)' are made with them."
        )
    return loaded


def trained_size(word: str) -> int | None:
    """V where `config.data.tokenizer` names a tokenizer of V ids that is yet to be trained, "bpe(V)"; else None."""
    found = _BPE.fullmatch(word.strip())
    return int(found[1]) if found else None


def load(path: str) -> HuggingFaceTokenizer:
    """The tokenizer in a file `tokenizer.json`.

    Raises:
      DataError: there is no such file, or it cannot be used.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        near = suggest(path, WORDS)
        raise DataError(
            f"config.data.tokenizer is {path!r}, and there is no such file; expected 'bytes', 'bpe(4096)' or the path "
            f"of a tokenizer.json.{near if 'mean' in near else ''}"
        )
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"tokenizer {str(file)!r} cannot be read: {error}.") from error
    return HuggingFaceTokenizer(text, path)


def train_bpe(texts: Iterable[str], vocab_size: int, *, encoder: bool = False) -> HuggingFaceTokenizer:
    """Byte-level byte-pair encoding, trained on texts: the same texts give the same vocabulary.

    Texts are cut into words as GPT-2's are. A pair that occurs once is not merged.

    Args:
      texts: to train on.
      vocab_size: V, the 256 bytes and the special tokens included.
      encoder: with `Specials`; else the only special token is the end of a document.

    Raises:
      ConfigError: V is below 257, or 260 for an encoder.
      DataError: the texts have fewer than V tokens.

    Source: Sennrich et al., "Neural machine translation of rare words with subword units", ACL 2016; Radford et al.,
      "Language models are unsupervised multitask learners", 2019 (bytes, and how words are cut).
    """
    special = [END, PAD, CLS, MASK] if encoder else [END]
    if vocab_size < NUM_BYTES + len(special):
        what = "padding, CLS, the mask and the end" if encoder else "the end"
        raise ConfigError(
            f"config.data.tokenizer is 'bpe({vocab_size})'; expected at least bpe({NUM_BYTES + len(special)}): every "
            f"byte and {what} of a document have a token."
        )
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(map(_checked_text, texts), trainer)
    size = library.get_vocab_size()
    if size < vocab_size:
        raise DataError(
            f"config.data.tokenizer is 'bpe({vocab_size})', and the train split has only {size} tokens whose parts "
            f"occur together twice; expected at most bpe({size}), or more text."
        )
    return HuggingFaceTokenizer(library.to_str(), f"bpe({vocab_size})")


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text) + 1
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"a text is no Unicode: character {error.start} is the lone surrogate {text[error.start]!r}; mend the text."
        ) from None


def _checked_text(text: str) -> str:
    _utf8(text)
    return text


def checked_ids(ids: Ids, vocab_size: int) -> np.ndarray:
    """The ids as int64 [T]. Raises DataError for one outside [0, V)."""
    ids = np.asarray(ids, np.int64).reshape(-1)
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.size:
        raise DataError(f"id {int(outside[0])} is no token; expected 0 to {vocab_size - 1}.")
    return ids


def _excerpt(content: bytes, place: int) -> str:
    return repr(content[place : place + 12].decode("utf-8", errors="replace"))


def _pieces(library: Any, known: dict[str, int], vocab_size: int) -> list[bytes]:
    """The bytes that each id stands for in the middle of a text; none for special tokens and for ids without one."""
    pieces = [b""] * vocab_size
    kinds = _kinds(json.loads(library.to_str())["decoder"])
    added = library.get_added_tokens_decoder()
    plain = {name: place for name, place in known.items() if place not in added}
    if "ByteLevel" in kinds:
        table = _byte_characters()
        for name, place in plain.items():
            pieces[place] = b"".join(table.get(character, character.encode()) for character in name)
    else:
        names, places = list(plain), list(plain.values())
        # What a token adds to a text that has begun: some decoders take a space off a text's beginning.
        anchor = next((place for name, place in plain.items() if name.strip("\u2581#").isalpha()), None)
        if anchor is not None:
            before = len(library.decode([anchor], skip_special_tokens=False))
            texts = library.decode_batch([[anchor, place] for place in places], skip_special_tokens=False)
            for name, place, text in zip(names, places, texts, strict=True):
                byte = _BYTE.fullmatch(name) if "ByteFallback" in kinds else None
                pieces[place] = bytes.fromhex(byte[1]) if byte else text[before:].encode()
    for place, token in added.items():
        pieces[place] = b"" if token.special else token.content.encode()
    return pieces


def _kinds(decoder: dict[str, Any] | None) -> set[str]:
    """The names of the steps of a decoder in a tokenizer.json."""
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*map(_kinds, decoder.get("decoders", ())))


def _byte_characters() -> dict[str, bytes]:
    """The characters under which byte-level vocabularies write the 256 bytes.

    Printable ones stand for themselves, the others for 256, 257, ... in their order.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(NUM_BYTES) if byte not in set(printable)]
    table = {chr(byte): bytes([byte]) for byte in printable}
    return table | {chr(NUM_BYTES + i): bytes([byte]) for i, byte in enumerate(others)}
