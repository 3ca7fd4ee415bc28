"""The benchmark of what a byte teaches measures what it says it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from kd_assets.contract import HiddenStateParams, TopkParams
from kd_assets.demo.corpus import DOCUMENTS_FILE, passage_of
from kd_assets.student.losses import response_loss
from kd_assets_tests.benchmarks import worth, worth_picture, worth_students
from kd_assets_tests.benchmarks.worth_caches import bytes_beside_ids, column_sizes, write_half
from kd_assets_tests.benchmarks.worth_students import Setting, calibration_error, whole_response_loss
from kd_assets_tests.teacher.tiny import Desk, save_teacher, tiny_documents, tiny_params

ASKED = {
    "online_loss",
    "no_teacher_loss",
    "best_offline_loss_ratio",
    "best_offline_bytes_per_token",
    "variants",
}


@pytest.mark.slow
def test_the_last_line_has_every_figure_and_what_was_trained_is_not_trained_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "worth.svg"
    quick = ["--quick", "--json", "--folder", str(tmp_path / "kept")]
    threads = torch.get_num_threads()
    try:
        worth.main([*quick, "--picture", str(picture), "--markdown"])
        *table, last = capsys.readouterr().out.splitlines()
        figures = json.loads(last)
        assert figures.keys() >= ASKED
        assert figures["variants"].keys() == set(worth.QUICK)
        assert all(f["loss"] > 0 and f["kl"] > 0 and 0 <= f["ece"] <= 1 for f in figures["variants"].values())
        assert 1 < figures["best_offline_bytes_per_token"] < 40
        named = [name.replace(" compact", "") for name in worth.QUICK]
        assert [name for name in named if not any(f"| {name} |" in row for row in table)] == []
        assert ElementTree.parse(picture).getroot().tag.endswith("svg")

        monkeypatch.setattr(worth, "trained_quality", lambda *a, **k: pytest.fail("trained again"))
        worth.main(quick)
        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    finally:
        torch.set_num_threads(threads)


def test_a_half_written_line_of_results_is_passed_over_and_another_setting_has_its_own(tmp_path: Path) -> None:
    bench, other = (worth.Bench(tmp_path, setting=Setting(steps=n), quick=True) for n in (5, 6))
    line = {"variant": "online", "seed": 0, "setting": bench.setting_hash, "loss": 1.0}
    (tmp_path / worth.RESULTS_FILE).write_text(json.dumps(line) + "\n" + json.dumps(line)[:20])
    assert bench.results() == {("online", 0): line}
    assert other.results() == {}
    assert bench.only_done([0]) == worth.QUICK[1:]
    assert [v.name for v in bench.variants] == ["online"]
    assert set(other.only_done([0])) == set(worth.QUICK)


def test_a_table_shows_both_codecs_of_a_cache_in_one_row() -> None:
    of = {"loss": 5.0, "ratio": 1.0, "ratio_spread": 0.01, "kl": 1.0, "ece": 0.1}
    variants = {"top-4 compact, bucket": {**of, "bytes_per_token": 10.0}, "online": {**of, "bytes_per_token": 0}}
    variants["top-4 plain, bucket"] = {**of, "bytes_per_token": 20.0}
    table = worth.markdown({"variants": variants, "teacher": {"loss": 4.0, "ece": 0.1}})
    rows = [row.split(" | ")[:2] for row in table.splitlines()[2:]]
    assert rows == [["| online", "–"], ["| top-4, bucket", "10.0 (20.0)"], ["| (the teacher itself)", "–"]]


def test_every_tail_rule_is_tried_at_every_k_in_both_codecs_and_so_are_draws_and_states() -> None:
    names = {v.name for v in worth.variants()}
    assert len(names) == len(worth.variants())
    assert names >= {
        f"top-{k} {codec}, {tail}"
        for k in (4, 16, 50)
        for codec in ("plain", "compact")
        for tail in ("bucket", "target", "renormalised")
    }
    assert names >= {f"{n} draws {codec}" for n in (12, 25, 50) for codec in ("plain", "compact")}
    assert names >= {f"top-16 compact, bucket, with states {c}" for c in ("raw", "split", "fp8", "int8_128")}
    assert names >= {v.as_of for v in worth.variants() if v.as_of}
    assert all(worth_picture.family(name) in (None, *worth_picture.FAMILIES) for name in names)


def test_the_halves_share_no_passage_and_leave_none_out(tmp_path: Path) -> None:
    lines = [json.dumps({"id": f"topic.00.{i:02d}"}) + "\n" for i in range(64)]
    (tmp_path / DOCUMENTS_FILE).write_text("".join(lines))
    (tmp_path / "chats.jsonl").write_text("".join(line.replace('"}', '.chat"}') for line in lines))
    passages = {}
    for half, is_held in (("train", False), ("held_out", True)):
        write_half(tmp_path, tmp_path / half, is_held=is_held, one_in=4)
        records = [json.loads(r) for f in (tmp_path / half).iterdir() for r in f.read_text().splitlines()]
        passages[half] = {passage_of(record["id"]) for record in records}
        assert len(records) == 2 * len(passages[half]), "a passage's chat is where its document is"
    assert not passages["train"] & passages["held_out"]
    assert len(passages["train"] | passages["held_out"]) == 64
    assert 4 < len(passages["held_out"]) < 32


def test_bytes_are_those_of_the_files_without_the_ids(tmp_path: Path) -> None:
    documents = tiny_documents([20, 30, 40])
    desk = Desk(tmp_path)
    params = tiny_params(
        save_teacher(tmp_path / "teacher"),
        topk=TopkParams(k=4, max_length=64, codec="compact"),
        hidden_states=HiddenStateParams(blocks=(1,), max_length=64),
        embeddings=None,
    )
    unit = desk.unit(desk.commit_shard(documents), params, ["topk_cache", "hidden_state_cache"])
    desk.run(params, unit)
    topk, states = (next(Path(output.path).glob("part-*")) for output in unit.outputs)
    ids = sum(size for name, size in column_sizes(topk) if "input_ids" in name)
    assert ids > 90  # 200 ids take more than a byte each
    assert bytes_beside_ids(topk) == topk.stat().st_size - ids
    assert bytes_beside_ids(states) == states.stat().st_size - 4 * documents.n_tokens


def test_the_online_loss_is_that_of_a_cache_that_holds_the_whole_vocabulary() -> None:
    torch.manual_seed(0)
    student_MV, teacher_MV = torch.randn(5, 11), torch.randn(5, 11).log_softmax(-1)
    of_all = response_loss(student_MV, torch.arange(11).repeat(5, 1), teacher_MV, torch.ones(5, dtype=torch.bool))
    torch.testing.assert_close(whole_response_loss(student_MV, teacher_MV), of_all)
    assert float(whole_response_loss(teacher_MV, teacher_MV)) == pytest.approx(0, abs=1e-6)


def test_calibration_error_weighs_each_bin_by_its_predictions() -> None:
    # Two bins of two: 0.9 probable and all right, 0.5 probable and half right; then all wrong.
    confidence = torch.tensor([0.9, 0.9, 0.5, 0.5])
    assert calibration_error(confidence, torch.tensor([True, True, True, False])) == pytest.approx(0.05)
    assert calibration_error(confidence, torch.tensor([False] * 4)) == pytest.approx(0.7)
    # Within a bin too sure and too unsure cancel, across bins they do not.
    assert calibration_error(torch.tensor([0.9, 0.1]), torch.tensor([False, True])) == pytest.approx(0.9)


def test_ratios_are_taken_within_a_seed() -> None:
    online: list[dict[str, Any]] = [{"loss": 4.0, "kl": 1.0, "ece": 0.1}, {"loss": 5.0, "kl": 1.0, "ece": 0.1}]
    found = worth.summary([{**o, "loss": o["loss"] * 1.01} for o in online], online)
    assert (found["ratio"], found["ratio_spread"], found["loss_spread"]) == (1.01, 0.0, 1.01)


def test_the_learning_rate_rises_and_falls_to_nothing() -> None:
    factors = [worth_students.rate_factor(step, 100) for step in range(101)]
    assert factors[0] < 0.3 < 0.9 < max(factors)
    assert factors[-1] == pytest.approx(0, abs=1e-9)


def test_the_picture_has_a_point_for_every_cache_and_no_ground(tmp_path: Path) -> None:
    of = {"loss": 4.0, "ratio_spread": 0.01, "bytes_per_token": 20.0}
    figures = {"variants": {v.name: of for v in worth.variants()}, "online_loss": 3.9, "no_teacher_loss": 4.4}
    worth_picture.draw(figures, tmp_path / "a.svg")
    worth_picture.draw(figures, tmp_path / "b.svg")
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    kinds = {worth_picture.family(v.name) for v in worth.variants()} - {None}
    assert {kind for kind in kinds if worth_picture.FAMILIES[str(kind)][1] not in text} == set()
    assert "#ffffff" not in text
