"""The demo's teacher: a real but tiny training, and what must hold of the folder it leaves."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from kd_assets.demo import teacher as demo_teacher
from kd_assets.demo import training
from kd_assets.demo.corpus import CHATS_FILE, DOCUMENTS_FILE, passage_of, write_corpus
from kd_assets.demo.teacher import NOTE_FILE, TrainingSummary, main, make_teacher, training_fingerprint
from kd_assets.demo.tokenizer import SPECIAL_TOKENS, split_documents
from kd_assets.demo.training import TrainingPlan, packed_batches, rate_factor
from kd_assets.errors import InputError, MissingInputError

PLAN = TrainingPlan(
    vocabulary=512,
    hidden_size=64,
    n_blocks=2,
    n_heads=2,
    n_key_value_heads=1,
    intermediate_size=128,
    steps=80,
    batch_sequences=4,
    sequence_tokens=64,
    learning_rate=1e-2,
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is `None`?"},
    {"role": "assistant", "content": "A name."},
    {"role": "user", "content": "Go on."},
    {"role": "assistant", "content": "It has one value."},
]


@dataclasses.dataclass(frozen=True)
class Made:
    corpus: Path
    folder: Path
    summary: TrainingSummary
    events: list[Mapping[str, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("demo inputs")
    write_corpus(root / "corpus")
    events: list[Mapping[str, Any]] = []
    summary, reused = make_teacher(root / "corpus", root / "teacher", plan=PLAN, report=events.append)
    assert not reused
    return Made(root / "corpus", root / "teacher", summary, events)


@pytest.fixture(scope="module")
def tokenizer(made: Made) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(made.folder)


def test_it_learns_more_than_which_tokens_are_frequent(made: Made) -> None:
    summary = made.summary
    assert summary.uniform_loss == pytest.approx(math.log(512))
    assert summary.unigram_loss < summary.uniform_loss
    assert summary.held_out_loss < summary.unigram_loss
    assert summary.steps == 80
    assert not summary.cut_short
    assert summary.n_held_out_tokens > 0.02 * summary.n_train_tokens


def test_progress_counts_steps_and_ends_at_the_last(made: Made) -> None:
    last = made.events[-1]
    assert last["step"] == last["steps"] == 80
    assert {"event", "loss", "tokens_per_s", "seconds"} <= set(last)


def test_transformers_loads_it_like_any_model(made: Made, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(made.folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert type(model).__name__ == "LlamaForCausalLM"
    assert (model.config.vocab_size, model.config.num_hidden_layers) == (512, 2)
    assert len(tokenizer) == 512
    ids = torch.tensor([tokenizer("The statement is executed.")["input_ids"]])
    assert model(input_ids=ids).logits.isfinite().all()
    assert sorted(p.name for p in made.folder.glob("*.safetensors")) == ["model.safetensors"]
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert generated.shape[1] <= ids.shape[1] + 4


def test_tokenizer_gives_back_every_text_and_marks_the_beginning(tokenizer: Any) -> None:
    for text in ("x = [y for y in z]\n\n   if x:\n\tpass", "naïve “quotes” 和 🙂"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]) == text
    assert tokenizer("")["input_ids"] == [tokenizer.bos_token_id]


def test_special_tokens_are_single_ones(tokenizer: Any) -> None:
    for token in SPECIAL_TOKENS:
        assert len(tokenizer(token, add_special_tokens=False)["input_ids"]) == 1
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


def test_chat_template_masks_exactly_what_the_assistant_says(tokenizer: Any) -> None:
    chat = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = chat["input_ids"], chat["assistant_masks"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    said = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])
    assert said == "A name.<|end|>It has one value.<|end|>"


def test_chat_template_can_ask_for_an_answer(tokenizer: Any) -> None:
    prompt = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|bos|><|system|>Be brief.<|end|><|user|>What is `None`?<|end|><|assistant|>"


def test_held_out_passages_are_held_out_as_documents_and_as_chats(made: Made, tokenizer: Any) -> None:
    train, held_out = split_documents(made.corpus, tokenizer, held_out_one_in=16)
    everything, nothing = split_documents(made.corpus, tokenizer, held_out_one_in=10**9)
    assert nothing == []
    assert len(train) + len(held_out) == len(everything)
    assert all(ids[-1] == tokenizer.eos_token_id for ids in everything)
    lines = [line for name in (DOCUMENTS_FILE, CHATS_FILE) for line in (made.corpus / name).read_text().splitlines()]
    passages = {tuple(ids): passage_of(json.loads(line)["id"]) for line, ids in zip(lines, everything, strict=True)}
    trained_on = {passages[tuple(ids)] for ids in train}
    assert not trained_on & {passages[tuple(ids)] for ids in held_out}


def test_a_second_run_finds_it_and_trains_nothing(made: Made) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in made.folder.iterdir()}
    summary, reused = make_teacher(made.corpus, made.folder, plan=PLAN, report=lambda _: pytest.fail("trained again"))
    assert reused
    assert summary == made.summary
    assert {p.name: p.stat().st_mtime_ns for p in made.folder.iterdir()} == before


def test_equal_plans_make_equal_weights(made: Made, tmp_path: Path) -> None:
    torch.rand(1)
    make_teacher(made.corpus, tmp_path / "again", plan=PLAN)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        again, first = (tmp_path / "again" / name).read_bytes(), (made.folder / name).read_bytes()
        is_equal = again == first  # pytest would look for the differing bytes for an hour
        assert is_equal, name


def test_another_plan_or_corpus_replaces_an_older_teacher(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    short = dataclasses.replace(PLAN, steps=2)
    assert training_fingerprint(made.corpus, short) != training_fingerprint(made.corpus, PLAN)
    make_teacher(made.corpus, folder, plan=short)
    summary, reused = make_teacher(made.corpus, folder, plan=dataclasses.replace(short, seed=1))
    assert not reused
    assert json.loads((folder / NOTE_FILE).read_bytes())["fingerprint"] == summary.fingerprint
    assert [p.name for p in tmp_path.iterdir()] == ["teacher"]
    assert not any(p.is_dir() for p in folder.iterdir())


def test_a_cpu_that_only_emulates_bfloat16_trains_by_another_optimizer(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "bfloat16_is_faster", lambda: False)
    monkeypatch.setattr(torch.optim, "Muon", lambda *_, **__: pytest.fail("it would take many times as long"))
    summary, _ = make_teacher(made.corpus, tmp_path / "teacher", plan=PLAN)
    assert summary.precision == "float32"
    assert summary.held_out_loss < summary.unigram_loss
    assert summary.fingerprint == made.summary.fingerprint, "a teacher that is there is kept, whatever trained it"


def test_the_wall_clock_ends_the_training_and_the_teacher_is_whole(made: Made, tmp_path: Path) -> None:
    endless = dataclasses.replace(PLAN, steps=10**6)
    summary, _ = make_teacher(made.corpus, tmp_path / "teacher", plan=endless, max_seconds=6.0)
    assert summary.cut_short  # 10**6 steps would take hours
    assert 0 < summary.steps < 10**6
    assert make_teacher(made.corpus, tmp_path / "teacher", plan=endless)[1]


def test_a_machine_with_no_time_for_a_step_takes_one(made: Made, tmp_path: Path) -> None:
    summary, _ = make_teacher(made.corpus, tmp_path / "teacher", plan=PLAN, max_seconds=0.0)
    assert (summary.steps, summary.cut_short) == (1, True)
    assert math.isfinite(summary.held_out_loss)


def test_a_failure_leaves_no_half_teacher(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_teacher, "atomic_write", killed)
    with pytest.raises(KeyboardInterrupt):
        make_teacher(made.corpus, tmp_path / "teacher", plan=dataclasses.replace(PLAN, steps=1))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_someone_else_is_left_alone(made: Made, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="not a demo teacher"):
        make_teacher(made.corpus, tmp_path, plan=PLAN)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_a_missing_corpus_says_how_to_write_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MissingInputError, match=r"kd_assets\.demo\.corpus --out"):
        make_teacher(tmp_path / "nothing", tmp_path / "teacher")
    assert main(["--corpus", str(tmp_path / "nothing"), "--out", str(tmp_path / "teacher")]) == 2
    assert "kd_assets.demo.corpus" in capsys.readouterr().err


def test_command_line_ends_with_one_line_that_says_all(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made.folder.with_name("by command")
    assert main(["--corpus", str(made.corpus), "--out", str(folder), "--steps", "1", "--max-seconds", "60"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["event"] == "finished"
    assert last["reused"] is False
    assert last["steps"] == 1
    assert last["held_out_loss"] > 0


def test_learning_rate_warms_up_holds_and_falls_to_zero() -> None:
    factors = [rate_factor(step, 100, time_share=0.0) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 20)
    assert factors[19:61] == [1.0] * 42
    assert factors[80] == pytest.approx(0.5)
    assert 0 < factors[99] < 0.03


def test_learning_rate_falls_early_when_time_runs_out() -> None:
    assert rate_factor(30, 100, time_share=0.5) == 1.0
    assert rate_factor(30, 100, time_share=0.8) == pytest.approx(0.5)
    assert rate_factor(30, 100, time_share=1.1) == 0.0


def test_batches_use_every_token_once_a_pass() -> None:
    plan = TrainingPlan(batch_sequences=2, sequence_tokens=4)
    documents = [[i] * 5 for i in range(6)]
    batches = packed_batches(documents, plan)
    one_pass = torch.stack([next(batches) for _ in range(3)])
    assert one_pass.shape == (3, 2, 5)
    assert torch.bincount(one_pass.flatten()).tolist() == [5] * 6
