"""The damages that a committed store can suffer, by class. Each changes a home and says in words what it did.

A class is a function of a random generator and a home; the same seed does the same damage. `SparedError`: it
could not be done this time (there is no such file in this home).
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from kd_assets.store.manifest import read_manifest
from kd_assets.store.writing.journal import Journal
from kd_assets_tests.campaign.production import ASSETS, KEYS, Home

Damage = Callable[[random.Random, Home], str]


class SparedError(Exception):
    """There is nothing here for this class of damage."""


# ---------------------------------------------------------------------------------------------------------- places


def parts(home: Home) -> list[Path]:
    return sorted(home.recipe_folder.rglob("part-*"))


def manifests(home: Home) -> list[Path]:
    return sorted(home.recipe_folder.rglob("manifest.json"))


def indexes(home: Home) -> list[Path]:
    return sorted(home.recipe_folder.rglob("documents.index"))


def heads(home: Home) -> list[Path]:
    return sorted(home.recipe_folder.rglob("head.json"))


def journals(home: Home) -> list[Path]:
    return sorted(home.recipe_folder.rglob("journal.jsonl"))


def audits(home: Home) -> list[Path]:
    return [home.recipe_folder / "audit.jsonl"]


def plans(home: Home) -> list[Path]:
    folder = home.recipe_folder / "shard_plan"
    return [folder / "plan.json", *sorted((folder / "blocks").iterdir())]


def digests(home: Home) -> list[Path]:
    return [home.folder / "digests.json"]


def sources(home: Home) -> list[Path]:
    return sorted((home.folder / "sources").iterdir())


def teacher(home: Home) -> list[Path]:
    return sorted((home.folder / "teacher").iterdir())


FILES: dict[str, Callable[[Home], list[Path]]] = {
    "part": parts,
    "manifest": manifests,
    "index": indexes,
    "head": heads,
    "audit log": audits,
    "plan": plans,
    "digests": digests,
    "source": sources,
    "teacher": teacher,
}


def result_folders(home: Home) -> list[Path]:
    return [path.parent for path in manifests(home)]


def partition_folders(home: Home) -> list[Path]:
    return [folder.parent for folder in result_folders(home)]


def variant_folders(home: Home) -> list[Path]:
    return sorted({folder.parent for folder in partition_folders(home)})


def asset_folders(home: Home) -> list[Path]:
    return [home.recipe_folder / asset for asset in ASSETS]


def recipe_folders(home: Home) -> list[Path]:
    return [home.recipe_folder]


FOLDERS: dict[str, Callable[[Home], list[Path]]] = {
    "result": result_folders,
    "partition": partition_folders,
    "variant": variant_folders,
    "asset": asset_folders,
}


def one_of(rng: random.Random, found: Sequence[Path], what: str) -> Path:
    if not found:
        raise SparedError(what)
    return rng.choice(list(found))


def name_in(home: Home, path: Path) -> str:
    return os.fsencode(path.relative_to(home.folder)).decode("utf-8", "backslashreplace")


# ---------------------------------------------------------------------------------------------------- bytes of a file


def _kept_times(path: Path, data: bytes) -> None:
    """Other bytes under the same name and inode, with the times of before: nothing but the content tells."""
    status = path.stat()
    with path.open("r+b") as file:
        file.truncate(len(data))
        file.write(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def flip_bit(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    at, bit = rng.randrange(len(data)), rng.randrange(8)
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :], f"bit {bit} of byte {at} of {len(data)} flipped"


def change_byte(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    at, value = rng.randrange(len(data)), rng.randrange(1, 256)
    return data[:at] + bytes([data[at] ^ value]) + data[at + 1 :], f"byte {at} of {len(data)} XOR {value}"


def change_ends(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Headers, footers and lengths: where the structure of a container is."""
    n = min(len(data), 64)
    at = rng.randrange(n) if rng.random() < 0.3 else len(data) - 1 - rng.randrange(min(len(data), 600))
    value = rng.randrange(1, 256)
    return data[:at] + bytes([data[at] ^ value]) + data[at + 1 :], f"byte {at} of {len(data)} XOR {value}"


