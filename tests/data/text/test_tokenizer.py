from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from tokenlab.core.errors import ConfigError, DataError
from tokenlab.data.text import ByteTokenizer, Decoder, HuggingFaceTokenizer, Tokenizer, tokenizer

ROOT = Path(__file__).resolve().parents[3]
TEXT = "the cat and the other cat sat, then the dog sat; " * 3 + "naïve café, 고양이 고양이 🐈 🐈\n\n"
ODD = ["", "a", "\x00\n\t  ", "고양이 🐈‍⬛", "<|endoftext|>", "the <|endoftext|> </s> cat", "ÿĀ", TEXT]


@pytest.fixture(scope="module")
def bpe() -> HuggingFaceTokenizer:
    return tokenizer.train_bpe([TEXT], 280)


def saved(library: Library, path: Path) -> str:
    library.save(str(path))
    return str(path)


def metaspace(special: str = "</s>", added_to_text: bool = True, score: float = -99.0) -> Library:
    """A vocabulary as SentencePiece writes it: marks for spaces, one before a text too, and bytes to fall back on."""
    bytes_ = [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    pieces = [("<unk>", 0.0), (special, score), *bytes_, ("\u2581", -4.0), ("\u2581the", -1.0), ("cat", -1.0)]
    pieces += [(letter, -3.0) for letter in "</s>"]
    library = Library(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if added_to_text else "never")
    library.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    library.add_special_tokens([special])
    return library


class TestEvery:
    """What holds for bytes, for a trained vocabulary, and for saved ones."""

    @pytest.fixture(params=["bytes", "bpe", "file"])
    def each(self, request: pytest.FixtureRequest, bpe: HuggingFaceTokenizer, tmp_path: Path) -> Tokenizer:
        if request.param == "bytes":
            return ByteTokenizer()
        if request.param == "file":
            return tokenizer.load(saved(metaspace(), tmp_path / "tokenizer.json"))
        return bpe

    def test_is_a_tokenizer(self, each: Tokenizer) -> None:
        assert isinstance(each, Tokenizer)
        assert 0 <= each.end < each.vocab_size
        assert each.byte_lengths.shape == (each.vocab_size,) and each.byte_lengths.dtype == np.int32
        assert each.byte_lengths[each.end] == 0 and each.decode([each.end]) == ""

    @pytest.mark.parametrize("text", ODD)
    def test_texts_come_back(self, each: Tokenizer, text: str) -> None:
        ids = each.encode(text)
        assert ids.dtype == np.int32 and ids.ndim == 1
        assert each.decode(ids) == text
        assert each.end not in ids

    def test_one_by_one_or_together(self, each: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tokenizer, "CHUNK", 3)
        together = list(each.encode_each(ODD))
        assert len(together) == len(ODD)
        for text, ids in zip(ODD, together, strict=True):
            np.testing.assert_array_equal(ids, each.encode(text))

    def test_ids_outside_are_named(self, each: Tokenizer) -> None:
        for wrong in (-1, each.vocab_size):
            with pytest.raises(
                DataError, match=f"id {wrong} is no token; expected 0 to {each.vocab_size - 1}"
            ):
                each.decode([0, wrong])

    def test_a_lone_surrogate_is_no_text(self, each: Tokenizer) -> None:
        with pytest.raises(DataError, match="character 2 is the lone surrogate"):
            each.encode("ab\ud800")

    def test_a_worker_has_the_same(self, each: Tokenizer) -> None:
        copy = pickle.loads(pickle.dumps(each))
        assert copy.fingerprint == each.fingerprint
        for text in ODD:
            np.testing.assert_array_equal(copy.encode(text), each.encode(text))

    def test_the_decoder_gives_no_half_character(self, each: Tokenizer) -> None:
        ids = each.encode("🐈 고a")
        assert len(ids) > 4
        decoder = Decoder(each)
        pushed = [decoder.push([one]) for one in ids.tolist()]
        assert "\ufffd" not in "".join(pushed)
        assert "".join(pushed).removeprefix(" ") == "🐈 고a"
        assert "" in pushed  # a character of several bytes was waited for
        assert decoder.finish() == ""

    def test_the_decoder_tells_a_character_that_was_not_ended(self, each: Tokenizer) -> None:
        decoder = Decoder(each)
        ids = each.encode("🐈")
        assert decoder.push(ids[:-1]).strip() == ""
        assert decoder.finish() == "\ufffd"
        assert decoder.push(each.encode("cat")).strip() == "cat"  # and begins anew

    def test_bytes_that_are_no_text_are_replaced(self, each: Tokenizer) -> None:
        ids = each.encode("é")
        assert each.decode(ids[:-1]).strip() == "\ufffd"


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_any_text_comes_back_and_its_bytes_are_counted(text: str) -> None:
    for each in (ByteTokenizer(), _trained()):
        ids = each.encode(text)
        assert each.decode(ids) == text
        assert each.byte_lengths[ids].sum() == len(text.encode())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 256)), st.integers(1, 4))
