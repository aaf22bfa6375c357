"""Token ids become text, token by token: no character in pieces, the whole equal to the tokenizer's own decoding."""

from __future__ import annotations

import codecs
import json
import re
from typing import Any

from lockstep.errors import ConfigurationError

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# A run of byte tokens is looked at before it has ended up to this length; longer ones are garbage, not characters.
_MAX_OPEN_BYTES = 64
# How many tokens of an unknown decoder may wait for the rest of a character, which has at most four bytes.
_MAX_OPEN_TOKENS = 32
_REPLACEMENT = "\ufffd"


class Detokenizer:
    """Makes text streams whose pieces together are `tokenizer.decode(ids, skip_special_tokens=True)`, whatever the ids.

    * Byte-level (GPT-2's alphabet: Qwen, Llama 3, DeepSeek, GPT-OSS): tokens are bytes, decoded as they come.
    * With byte fallback (SentencePiece's: Llama 2, Mixtral): `<0xE2>` is a byte, and a run of byte tokens is text only
      if all its bytes are valid UTF-8. So a run is held back until a token that is no byte ends it.
    * Any other object with that `decode`: a text that ends in U+FFFD is held back, for up to 32 tokens.

    Each token costs the same, however long the text is.
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
        # Whether U+FFFD at the end of a text may be a character whose other bytes come with the next tokens.
        self.marks_incomplete = not self._has_byte_fallback
        self._bytes: dict[int, bytes] = {}
        self._known: dict[int, tuple[bool, bool]] = {}

    def stream(self) -> ByteLevelStream | WindowStream:
        """Return a stream for one request."""
        return ByteLevelStream(self) if self._is_byte_level else WindowStream(self)

    def traits(self, token_id: int) -> tuple[bool, bool]:
        """Return whether a token has text (special and unknown ones have none), and whether it is a byte of a run."""
        known = self._known.get(token_id)
        if known is None:
            token = self._tokenizer.id_to_token(token_id) if self._is_fast else ""
            is_byte = self._has_byte_fallback and token is not None and _BYTE_TOKEN.fullmatch(token) is not None
            known = self._known[token_id] = (token is not None and token_id not in self._special_ids, is_byte)
        return known

    def token_bytes(self, token_id: int) -> bytes:
        """Return what a token of a byte-level tokenizer adds to a text, a part of a character perhaps, in UTF-8."""
        known = self._bytes.get(token_id)
        if known is None:
            token = self._tokenizer.id_to_token(token_id) if self.traits(token_id)[0] else ""
            # A token with characters beyond the alphabet, such as an added one, stands for itself.
            in_alphabet = all(character in BYTE_OF for character in token)
            known = bytes(BYTE_OF[character] for character in token) if in_alphabet else token.encode()
            self._bytes[token_id] = known
        return known

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
        """Take the next token; return the text that no later token can change any more."""
        return self._decoder.decode(self._token_bytes(token_id))

    def open_text(self) -> str:
        """Return the complete characters that the next token could still change."""
        return ""

    def flush(self) -> str:
        """Return the rest, as if no token followed: a character that is still in pieces becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)


class WindowStream:
    """The text of one request by the tokenizer's own decoding of the tokens since the last piece of text.

    That piece's tokens are their context: at the start of a text, most decoders drop a space.
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
            # Without text there is nothing to tell the middle from the start by: the tokens stay open.
            self._context, self._open = self._open, []
            self._context_text = self._detokenizer.decode(self._context)
        return text


def _decoder_types(backend: Any) -> list[str]:
    """Return the types of a fast tokenizer's decoding steps, in order; none for other tokenizers."""
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
    """Return GPT-2's alphabet: printable bytes are themselves, the other bytes follow from U+0100 on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTE_OF = _alphabet()