def change_digit(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """One digit into another: text stays text, JSON stays JSON."""
    places = [i for i, byte in enumerate(data) if byte in b"0123456789abcdef"]
    if not places:
        raise SparedError("no digit")
    at = rng.choice(places)
    among = b"0123456789" if data[at : at + 1].isdigit() else b"abcdef"
    new = rng.choice([b for b in among if b != data[at]])
    return data[:at] + bytes([new]) + data[at + 1 :], f"byte {at} of {len(data)} {chr(data[at])!r} → {chr(new)!r}"


def zero_block(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """What a crashed disk leaves of a block."""
    at = rng.randrange(len(data))
    n = min(rng.choice([16, 64, 512]), len(data) - at)
    if not any(data[at : at + n]):
        raise SparedError("zeros already")
    return data[:at] + bytes(n) + data[at + n :], f"{n} bytes from {at} of {len(data)} zeroed"


def truncate(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    n = rng.choice([0, 1, len(data) - 1, rng.randrange(len(data)), rng.randrange(len(data))])
    return data[:n], f"cut from {len(data)} to {n} bytes"


def extend(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    n = rng.choice([1, 8, 100])
    more = rng.choice([bytes(n), rng.randbytes(n), b"\n" * n, data[-n:]])
    return data + more, f"{len(more)} bytes appended ({more[:8]!r})"


BYTES: dict[str, Callable[[random.Random, bytes], tuple[bytes, str]]] = {
    "bit": flip_bit,
    "byte": change_byte,
    "ends": change_ends,
    "digit": change_digit,
    "zeros": zero_block,
    "cut": truncate,
    "grown": extend,
}


def bytes_of(where: str, how: str) -> Damage:
    change = BYTES[how]

    def damage(rng: random.Random, home: Home) -> str:
        path = one_of(rng, [p for p in FILES[where](home) if p.stat().st_size], where)
        data, words = change(rng, path.read_bytes())
        _kept_times(path, data)
        return f"{name_in(home, path)}: {words}"

    return damage


# ------------------------------------------------------------------------------------------------- files and folders


def deleted(places: Callable[[Home], list[Path]]) -> Damage:
    def damage(rng: random.Random, home: Home) -> str:
        path = one_of(rng, places(home), "nothing to delete")
        remove(path)
        return f"{name_in(home, path)} deleted"

    return damage


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _as_file(path: Path) -> str:
    path.write_text("in the way\n")
    return "a file"


def _as_folder(path: Path) -> str:
    path.mkdir()
    return "an empty folder"


def _as_pipe(path: Path) -> str:
    os.mkfifo(path)
    return "a named pipe"


def _as_loop(path: Path) -> str:
    path.symlink_to(path.name)
    return "a link to itself"


def _as_dangling(path: Path) -> str:
    path.symlink_to("nowhere")
    return "a link to nowhere"


def replaced(places: Callable[[Home], list[Path]], by: Callable[[Path], str]) -> Damage:
    def damage(rng: random.Random, home: Home) -> str:
        path = one_of(rng, places(home), "nothing to replace")
        remove(path)
        return f"{name_in(home, path)} is {by(path)}"

    return damage


def moved_and_linked(places: Callable[[Home], list[Path]]) -> Damage:
    """To another disk, say. Readers follow links, so nothing is lost."""

    def damage(rng: random.Random, home: Home) -> str:
        path = one_of(rng, places(home), "nothing to move")
        elsewhere = home.folder / "elsewhere"
        elsewhere.mkdir()
        path.rename(elsewhere / path.name)
        path.symlink_to(elsewhere / path.name)
        return f"{name_in(home, path)} moved to another folder, with a link in its place"

    return damage


def moved_linked_and_changed(rng: random.Random, home: Home) -> str:
    """Behind a link nobody may look away."""
    words = moved_and_linked(rng.choice([*FOLDERS.values(), parts]))(rng, home)
    found = sorted(path for path in (home.folder / "elsewhere").rglob("*") if path.is_file())
    changeable = [p for p in found if p.name.startswith("part-") and p.stat().st_size]
    path = one_of(rng, changeable, "no part was moved")
    data, how = change_byte(rng, path.read_bytes())
    _kept_times(path, data)
    return f"{words}; {name_in(home, path)}: {how}"


def swapped(places: Callable[[Home], list[Path]]) -> Damage:
    """Two files or folders of the same kind in each other's place."""

    def damage(rng: random.Random, home: Home) -> str:
        found = places(home)
        pairs = [(a, b) for i, a in enumerate(found) for b in found[i + 1 :] if a.suffix == b.suffix and a != b]
        if not pairs:
            raise SparedError("no pair")
        first, second = rng.choice(pairs)
        between = home.folder / "between"
        first.rename(between)
        second.rename(first)
        between.rename(second)
        return f"{name_in(home, first)} and {name_in(home, second)} swapped"

    return damage


def copied_over(places: Callable[[Home], list[Path]]) -> Damage:
    """One file's content in the place of another's."""

    def damage(rng: random.Random, home: Home) -> str:
        found = [p for p in places(home) if p.is_file()]
        pairs = [(a, b) for a in found for b in found if a.suffix == b.suffix and a.read_bytes() != b.read_bytes()]
        if not pairs:
            raise SparedError("no pair")
        source, target = rng.choice(pairs)
        _kept_times(target, source.read_bytes())
        return f"{name_in(home, target)} has the content of {name_in(home, source)}"

    return damage


def strange_names(rng: random.Random, home: Home) -> str:
    """Names that are no UTF-8, or that have an ESC or a newline, beside what is ours."""
    folder = rng.choice([home.store, home.recipe_folder, *asset_folders(home), *partition_folders(home)])
    folder = rng.choice([folder, *result_folders(home)])
    name = rng.choice([b"\xff\xfe", b"caf\xe9", b"\x1b[31mred", b"new\nline", b"part-\xff.parquet", b"x" * 255])
    path = os.path.join(os.fsencode(folder), name)
    if rng.random() < 0.5:
        os.mkdir(path)
    else:
        with open(path, "wb") as file:
            file.write(b"foreign")
    return f"{name!r} in {name_in(home, folder)}"


def foreign(rng: random.Random, home: Home) -> str:
    """Things of nobody's, in the middle of a store."""
    folder = rng.choice([home.store, home.recipe_folder, *asset_folders(home), *partition_folders(home)])
    folder = rng.choice([folder, *result_folders(home)])
    path = folder / rng.choice(
        ["notes.txt", ".DS_Store", "part-00099.parquet", ".head.json.abc.tmp", "0123456789abcdef"]
    )
    by = rng.choice([_as_file, _as_folder, _as_pipe, _as_loop, _as_dangling])
    return f"{name_in(home, path)} is {by(path)}"


# ------------------------------------------------------------------------------------------------------- made-up JSON


def _written(path: Path, data: bytes) -> None:
    _kept_times(path, data)


STRANGE_JSON = {
    "NaN": b"NaN",
    "infinity in an object": b'{"format_version": Infinity}',
    "5,000 levels of lists": b"[" * 5000 + b"]" * 5000,
    "5,000 levels of objects": b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "nothing": b"",
    "null": b"null",
    "a list": b"[]",
    "a string": b'"fingerprint"',
    "a number of 5,000 digits": b"9" * 5000,
    "no UTF-8": b'{"fingerprint": "\xff\xfe"}',
    "UTF-16": '{"fingerprint": ""}'.encode("utf-16"),
    "a lone surrogate": b'{"fingerprint": "\\ud800"}',
    "an empty object": b"{}",
}


def strange_json(where: str) -> Damage:
    def damage(rng: random.Random, home: Home) -> str:
        path = one_of(rng, FILES[where](home), where)
        name = rng.choice(sorted(STRANGE_JSON))
        _written(path, STRANGE_JSON[name])
        return f"{name_in(home, path)} is {name}"

    return damage


def one_value_changed(where: str) -> Damage:
    """One value of the JSON has another type or size; all else is as it was, hashes included."""

    def damage(rng: random.Random, home: Home) -> str:
        path = one_of(rng, FILES[where](home), where)
        text = path.read_text()
        lines = text.splitlines() if path.suffix == ".jsonl" else [text]
        number = rng.randrange(len(lines))
        content = json.loads(lines[number])
        place, key = rng.choice(list(_places(content)))
        old = place[key]
        others: list[Any] = [None, -1, 0, 10**400, 1e308, "x", "", [], {}, True]
        place[key] = rng.choice([value for value in others if value != old])
        lines[number] = json.dumps(content)
        _written(path, "".join(line + "\n" for line in lines).encode())
        return f"{name_in(home, path)}: {key!r} {json.dumps(old)[:60]} → {json.dumps(place[key])[:60]}"

    return damage


def one_value_missing(where: str) -> Damage:
    def damage(rng: random.Random, home: Home) -> str:
        path = one_of(rng, FILES[where](home), where)
        text = path.read_text()
        lines = text.splitlines() if path.suffix == ".jsonl" else [text]
        number = rng.randrange(len(lines))
        content = json.loads(lines[number])
        place, key = rng.choice(list(_places(content)))
        del place[key]
        lines[number] = json.dumps(content)
        _written(path, "".join(line + "\n" for line in lines).encode())
        return f"{name_in(home, path)}: {key!r} taken out"

    return damage


def _places(value: Any) -> Iterable[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    keys: Iterable[Any] = ()
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = range(len(value))
    for key in keys:
        yield value, key
        yield from _places(value[key])


# ----------------------------------------------------------------------------------------- lies with the hashes right


def hashed_anew(change: Callable[[random.Random, dict[str, Any], Path], str], *, of_parts: bool = True) -> Damage:
    """A manifest changed by a program that knows how its hashes are made: sums, data version and hash fit again."""

    def damage(rng: random.Random, home: Home) -> str:
        from kd_assets.store.fingerprint import data_version, fingerprint  # here: its rules are what is imitated

        path = one_of(rng, manifests(home), "no manifest")
        raw = json.loads(path.read_bytes())
        words = change(rng, raw, path)
        if of_parts:
            for name in ("n_documents", "n_tokens", "n_bytes"):
                raw[name] = sum(part[name] for part in raw["parts"])
            raw["data_version"] = data_version(raw["asset"], [part["sha256"] for part in raw["parts"]])
        del raw["manifest_sha256"]
        raw["manifest_sha256"] = fingerprint(raw)
        _written(path, (json.dumps(raw, indent=1, sort_keys=True) + "\n").encode())
        return f"{name_in(home, path)}, hashed anew: {words}"

    return damage


def _last_part_dropped(rng: random.Random, raw: dict[str, Any], path: Path) -> str:
    if len(raw["parts"]) < 2:
        raise SparedError("one part only")
    dropped = raw["parts"].pop()
    if rng.random() < 0.5:
        (path.parent / dropped["name"]).unlink()
        return f"{dropped['name']} dropped and deleted"
    return f"{dropped['name']} dropped"


def _all_parts_dropped(rng: random.Random, raw: dict[str, Any], path: Path) -> str:
    raw["parts"].clear()
    return "all parts dropped"


def _part_twice(rng: random.Random, raw: dict[str, Any], path: Path) -> str:
    part = rng.choice(raw["parts"])
    raw["parts"].append(dict(part, index=len(raw["parts"])))
    return f"{part['name']} listed twice"


def _part_bytes_changed(rng: random.Random, raw: dict[str, Any], path: Path) -> str:
    import hashlib

    part = rng.choice(raw["parts"])
    file = path.parent / part["name"]
    data, how = change_byte(rng, file.read_bytes())
    _kept_times(file, data)
    part["sha256"] = hashlib.sha256(data).hexdigest()
    return f"{part['name']}: {how}, and its new hash in the manifest"


def _documents_lied(rng: random.Random, raw: dict[str, Any], path: Path) -> str:
    part = rng.choice(raw["parts"])
    name = rng.choice(["n_documents", "n_tokens"])
    part[name] += rng.choice([-1, 1])
    return f"{part['name']} has {name} {part[name]}"


def _name_leads_away(rng: random.Random, raw: dict[str, Any], path: Path) -> str:
    part = rng.choice(raw["parts"])
    part["name"] = rng.choice(["../" * 8 + "etc/passwd", "/etc/passwd", "", ".", "part\x00", part["name"].upper()])
    return f"a part named {part['name']!r}"


def _check_failed(rng: random.Random, raw: dict[str, Any], path: Path) -> str:
    if not raw["checks"]:
        raise SparedError("no checks")
    raw["checks"]["recomputed"]["passed"] = False
    return "its recorded recomputation failed"


# --------------------------------------------------------------------------------------------------------- the heads


def head_elsewhere(rng: random.Random, home: Home) -> str:
    path = one_of(rng, heads(home), "no head")
    other = rng.choice([p for p in heads(home) if p != path])
    value = rng.choice([json.loads(other.read_bytes())["fingerprint"], f"{rng.getrandbits(256):064x}"])
    _written(path, json.dumps({"fingerprint": value}).encode() + b"\n")
    return f"{name_in(home, path)} points to {value[:16]}"


def heads_of_an_asset(rng: random.Random, home: Home) -> str:
    asset = rng.choice(ASSETS)
    found = [path for path in heads(home) if path.is_relative_to(home.recipe_folder / asset)]
    for path in found:
        path.unlink()
    return f"all {len(found)} heads of {asset} deleted"


def partition_of_all_assets(rng: random.Random, home: Home) -> str:
    key = rng.choice(KEYS)
    found = [folder for folder in partition_folders(home) if folder.name == key]
    for folder in found:
        shutil.rmtree(folder)
    return f"{key} deleted from all {len(found)} assets"


def several_bytes(rng: random.Random, home: Home) -> str:
    """Rot in several files at once."""
    words = []
    for path in rng.sample(parts(home), 3):
        data, how = change_byte(rng, path.read_bytes())
        _kept_times(path, data)
        words.append(f"{name_in(home, path)}: {how}")
    return "; ".join(words)


def source_changed_and_shards_gone(rng: random.Random, home: Home) -> str:
    """The source must be read again, and is not what the plan was made from."""
    words = bytes_of("source", rng.choice(sorted(BYTES)))(rng, home)
    key = rng.choice(KEYS)
    for folder in [f for f in partition_folders(home) if f.name == key]:
        shutil.rmtree(folder)
    return f"{words}; {key} deleted from all assets"


def plan_changed_and_shards_gone(rng: random.Random, home: Home) -> str:
    """The plan must be followed again, and is not what it was."""
    words = rng.choice([one_value_changed("plan"), bytes_of("plan", "digit")])(rng, home)
    key = rng.choice(KEYS)
    for folder in [f for f in partition_folders(home) if f.name == key]:
        shutil.rmtree(folder)
    return f"{words}; {key} deleted from all assets"


# ------------------------------------------------------------------------------------------------- what was unfinished


def made_unfinished(rng: random.Random, home: Home) -> Path:
    """One result as a killed task leaves it: some of its parts, a journal, neither manifest, head nor audit line."""
    several = [path for path in manifests(home) if len(read_manifest(path.parent).parts) > 1]
    folder = one_of(rng, several, "no result of several parts").parent
    manifest = read_manifest(folder)
    n_kept = rng.randrange(1, len(manifest.parts) + 1)
    (folder / "manifest.json").unlink()
    (folder.parent / "head.json").unlink()
    for part in manifest.parts[n_kept:]:
        (folder / part.name).unlink()
    Journal(folder / "journal.jsonl", manifest.fingerprint).rewrite(manifest.parts[:n_kept])
    audit = home.recipe_folder / "audit.jsonl"
    kept = [line for line in audit.read_text().splitlines(keepends=True) if manifest.fingerprint not in line]
    audit.write_text("".join(kept))
    return folder


FILES["journal"] = journals


def unfinished_and(damage: Damage, words: str) -> Damage:
    def both(rng: random.Random, home: Home) -> str:
        folder = made_unfinished(rng, home)
        return f"{name_in(home, folder)} unfinished; {words}{damage(rng, home)}"

    return both


def _part_of_unfinished(rng: random.Random, home: Home) -> str:
    folder = journals(home)[0].parent
    path = one_of(rng, sorted(folder.glob("part-*")), "no part")
    how = rng.choice(["byte", "cut", "grown", "zeros"])
    data, words = BYTES[how](rng, path.read_bytes())
    _kept_times(path, data)
    return f"{name_in(home, path)}: {words}"


def interrupted_commit(rng: random.Random, home: Home) -> str:
    """As a kill between manifest and clean-up leaves it: a journal beside the manifest; head and audit line or not."""
    path = one_of(rng, manifests(home), "no manifest")
    folder, manifest = path.parent, read_manifest(path.parent)
    Journal(folder / "journal.jsonl", manifest.fingerprint).rewrite(manifest.parts)
    words = "journal left"
    if rng.random() < 0.7:
        (folder.parent / "head.json").unlink()
        (folder.parent / ".head.json.abcd1234.tmp").write_bytes(b"{")
        words += ", no head"
    if rng.random() < 0.7:
        audit = home.recipe_folder / "audit.jsonl"
        kept = [line for line in audit.read_text().splitlines(keepends=True) if manifest.fingerprint not in line]
        audit.write_text("".join(kept))
        words += ", no audit line"
    return f"{name_in(home, folder)}: {words}"


# ------------------------------------------------------------------------------------------------------- the catalogue


def _catalogue() -> dict[str, Damage]:
    found: dict[str, Damage] = {}
    for where, files in FILES.items():
        if where == "journal":  # a committed store has none; see the classes of unfinished results
            continue
        for how in BYTES:
            found[f"{how} of {where}"] = bytes_of(where, how)
        found[f"{where} deleted"] = deleted(files)
        for name, by in (("folder", _as_folder), ("pipe", _as_pipe), ("loop", _as_loop), ("dangling", _as_dangling)):
            found[f"{where} is a {name}"] = replaced(files, by)
    for where in ("manifest", "head", "audit log", "plan", "digests"):
        found[f"strange JSON in {where}"] = strange_json(where)
        found[f"one value of {where} changed"] = one_value_changed(where)
        found[f"one value of {where} missing"] = one_value_missing(where)
    for where, places in FOLDERS.items():
        found[f"{where} folder deleted"] = deleted(places)
        for name, by in (("file", _as_file), ("pipe", _as_pipe), ("loop", _as_loop), ("empty", _as_folder)):
            found[f"{where} folder is a {name}"] = replaced(places, by)
        found[f"{where} folder moved and linked"] = moved_and_linked(places)
    for where in ("result", "partition", "variant"):
        found[f"{where} folders swapped"] = swapped(FOLDERS[where])
    for where in ("part", "index", "manifest", "head"):
        found[f"{where} files swapped"] = swapped(FILES[where])
        found[f"{where} copied over another"] = copied_over(FILES[where])
    found |= {
        "part moved and linked": moved_and_linked(parts),
        "moved, linked and changed": moved_linked_and_changed,
        "strange names": strange_names,
        "foreign things": foreign,
        "last part dropped, hashed anew": hashed_anew(_last_part_dropped),
        "all parts dropped, hashed anew": hashed_anew(_all_parts_dropped),
        "part listed twice, hashed anew": hashed_anew(_part_twice),
        "part changed, hashed anew": hashed_anew(_part_bytes_changed),
        "counts lied, hashed anew": hashed_anew(_documents_lied),
        "part named elsewhere, hashed anew": hashed_anew(_name_leads_away),
        "check failed, hashed anew": hashed_anew(_check_failed, of_parts=False),
        "head elsewhere": head_elsewhere,
        "all heads of an asset deleted": heads_of_an_asset,
        "partition deleted everywhere": partition_of_all_assets,
        "rot in several files": several_bytes,
        "source changed, shards gone": source_changed_and_shards_gone,
        "plan changed, shards gone": plan_changed_and_shards_gone,
        "interrupted commit": interrupted_commit,
    }
    for how in BYTES:
        found[f"unfinished, {how} of journal"] = unfinished_and(bytes_of("journal", how), "")
    found["unfinished, one value of journal changed"] = unfinished_and(one_value_changed("journal"), "")
    found["unfinished, one value of journal missing"] = unfinished_and(one_value_missing("journal"), "")
    found["unfinished, strange JSON in journal"] = unfinished_and(strange_json("journal"), "")
    found["unfinished, part changed"] = unfinished_and(_part_of_unfinished, "")
    found["unfinished"] = unfinished_and(lambda rng, home: "as it is", "")
    return found


CLASSES = _catalogue()
"""Name → damage."""
