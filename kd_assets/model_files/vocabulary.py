"""Which token ids a tokenizer has, and how each is spelled, by its files alone.

Anyone may import it; standard library only, so that the service node tells what a student's vocabulary is without the
libraries of tokenizers. Which file decides is as in `sources.tokenizer_proof`, which proves that these files are what
jobs tokenise with.

A head may have more rows than its tokenizer has tokens (padding for the matrix product), and a tokenizer holes: ids
between two of its own that no text gives. So it is a set that is read, and never a largest number. What a file calls
the id of an added token is not believed either: the `tokenizers` library numbers those itself, one after the other.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_assets.contract import TokenIds
from kd_assets.durable import open_file
from kd_assets.errors import InputError, MissingInputError, RecipeError
from kd_assets.model_files.reading import MOST_JSON_BYTES, read_json, reading_errors

TokenTable = dict[int, str | None]
"""Token id → the token as its vocabulary spells it (`Ġthe`, `▁the`, `<|im_end|>`); None: no file says how."""

_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_WHY = "it is the tokenizer's vocabulary"
_SHOWN = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class _Vocabulary:
    """What one file says."""

    tokens: TokenTable
    added: Sequence[str] = ()
    """Tokens besides, in the order in which the file has them."""


def token_table(place: Path) -> TokenTable:
    """All tokens of a tokenizer, added ones included, by id. `place`: its folder, or its file alone.

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
    found = _READERS[names[0]](folder / names[0])
    if not found.tokens or min(found.tokens) < 0:
        what = "an id below 0" if found.tokens else "no tokens"
        raise InputError(f"{folder / names[0]} has {what}: download it again")
    return _with_added(found.tokens, [*found.added, *(_added_beside(folder) if is_folder else ())])


def _with_added(tokens: TokenTable, added: Iterable[str]) -> TokenTable:
    """With added tokens, numbered as the `tokenizers` library (0.23) does it: one that the vocabulary has keeps its id,
    the others are numbered from the size of the vocabulary on, whatever ids it leaves free or has beyond."""
    by_token = {token: token_id for token_id, token in tokens.items()}
    numbered: dict[str, int] = {}
    following = len(tokens)
    for token in added:
        if token and token not in numbered:
            if token in by_token:
                numbered[token] = by_token[token]
            else:
                numbered[token], following = following, following + 1
    return tokens | {token_id: token for token, token_id in numbered.items()}


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


def _tokenizer_json(path: Path) -> _Vocabulary:
    raw = read_json(path, _WHY)
    model = raw.get("model") if isinstance(raw, dict) else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        tokens: TokenTable = {_whole(token_id, path): token for token, token_id in vocabulary.items()}
    elif isinstance(vocabulary, list):  # Unigram: tokens with their scores, in the order of their ids
        tokens = {i: str(piece[0]) for i, piece in enumerate(vocabulary) if isinstance(piece, list) and piece}
    else:
        raise InputError(f"{path} is no tokenizer: it has no model.vocab; download it again")
    return _Vocabulary(tokens=tokens, added=[_content(token, path) for token in _listed(raw, "added_tokens", path)])


def _tekken(path: Path) -> _Vocabulary:
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
    return _Vocabulary(tokens=tokens)


def _sentencepiece(path: Path) -> _Vocabulary:
    """Pieces in the order of their ids: field 1 of a SentencePiece `ModelProto`, in each the piece is field 1."""
    with reading_errors(path, _WHY), open_file(path) as file:
        data = file.read(MOST_JSON_BYTES)
    if is_tiktoken(path):
        raise MissingInputError(
            f"{path} holds the ranks of a tiktoken tokenizer and not its control tokens, which stand in the code of "
            "the model's authors: name a folder with its tokenizer.json"
        )
    try:
        pieces = [piece for number, piece in _fields(data) if number == 1]
        tokens = [next(value for number, value in _fields(piece) if number == 1).decode() for piece in pieces]
    except (IndexError, ValueError, StopIteration) as e:
        raise InputError(f"{path} is no SentencePiece model: download it again") from e
    return _Vocabulary(tokens=dict(enumerate(tokens)))


_READERS: Mapping[str, Callable[[Path], _Vocabulary]] = {
    "tokenizer.json": _tokenizer_json,
    "tekken.json": _tekken,
    "tokenizer.model": _sentencepiece,
}
"""By file, in the order in which transformers prefers them."""


def _added_beside(folder: Path) -> Iterator[str]:
    """Tokens that the files beside a vocabulary add, in the order in which transformers (5.17) does: those with ids, by
    these; then the special ones by their roles."""
    config = _object(folder / "tokenizer_config.json")
    with_ids: list[tuple[int, str]] = []
    if isinstance(decoder := config.get("added_tokens_decoder"), dict):
        path = folder / "tokenizer_config.json"
        with_ids = [(_whole(token_id, path), _content(token, path)) for token_id, token in decoder.items()]
    else:  # of earlier versions
        config |= _object(folder / "special_tokens_map.json")
        path = folder / "added_tokens.json"
        with_ids = [(_whole(token_id, path), token) for token, token_id in _object(path).items()]
    yield from (token for _, token in sorted(with_ids))
    named = [config.get(role) for role in _ROLES]
    named += [value for name, value in config.items() if name.endswith("_token") and name not in _ROLES]
    path = folder / "tokenizer_config.json"
    extra = config.get("extra_special_tokens")
    others = list(extra.values()) if isinstance(extra, dict) else _listed(config, "extra_special_tokens", path)
    for token in (*named, *(others or _listed(config, "additional_special_tokens", path))):
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            yield content


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no such file."""
    raw = read_json(path, "it is part of the tokenizer") if path.is_file() else {}
    return raw if isinstance(raw, dict) else {}


def _listed(raw: Mapping[str, Any], name: str, path: Path) -> list[Any]:
    """The list of this name; an empty one where there is none."""
    value = raw.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise InputError(f"{path} has {name} that are no list, {value!r:.80}: download it again")
    return value


def _content(token: Any, path: Path) -> str:
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise InputError(f"{path} has an added token without content, {token!r:.80}: download it again")
    return content


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
