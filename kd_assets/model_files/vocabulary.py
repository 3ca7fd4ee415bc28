"""Which token ids a tokenizer has, and how each is spelled, by its files alone.

Anyone may import it; standard library only, so that the service node tells what a student's vocabulary is without the
libraries of tokenizers. Which file decides is as in `sources.tokenizer_proof`, which proves that these files are what
jobs tokenise with.

A head may have more rows than its tokenizer has tokens (padding for the matrix product), and a tokenizer holes: ids
between two of its own that no text gives. So it is a set that is read, and never a largest number.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kd_assets.contract import TokenIds
from kd_assets.durable import open_file
from kd_assets.errors import InputError, MissingInputError, RecipeError
from kd_assets.model_files.reading import MOST_JSON_BYTES, read_json, reading_errors

TokenTable = dict[int, str | None]
"""Token id → the token as its vocabulary spells it (`Ġthe`, `▁the`, `<|im_end|>`); None: no file says how."""

_WHY = "it is the tokenizer's vocabulary"
_SHOWN = 3


def token_table(place: Path) -> TokenTable:
    """All tokens of a tokenizer, added ones included, by id. `place`: its folder, or its file.

    A special token that its configuration names and gives no id is not among them: no file says which it gets.
    Raises MissingInputError where there is none that can be read so, InputError for a file that is none.
    """
    with reading_errors(place, _WHY):
        is_folder = place.is_dir()
        folder = place if is_folder else place.parent
        names = [name for name in _READERS if (folder / name).is_file()] if is_folder else [place.name]
    if not names or names[0] not in _READERS:
        raise MissingInputError(
            f"which token ids the tokenizer {place} has cannot be told: it is no {', '.join(_READERS)}, nor a folder "
            "with one; save it with save_pretrained() by a version of transformers that writes tokenizer.json"
        )
    tokens = _READERS[names[0]](folder / names[0])
    for token_id, token in _added_beside(folder) if is_folder else ():
        tokens.setdefault(token_id, token)
    if not tokens or min(tokens) < 0:
        raise InputError(f"{folder / names[0]} has {'an id below 0' if tokens else 'no tokens'}: download it again")
    return tokens


def shared_token_ids(teacher: Path, student: Path) -> TokenIds:
    """The ids that both tokenizers have, where they stand for the same tokens: caches are learned from id by id.

    Raises RecipeError, with some of them, where an id is one token to the teacher and another to the student.
    """
    of_teacher, of_student = token_table(teacher), token_table(student)
    both = sorted(of_teacher.keys() & of_student.keys())
    if different := [i for i in both if None not in (t := (of_teacher[i], of_student[i])) and t[0] != t[1]]:
        examples = "; ".join(
            f"{i} is {of_teacher[i]!r} to the teacher and {of_student[i]!r} to the student" for i in different[:_SHOWN]
        )
        raise RecipeError(
            f"mismatched vocabularies: {len(different):,} of the {len(both):,} token ids that {teacher} and {student} "
            f"both have are different tokens ({examples}). A student learns from a cache id by id: name a tokenizer "
            "whose ids are the teacher's, or set vocabulary to tokenizer, to a number, or leave it out"
        )
    if not both:
        raise RecipeError(f"mismatched vocabularies: {teacher} and {student} have no token id in common")
    return TokenIds.of(both)


def teacher_token_ids(tokenizer: Path) -> TokenIds:
    """The ids that a tokenizer has. Raises as `token_table` does."""
    return TokenIds.of(token_table(tokenizer))


def is_tiktoken(path: Path) -> bool:
    """Whether the first line of a `tokenizer.model` is base64, a space and a rank: not SentencePiece's."""
    with reading_errors(path, _WHY), open_file(path) as file:
        token, _, rank = file.readline(1000).strip().partition(b" ")
    try:
        base64.b64decode(token, validate=True)
    except binascii.Error:
        return False
    return bool(token) and rank.isdigit()