def test_what_the_decoder_says_is_what_decode_says(ids: list[int], step: int) -> None:
    decoder = Decoder(ByteTokenizer())
    pushed = [decoder.push(ids[start : start + step]) for start in range(0, len(ids), step)]
    assert "".join(pushed) + decoder.finish() == ByteTokenizer().decode(ids)


_made: list[Tokenizer] = []


def _trained() -> Tokenizer:
    if not _made:
        _made.append(tokenizer.train_bpe([TEXT], 280))
    return _made[0]


class TestBytes:
    def test_ids_are_bytes(self) -> None:
        each = ByteTokenizer()
        assert each.encode("aé").tolist() == [97, 0xC3, 0xA9]
        assert (each.vocab_size, each.end) == (257, 256)
        assert each.byte_lengths.tolist() == [1] * 256 + [0]


class TestBpe:
    def test_it_has_as_many_tokens_as_asked_for_and_joins_what_is_frequent(
        self, bpe: HuggingFaceTokenizer
    ) -> None:
        assert bpe.vocab_size == 280
        assert len(bpe.encode("the cat")) < len("the cat") // 2
        assert bpe.byte_lengths[bpe.encode(" cat")].tolist() == [4]

    def test_training_again_gives_the_same(self, bpe: HuggingFaceTokenizer) -> None:
        code = (
            "import sys; from tokenlab.data.text import tokenizer; "
            "print(tokenizer.train_bpe([sys.stdin.read()], 280).fingerprint)"
        )
        seen = {bpe.fingerprint, tokenizer.train_bpe([TEXT], 280).fingerprint}
        env = {**os.environ, "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=TEXT,
            env=env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert seen == {done.stdout.strip()}

    def test_another_text_or_size_is_another_tokenizer(self, bpe: HuggingFaceTokenizer) -> None:
        assert tokenizer.train_bpe([TEXT], 279).fingerprint != bpe.fingerprint
        assert tokenizer.train_bpe(["x y x y z w z w " * 3 + TEXT], 280).fingerprint != bpe.fingerprint

    def test_it_is_saved_and_read(self, bpe: HuggingFaceTokenizer, tmp_path: Path) -> None:
        bpe.save(tmp_path / "tokenizer.json")
        read = tokenizer.build(str(tmp_path / "tokenizer.json"), ())
        assert read.fingerprint == bpe.fingerprint and read.end == bpe.end
        np.testing.assert_array_equal(read.encode(TEXT), bpe.encode(TEXT))

    @pytest.mark.parametrize("size", [0, 10, 256])
    def test_too_few_tokens(self, size: int) -> None:
        with pytest.raises(ConfigError, match=rf"'bpe\({size}\)'; expected at least bpe\(257\)"):
            tokenizer.build(f"bpe({size})", [TEXT])

    def test_the_least_is_bytes_and_an_end(self) -> None:
        each = tokenizer.build("bpe(257)", [TEXT])
        assert len(each.encode(TEXT)) == len(TEXT.encode())

    def test_too_little_text(self) -> None:
        with pytest.raises(
            DataError, match=r"'bpe\(4096\)', and the train split has only 259 tokens .* at most bpe\(259\)"
        ):
            tokenizer.build("bpe(4096)", ["aba aba", "c"])
        assert tokenizer.build("bpe(259)", ["aba aba", "c"]).vocab_size == 259


class TestFiles:
    def test_an_end_that_stands_in_the_text_is_told(self, tmp_path: Path) -> None:
        each = tokenizer.load(saved(metaspace(score=0.0), tmp_path / "t.json"))
        with pytest.raises(DataError, match="takes '</s>' in a text for the end of the document"):
            each.encode("the </s> cat")

    def test_a_mark_that_stands_in_the_text_is_told(self, tmp_path: Path) -> None:
        each = tokenizer.load(saved(metaspace(), tmp_path / "t.json"))
        with pytest.raises(
            DataError, match="does not keep the text: from byte 0 on '\u2581x' comes back as 'x'"
        ):
            each.encode("\u2581x")

    def test_a_word_that_is_no_file(self) -> None:
        with pytest.raises(DataError, match="is 'byte', and there is no such file; .* Did you mean 'bytes'?"):
            tokenizer.build("byte", ())
        with pytest.raises(
            DataError, match=r"is 'bpe\(x\)', and there is no such file; expected 'bytes', 'bpe\(4096\)'"
        ):
            tokenizer.build("bpe(x)", ())
        with pytest.raises(DataError, match="'no/tokenizer.json', and there is no such file"):
            tokenizer.build("no/tokenizer.json", ())

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {"type": "what"}}'])
    def test_a_broken_file(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "t.json").write_text(content)
        with pytest.raises(
            DataError, match=r"t\.json': it is no tokenizer\.json as Hugging Face's tokenizers writes"
        ):
            tokenizer.load(str(tmp_path / "t.json"))

    def test_a_file_that_is_no_text(self, tmp_path: Path) -> None:
        (tmp_path / "t.json").write_bytes(b"\xff\xfe")
        with pytest.raises(DataError, match="cannot be read: .*utf-8"):
            tokenizer.load(str(tmp_path / "t.json"))

    @pytest.mark.parametrize("name", tokenizer.END_NAMES)
    def test_the_end_is_found_by_name(self, tmp_path: Path, name: str) -> None:
        each = tokenizer.load(saved(metaspace(name), tmp_path / "t.json"))
        assert each.end == 1

    def test_no_end_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(
            DataError, match=r"no token for the end of a document; .*\[SEP\]\. .* tokens: <stop>\.$"
        ):
            tokenizer.load(saved(metaspace("<stop>"), tmp_path / "t.json"))

    def test_bytes_of_ids_that_begin_with_a_space(self, tmp_path: Path) -> None:
        each = tokenizer.load(saved(metaspace(), tmp_path / "t.json"))
        ids = each.encode("the cat")
        assert each.to_bytes(ids) == b" the cat" and each.decode(ids) == "the cat"
        assert each.byte_lengths[ids].tolist() == [4, 1, 3]

    def test_without_a_space_before_a_text(self, tmp_path: Path) -> None:
        each = tokenizer.load(saved(metaspace(added_to_text=False), tmp_path / "t.json"))
        for text in (" the", "the", "  x"):
            assert each.decode(each.encode(text)) == text

    def test_truncation_and_padding_that_are_saved_are_not_done(
        self, tmp_path: Path, bpe: HuggingFaceTokenizer
    ) -> None:
        bpe.save(tmp_path / "plain.json")
        library = Library.from_file(str(tmp_path / "plain.json"))
        library.enable_truncation(4)
        library.enable_padding(length=64, pad_id=bpe.end)
        library.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bpe.end)]
        )
        each = tokenizer.load(saved(library, tmp_path / "t.json"))
        for text in (TEXT, "cat"):
            np.testing.assert_array_equal(each.encode(text), bpe.encode(text))

    def test_a_tokenizer_that_changes_the_text_is_refused(
        self, tmp_path: Path, bpe: HuggingFaceTokenizer
    ) -> None:
        bpe.save(tmp_path / "plain.json")
        library = Library.from_file(str(tmp_path / "plain.json"))
        library.normalizer = normalizers.Lowercase()
        each = tokenizer.load(saved(library, tmp_path / "t.json"))
        assert each.decode(each.encode("the cat")) == "the cat"
        with pytest.raises(
            DataError, match="does not keep the text: from byte 4 on 'Cat' comes back as 'cat'"
        ):
            each.encode("the Cat")

    def test_a_tokenizer_that_drops_what_it_does_not_know_is_refused(self, tmp_path: Path) -> None:
        words = {"[UNK]": 0, "[SEP]": 1, "the": 2, "cat": 3, "##s": 4}
        library = Library(models.WordPiece(words, unk_token="[UNK]"))
        library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        library.decoder = decoders.WordPiece()
        library.add_special_tokens(["[UNK]", "[SEP]"])
        each = tokenizer.load(saved(library, tmp_path / "t.json"))
        assert each.decode(each.encode("the cats")) == "the cats"
        assert each.byte_lengths.tolist() == [0, 0, 4, 4, 1]
        with pytest.raises(DataError, match="does not keep the text"):
            each.encode("the dog")

    def test_ids_without_a_token(self, tmp_path: Path) -> None:
        library = Library(models.BPE(vocab={"a": 0, "b": 7, "<eos>": 9}, merges=[]))
        library.decoder = decoders.Fuse()
        library.add_special_tokens(["<eos>"])
        each = tokenizer.load(saved(library, tmp_path / "t.json"))
        assert (each.vocab_size, each.end) == (10, 9)
        assert each.decode([0, 5, 7, 9]) == "ab"
