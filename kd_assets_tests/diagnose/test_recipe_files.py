"""Every recipe is looked at, everything wrong with it is a line of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest

from kd_assets import cli
from kd_assets.diagnose import recipe_files
from kd_assets.diagnose.recipe_files import mistakes_below, mistakes_in
from kd_assets_tests.library.projects import make_project

GOOD = """type: kd_assets.components.TeacherCaches
attributes:
  recipe: NAME
  sources:
    - name: web
      path: /data/web.jsonl
      licence: CC0-1.0
  teacher:
    model_id: some/model
  caches:
    topk: {k: 4, max_length: 64}
"""

OWN_TYPE = """
import dagster as dg

class Mine(dg.Component, dg.Model, dg.Resolvable):
    size: int

    def build_defs(self, context):
        return dg.Definitions(assets=[dg.AssetSpec("of_mine")])
"""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a recipe's file, with words of the good one replaced by others."""

    def written(folder: str, *changes: tuple[str, str], recipe: str | None = None) -> Path:
        text = GOOD.replace("NAME", recipe or folder)
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "defs" / folder / "defs.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(text)
        return path

    return written


WRONG = [
    ("max_length: 64", 'max_length: "long"', 11, "caches.topk.max_length: 'long' is not of type 'integer'"),
    ("licence:", "license:", 7, "there is no field license: is it licence?"),
    ("model_id:", "modelid:", 9, "there is no field modelid: is it model_id?"),
    ("path:", "zebra:", 6, "there is no field zebra; there are "),
    ("model_id: some/model", "{}", 8, "teacher lacks model_id, which is required"),
    (
        "type: kd_assets.components.TeacherCaches",
        "type: kd_assets.components.TeacherCahces",
        1,
        "there is no component",
    ),
    ("attributes:", "attribute:", 2, "there is no field attribute: is it attributes?"),
    ("caches:", "caches: [", 12, "it cannot be read"),
    ("recipe: one", "recipe: one\n  overlap: 5", 2, "set long_documents: split, or leave overlap out"),
    ("recipe: one", "recipe: one\n  5: b", 4, "there is no field 5"),
    ("topk: {k: 4", "topk: {k: 4, yes: 3", 11, "there is no field True"),
    ("attributes:", "5: b\nattributes:", 2, "there is no field 5"),
    ("recipe: one", "recipe: &one [*one]", 3, ""),
    ("    model_id", "\tmodel_id", 9, "YAML takes no tabs: indent by spaces"),
    ("recipe: one", "recipe: my recipe", 3, "'my recipe' is no name: it has letters, digits and _"),
    ("recipe: one", "recipe: one\n  nightly: {caches: at night}", 2, "nightly.caches is 'at night', which is no cron"),
]


@pytest.mark.parametrize(("old", "new", "line", "said"), WRONG)
def test_a_mistake_is_named_once_with_its_line(write: Write, old: str, new: str, line: int, said: str) -> None:
    (mistake,) = mistakes_in(write("one", (old, new)))
    assert said in mistake.what
    assert mistake.line == line


def test_keys_that_are_no_strings_are_mistakes_of_their_lines(write: Write) -> None:
    mistakes = mistakes_in(write("one", ("recipe: one", "recipe: one\n  5: b\n  null: b\n  2026-01-01: b\n  thing: b")))
    assert [m.line for m in mistakes] == [4, 5, 6, 7]


def test_a_file_that_the_check_itself_breaks_on_is_a_mistake_and_no_traceback(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object, **__: object) -> None:
        raise RuntimeError("nobody thought of this")

    monkeypatch.setattr(recipe_files, "parse_yamls_with_source_position", breaks)
    (mistake,) = mistakes_in(write("one"))
    assert (mistake.line, mistake.what) == (1, "it cannot be checked: nobody thought of this")


def test_a_type_beside_the_file_is_found_as_dagster_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path / "src")
    folder = make_project(tmp_path, "with_own_types") / "team" / "mine"
    folder.mkdir(parents=True)
    (folder / "things.py").write_text(OWN_TYPE)
    (folder / "defs.yaml").write_text("type: .things.Mine\nattributes:\n  size: 3\n")
    assert mistakes_in(folder / "defs.yaml") == []
    assert dg.ComponentTree.for_project(folder).build_defs().assets
    (folder / "defs.yaml").write_text("type: .things.Mine\nattributes:\n  sizes: 3\n")
    assert [m.what for m in mistakes_in(folder / "defs.yaml")] == ["there is no field sizes: is it size?"]
    (folder / "defs.yaml").write_text("type: .things.Yours\n")
    (mistake,) = mistakes_in(folder / "defs.yaml")
    assert "there is no component '.things.Yours': module 'with_own_types.defs.team.mine.things' has no" in mistake.what


def test_a_type_beside_a_file_that_is_in_no_project_is_a_mistake(write: Write) -> None:
    (mistake,) = mistakes_in(write("one", ("kd_assets.components.", ".components.")))
    assert "there is no component '.components.TeacherCaches'" in mistake.what


def test_all_mistakes_of_all_recipes_are_found_at_once(write: Write, tmp_path: Path) -> None:
    write("good")
    write("one", ("licence:", "license:"), ("max_length: 64", 'max_length: "long"'))
    write("two", ("k: 4", "k: 0"))
    files, mistakes = mistakes_below(tmp_path / "defs")
    assert len(files) == 3
    assert [(m.file.parent.name, m.line) for m in mistakes] == [("one", 7), ("one", 11), ("two", 11)]


def test_two_recipes_of_one_name_are_a_mistake_of_the_second(write: Write, tmp_path: Path) -> None:
    write("one")
    write("two", recipe="one")
    (mistake,) = mistakes_below(tmp_path / "defs")[1]
    assert (mistake.file.parent.name, mistake.line) == ("two", 3)
    assert "is also the name of" in mistake.what


def test_the_command_fails_with_a_line_a_mistake_and_passes_the_shipped_recipes(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write("one", ("licence:", "license:"))
    assert cli.main(["check", str(tmp_path / "defs")]) == 1
    assert capsys.readouterr().out == f"{path}:7: there is no field license: is it licence?\n"
    path.write_text(path.read_text().replace("license:", "licence:"))
    assert cli.main(["check", str(tmp_path / "defs")]) == 0
    assert capsys.readouterr().out == "1 recipe is right: one\n"
    assert cli.main(["check"]) == 0
    assert "demo, llama31_70b" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert cli.main(["check", str(tmp_path / "empty")]) != 0
