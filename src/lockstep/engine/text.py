"""Incremental detokenization: whole characters only, and in sum exactly the tokenizer's own decoding."""

from __future__ import annotations

import codecs
import json
import re
from typing import Any

from lockstep.errors import ConfigurationError

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Maximum length of a run of byte tokens to decode before its end; longer ones are garbage, not characters.
_MAX_OPEN_BYTES = 64
# Maximum tokens of an unknown decoder to hold back for the rest of a character, which has at most four bytes.
_MAX_OPEN_TOKENS = 32
_REPLACEMENT = "\ufffd"


class Detokenizer:
    """Creates text streams whose pieces add up to `tokenizer.decode(ids, skip_special_tokens=True)` for any ids.

    * Byte-level (GPT-2's alphabet: Qwen, Llama 3, DeepSeek, GPT-OSS): tokens are bytes, decoded as they arrive.
    * Byte fallback (SentencePiece: Llama 2, Mixtral): `<0xE2>` is a byte, and a run of byte tokens is text only if all
      its bytes are valid UTF-8. So a run is held back until another token ends it.
    * Any other object with that `decode`: a text that ends in U+FFFD is held back, for up to 32 tokens.

    The cost per token is constant, however long the text.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not callable(getattr(tokenizer, "decode", None)):
            raise ConfigurationError(f"a tokenizer must have decode(), got {type(tokenizer).__name__}")
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        decoders = _decoder_types(backend)
        self._is_fast = bool(decoders)
        self._tokenizer = backend if self._is_fast else tokenizer
        self._special_ids = _special_ids(self._tokenizer)
        self._is_byte_level = decoders == ["ByteLevel"]
        self._has_byte_fallback = "ByteFallback" in decoders
        # Whether U+FFFD at the end of a text may become a character with the bytes of the next tokens.
        self.marks_incomplete = not self._has_byte_fallback
        self._bytes: dict[int, bytes] = {}
        self._known: dict[int, tuple[bool, bool]] = {}

    def stream(self) -> ByteLevelStream | WindowStream:
        """Return a stream for one request."""
        return ByteLevelStream(self) if self._is_byte_level else WindowStream(self)

    def traits(self, token_id: int) -> tuple[bool, bool]:
        """Return whether a token has text (special and unknown tokens have none), and whether it is a byte of a run."""
        known = self._known.get(token_id)
        if known is None:
            token = self._tokenizer.id_to_token(token_id) if self._is_fast else ""
            is_byte = self._has_byte_fallback and token is not None and _BYTE_TOKEN.fullmatch(token) is not None
            known = self._known[token_id] = (token is not None and token_id not in self._special_ids, is_byte)
        return known

    def token_bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes that a token adds behind another one, perhaps a part of a character."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._bytes_of(token_id)
        return known

    def _bytes_of(self, token_id: int) -> bytes:
        has_text, is_byte = self.traits(token_id)
        if not has_text:
            return b""
        if not (self._is_byte_level or is_byte):
            alone, twice = self.decode([token_id]), self.decode([token_id, token_id])
            return (twice[len(alone) :] if twice.startswith(alone) else alone).encode()  # with a leading space, if any
        token = self._tokenizer.id_to_token(token_id)
        if is_byte:
            return bytes([int(token[3:5], 16)])
        # A token with characters outside the alphabet, such as an added one, is literal text.
        in_alphabet = all(character in BYTE_OF for character in token)
        return bytes(BYTE_OF[character] for character in token) if in_alphabet else token.encode()

    def decode(self, token_ids: list[int]) -> str:
        """Return the tokenizer's own decoding."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))


class ByteLevelStream:
    """The text of one request whose tokens are bytes."""

    def __init__(self, detokenizer: Detokenizer) -> None:
        self._token_bytes = detokenizer.token_bytes
        # Both this decoder and the tokenizer's replace each maximal invalid part by one U+FFFD.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that no later token can change."""
        return self._decoder.decode(self._token_bytes(token_id))

    def open_text(self) -> str:
        """Return the complete characters that the next token could still change."""
        return ""

    def flush(self) -> str:
        """Return the rest, as if no token followed: an incomplete character becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)


class WindowStream:
    """The text of one request: decodes the tokens since the last piece of text, with that piece's tokens as context.

    Without context, most decoders drop a leading space.
    """

    def __init__(self, detokenizer: Detokenizer) -> None:
        self._detokenizer = detokenizer
        self._context: list[int] = []
        self._context_text = ""
        self._open: list[int] = []

    def push(self, token_id: int) -> str:
        """As `ByteLevelStream.push`."""
        has_text, is_byte = self._detokenizer.traits(token_id)
        if has_text:
            self._open.append(token_id)
        if not has_text or is_byte:
            return ""
        text = self._decode_open()
        if self._detokenizer.marks_incomplete and text.endswith(_REPLACEMENT) and len(self._open) < _MAX_OPEN_TOKENS:
            return ""
        return self._settle(text)

    def open_text(self) -> str:
        """As `ByteLevelStream.open_text`."""
        text = self._decode_open() if 0 < len(self._open) <= _MAX_OPEN_BYTES else ""
        return "" if text.endswith(_REPLACEMENT) else text

    def flush(self) -> str:
        """As `ByteLevelStream.flush`."""
        return self._settle(self._decode_open()) if self._open else ""

    def _decode_open(self) -> str:
        return self._detokenizer.decode(self._context + self._open)[len(self._context_text) :]

    def _settle(self, text: str) -> str:
        if text:
            # Tokens without text are no context, so they stay open.
            self._context, self._open = self._open, []
            self._context_text = self._detokenizer.decode(self._context)
        return text


def _decoder_types(backend: Any) -> list[str]:
    """Return the types of a fast tokenizer's decoding steps, in order; an empty list for other tokenizers."""
    decoder = getattr(backend, "decoder", None)
    if decoder is None or not hasattr(backend, "id_to_token") or not hasattr(decoder, "__getstate__"):
        return []
    try:
        state = json.loads(decoder.__getstate__())
    except Exception:  # a decoder written in Python cannot be described; the tokenizers package raises plain Exception
        return []
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    return [step["type"] for step in steps]


def _special_ids(tokenizer: Any) -> frozenset[int]:
    if hasattr(tokenizer, "get_added_tokens_decoder"):
        return frozenset(token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special)
    return frozenset(getattr(tokenizer, "all_special_ids", ()))


def _alphabet() -> dict[str, int]:
    """Return GPT-2's alphabet: printable bytes map to themselves, the others in order to U+0100 and up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTE_OF = _alphabet()
