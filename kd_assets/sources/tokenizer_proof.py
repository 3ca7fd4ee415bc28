"""Proof that a loaded tokenizer does what its own files say.

Used by `tokenise` in jobs. transformers decides by the names in a folder's configuration (`model_type`,
`tokenizer_class`) which class reads the files, and several of its classes build a pipeline of their own in the place of
the one in `tokenizer.json`: other tokens, and nothing fails. So the library is not believed: what it makes of probe
texts must be what the files give when they are read by their own library alone. A tokenizer that is proved is decided
by its files, which are its fingerprint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kd_assets.errors import InputError, MissingInputError
from kd_assets.model_files.reading import read_json, reads_folder
from kd_assets.model_files.vocabulary import is_tiktoken

Encode = Callable[[str], Sequence[int]]
"""Token ids of a text, without the special tokens that a tokenizer adds around it."""

PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "in 2023 the value 650841823 fox",
    "0 1 12 123 1234 12345 3.14159 -7 1,000,000 1e-9 0x1F 2nd",
    " one leading space",
    "  two leading spaces and  two inside,   three,\tone tab",
    "trailing space ",
    "one line\nand another\n\nand after an empty one\r\nand a Windows one",
    "\n\n  def f(x):\n\treturn {'a': x[0]} if x != None else -1  # why?\n",
    "don't I'LL we've SHE'S can’t",
    "CamelCase snake_case kebab-case https://example.org/a?b=c&d=%20#e user@example.org",
    "naïve café Ångström e\u0301 ﬁ ½ № Straße İstanbul",
    "中文分词 日本語の文章です 한국어 문장 ภาษาไทย हिन्दी العربية עברית Русский",
    "emoji 🙂 👩‍👩‍👧 🏳️‍🌈 and \u200bzero\u00a0width",
    "\ufeffmark \ufffd replacement \x00 nul \x7f delete",
    "<b>markup</b> {{template}} \\frac{1}{2} $x_i^2$ «quoted» “curly” — dashes…",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa !!!!!!!!!!!!!!!! ================",
    "",
)
SPELLED_TOKENS = 16
"""Control tokens that are spelled out in probes, at most."""
SHOWN_TOKENS = 24


def prove(tokenizer: Any, folder: Path) -> None:
    """Raise InputError, with both answers, where a tokenizer of transformers differs from its own files in `folder`.

    MissingInputError names the package that is needed to read them, or says that no file here can be read at all.
    """
    name, encode, spelled = own_encoding(folder)
    for probe in (*PROBES, *(f"say {token} and{token}{token}end" for token in spelled[:SPELLED_TOKENS])):
        found = list(tokenizer(probe, add_special_tokens=False, verbose=False)["input_ids"])
        expected = list(encode(probe))
        if found == expected:
            continue
        kind = type(tokenizer).__name__
        raise InputError(
            f"the tokenizer in {folder} is not what its own {name} says. Of {probe!r} {kind} of transformers makes "
            f"{len(found)} tokens, {_shown(tokenizer, found)}; {name} itself makes {len(expected)}, "
            f"{_shown(tokenizer, expected)}. {_remedy(kind, folder)}"
        )


def _remedy(kind: str, folder: Path) -> str:
    """What may be done where transformers reads a folder with a class (`kind`) that makes something else of it."""
    asked_for = "TokenizersBackend"
    path = folder / "tokenizer_config.json"
    config = read_json(path, "its tokenizer_class is wanted") if path.is_file() else {}
    said = config.get("tokenizer_class") if isinstance(config, dict) else None
    if said != asked_for:
        return (
            f"transformers chose {kind} by model_type in config.json and tokenizer_class in tokenizer_config.json: "
            f'mend them ("tokenizer_class": "{asked_for}" takes tokenizer.json as it is)'
        )
    # Of some model types (qwen2 is one) it takes the class of its own table, whatever a folder asks for.
    return (
        f"tokenizer_config.json asks for {asked_for}, and transformers takes {kind} all the same, by model_type in "
        f"config.json. If the teacher was trained on what {kind} makes, have its files written anew "
        "(AutoTokenizer.from_pretrained(folder).save_pretrained(folder)); otherwise this version of transformers has "
        "no right tokenizer for it: try another"
    )


@reads_folder
def own_encoding(folder: Path) -> tuple[str, Encode, Sequence[str]]:
    """A folder's tokenizer file, what it makes of a text by its own library, and control tokens that it knows."""
    for name, reader in _READERS.items():
        if (folder / name).is_file():
            encode, spelled = reader(folder / name)
            return name, encode, spelled
    if tiktoken_files := sorted(folder.glob("*.tiktoken")):
        encode, spelled = _tiktoken(tiktoken_files[0])
        return tiktoken_files[0].name, encode, spelled
    raise MissingInputError(
        f"nothing in {folder} tells by itself what its tokenizer does (there is no {', '.join(_READERS)} and no "
        "*.tiktoken): save it with save_pretrained() by a version of transformers that writes tokenizer.json"
    )


def _tokenizer_json(path: Path) -> tuple[Encode, Sequence[str]]:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises bare Exception
        raise InputError(f"{path} is no tokenizer: {e}") from e
    tokenizer.no_truncation()
    tokenizer.no_padding()
    spelled = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids, spelled


def _tokenizer_model(path: Path) -> tuple[Encode, Sequence[str]]:
    """`tokenizer.model` is a SentencePiece model, or (Llama 3) ranks of tiktoken in lines of base64."""
    return _tiktoken(path) if is_tiktoken(path) else _sentencepiece(path)


def _sentencepiece(path: Path) -> tuple[Encode, Sequence[str]]:
    try:
        import sentencepiece
    except ImportError as e:
        raise _not_installed("sentencepiece", path) from e
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as e:
        raise InputError(f"{path} is no SentencePiece model: {e}") from e
    return model.encode, ()  # control symbols in a text are text to SentencePiece


def _tiktoken(path: Path) -> tuple[Encode, Sequence[str]]:
    """Ranks alone do not say how a text is split before they apply; that is code of the model's own library."""
    raise MissingInputError(
        f"{path} holds the ranks of a tiktoken tokenizer and not how a text is split before they apply, which stands "
        "in the code of the model's authors: convert it once to tokenizer.json (most repositories carry one beside "
        "it; else transformers.convert_slow_tokenizer), compare it with theirs, and name that folder"
    )


def _tekken(path: Path) -> tuple[Encode, Sequence[str]]:
    try:
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer
    except ImportError as e:
        raise _not_installed("mistral-common", path) from e
    tokenizer = Tekkenizer.from_file(str(path))
    return lambda text: tokenizer.encode(text, bos=False, eos=False), ()


_READERS: dict[str, Callable[[Path], tuple[Encode, Sequence[str]]]] = {
    "tokenizer.json": _tokenizer_json,
    "tekken.json": _tekken,
    "tokenizer.model": _tokenizer_model,
}
"""By file, in the order in which transformers prefers them."""


def _not_installed(package: str, path: Path) -> MissingInputError:
    return MissingInputError(
        f"{path} can only be checked by its own library: pip install {package} in the compute environment"
    )


def _shown(tokenizer: Any, ids: Sequence[int]) -> str:
    tokens = tokenizer.convert_ids_to_tokens(list(ids[:SHOWN_TOKENS]))
    return " ".join(map(str, tokens)) + (" …" if len(ids) > SHOWN_TOKENS else "")
