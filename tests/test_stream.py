import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llava_app.engine.stream import TextStream
from tests.fixtures_model import byte_tokenizer

BYTES = byte_tokenizer()


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Decodes as Llama's: `▁` for a space, a byte token for what has no piece, the first space of a text dropped."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "a", "▁joke", "日", "."]
    tokenizer = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[]))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


LLAMA = sentencepiece_tokenizer()


def pieces(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [stream.push(token) for token in tokens] + [stream.flush()]


def decoded(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def byte_tokens(text: str) -> list[int]:
    return BYTES(text, add_special_tokens=False)["input_ids"]


@given(st.lists(st.integers(0, len(BYTES) - 1), max_size=80))
def test_joined_pieces_are_the_tokenizers_decoding_of_any_tokens(tokens: list[int]) -> None:
    assert "".join(pieces(BYTES, tokens)) == decoded(BYTES, tokens)


@given(st.text(max_size=80))
def test_joined_pieces_are_any_text(text: str) -> None:
    tokens = BYTES(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert "".join(pieces(BYTES, tokens)) == text


@given(st.text(min_size=1, max_size=40))
def test_every_character_is_handed_out_with_its_last_byte(text: str) -> None:
    stream = TextStream(BYTES)
    tokens = BYTES(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    shown = ""
    for count, token in enumerate(tokens, start=1):
        shown += stream.push(token)
        complete = text.encode()[:count].decode(errors="ignore")
        assert shown.rstrip("\ufffd") == complete.rstrip("\ufffd")


@given(st.lists(st.sampled_from(["▁", "▁a", "a", "▁joke", "日", ".", "</s>", "ü", "🙂"]), max_size=60))
def test_joined_pieces_are_the_decoding_of_a_sentencepiece_tokenizer(parts: list[str]) -> None:
    tokens = []
    for part in parts:
        known = LLAMA.convert_tokens_to_ids(part)
        spelled = [LLAMA.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in part.encode()]
        tokens += spelled if known == LLAMA.unk_token_id else [known]
    assert "".join(pieces(LLAMA, tokens)) == decoded(LLAMA, tokens)


@pytest.mark.parametrize("text", ["日本語", "🙂", "naïve", "  indented", "line\n\n  next "])
def test_no_piece_holds_half_a_character(text: str) -> None:
    assert all("\ufffd" not in piece for piece in pieces(BYTES, byte_tokens(text)))


def test_broken_bytes_do_not_hold_the_text_after_them_back() -> None:
    stream = TextStream(BYTES)
    lone_lead_byte = byte_tokens("é")[0]
    assert stream.push(lone_lead_byte) == ""
    assert stream.push(byte_tokens("a")[0]) == "\ufffda"


def test_the_window_stays_short() -> None:
    stream = TextStream(BYTES)
    for token in byte_tokens("a long answer " * 50):
        stream.push(token)
    assert len(stream._window) <= 16