def _tokenizer_json(path: Path) -> TokenTable:
    raw = read_json(path, _WHY)
    model = raw.get("model") if isinstance(raw, dict) else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        tokens: TokenTable = {_whole(token_id, path): token for token, token_id in vocabulary.items()}
    elif isinstance(vocabulary, list):  # Unigram: tokens with their scores, in the order of their ids
        tokens = {i: str(piece[0]) for i, piece in enumerate(vocabulary) if isinstance(piece, list) and piece}
    else:
        raise InputError(f"{path} is no tokenizer: it has no model.vocab; download it again")
    for added in raw.get("added_tokens") or ():
        token_id, content = (added.get(name) if isinstance(added, dict) else None for name in ("id", "content"))
        tokens[_whole(token_id, path)] = str(content)
    return tokens


def _tekken(path: Path) -> TokenTable:
    """Control tokens first, then tokens of bytes by rank; spelled as in the tokenizer.json that is made of it."""
    raw = read_json(path, _WHY)
    try:
        config = raw["config"]
        n_special = int(config["default_num_special_tokens"])
        n_ranks = int(config["default_vocab_size"]) - n_special
        tokens: TokenTable = dict.fromkeys(range(n_special))  # the first versions name none of them
        tokens |= {int(t["rank"]): str(t["token_str"]) for t in raw.get("special_tokens") or ()}
        for entry in raw["vocab"]:
            if int(entry["rank"]) < n_ranks:
                tokens[int(entry["rank"]) + n_special] = _spelled(base64.b64decode(entry["token_bytes"]))
    except (LookupError, TypeError, ValueError) as e:
        raise InputError(f"{path} is no tekken vocabulary ({type(e).__name__}: {e}): download it again") from e
    return tokens


def _sentencepiece(path: Path) -> TokenTable:
    """Pieces in the order of their ids: field 1 of a SentencePiece `ModelProto`, in each the piece is field 1."""
    with reading_errors(path, _WHY), open_file(path) as file:
        data = file.read(MOST_JSON_BYTES)
    if is_tiktoken(path):
        raise MissingInputError(
            f"{path} holds the ranks of a tiktoken tokenizer and not its control tokens, which stand in the code of "
            "the model's authors: name a folder with its tokenizer.json"
        )
    try:
        pieces = [bytes(piece) for number, piece in _fields(data) if number == 1]
        return {
            i: next(bytes(value) for number, value in _fields(piece) if number == 1).decode()
            for i, piece in enumerate(pieces)
        }
    except (IndexError, ValueError, StopIteration) as e:
        raise InputError(f"{path} is no SentencePiece model: download it again") from e


_READERS: Mapping[str, Callable[[Path], TokenTable]] = {
    "tokenizer.json": _tokenizer_json,
    "tekken.json": _tekken,
    "tokenizer.model": _sentencepiece,
}
"""By file, in the order in which transformers prefers them."""


def _added_beside(folder: Path) -> Iterator[tuple[int, str]]:
    """Tokens with their ids in the files beside the vocabulary."""
    config, added = folder / "tokenizer_config.json", folder / "added_tokens.json"
    if config.is_file():
        raw = read_json(config, "it is part of the tokenizer")
        decoder = raw.get("added_tokens_decoder") if isinstance(raw, dict) else None
        for token_id, token in (decoder or {}).items():
            yield _whole(token_id, config), str(token.get("content") if isinstance(token, dict) else token)
    if added.is_file():
        raw = read_json(added, "it is part of the tokenizer")
        for token, token_id in (raw if isinstance(raw, dict) else {}).items():
            yield _whole(token_id, added), token


def _whole(value: Any, path: Path) -> int:
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{path} gives a token the id {value!r:.40}, which is no whole number: download it again")
    return value


def _spelled(token: bytes) -> str:
    """A token of bytes in the letters of byte-level BPE (Radford et al. 2019): printable Latin-1 characters stand for
    themselves, the other bytes for the characters from 256 on, in their order."""
    return "".join(_LETTERS[byte] for byte in token)


def _letters() -> list[str]:
    themselves = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in themselves]
    return [chr(byte) if byte in themselves else chr(256 + others.index(byte)) for byte in range(256)]


_LETTERS = _letters()


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each field of a protobuf message; of those that hold bytes, others are passed over.

    Raises ValueError or IndexError for what is no message.
    """
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 2:  # a length, and so many bytes
            length, at = _varint(message, at)
            if at + length > len(message):
                raise ValueError("a field ends beyond its message")
            yield key >> 3, message[at : at + length]
            at += length
        elif kind == 0:
            _, at = _varint(message, at)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError(f"no field is of the wire type {kind}")


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number in groups of 7 bits, lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
