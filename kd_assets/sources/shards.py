"""Kind `shards`: a shard's records become tokenised documents, in part files, with one manifest.

The worker makes one `ShardsRunner` for a task. The records of a shard are read once and held, as the teacher will hold
its tokens: so bad input, and a source that is not what was planned, are refused before anything is written.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_assets.contract import JobFile, Output, Reporter, WorkUnit
from kd_assets.errors import BadRecordError, ContractError, InputError, InterruptedTaskError, RecipeError
from kd_assets.sources.range_hash import ShardHash
from kd_assets.sources.records import Record, read_records
from kd_assets.sources.shard_facts import bad_record_facts, length_facts, samples_of, source_facts, template_facts
from kd_assets.sources.shard_parts import ShardInProgress
from kd_assets.sources.tokenise import load_tokeniser
from kd_assets.store import SAMPLES_NAME, ResultWriter, Samples
from kd_assets.store.fingerprint import INPUT_KEY
from kd_assets.worker.provenance import task_provenance
from kd_assets.worker.stop_flag import StopFlag

FIELDS_KEPT = 64
"""Fields that are counted one by one; data sets exist where each record has its own."""
FIELD_CHARACTERS = 100
"""Of a field's name, which a record may make as long as it likes."""
STOP_EVERY_RECORDS = 512
"""How often a request to stop is looked for while records are read."""


class ShardsRunner:
    """Tokenises shards with one tokenizer, which it loads when it is made."""

    def __init__(self, job: JobFile, report: Reporter, stop: StopFlag) -> None:
        if job.shards is None:
            raise ContractError(f"job {job.key} is of kind {job.kind} and has no parameters of kind shards")
        if job.shards.part_documents < 1:
            raise RecipeError(f"part_documents is {job.shards.part_documents}: a part holds at least one document")
        self._job, self._report, self._stop = job, report, stop
        self._params = job.shards
        self._tokenise = load_tokeniser(job.shards)

    def run(self, unit: WorkUnit) -> dict[str, Any]:
        """Make and commit the shard of `unit`; returns its counts.

        Raises InputError (BadRecordError, MissingInputError) for input that cannot become this shard, with nothing
        written where the records themselves show it; InterruptedTaskError, after a whole part, when asked to stop.
        """
        if len(unit.outputs) != 1 or unit.outputs[0].asset != "shards_manifest":
            raise ContractError(f"{unit.partition_key}: kind shards makes one output of asset shards_manifest")
        output = unit.outputs[0]
        started = time.monotonic()
        records = self._read(unit, output)
        with ResultWriter(
            output,
            recipe=self._job.recipe,
            recipe_folder=Path(self._job.recipe_folder),
            partition_key=unit.partition_key,
        ) as writer:
            shard = ShardInProgress(
                unit=unit,
                records=records,
                writer=writer,
                tokenise=self._tokenise,
                report=self._report,
                stop=self._stop,
                part_documents=self._params.part_documents,
                fail_on_bad_record=self._params.on_bad_record == "fail",
            )
            facts = shard.make() | passed_over_fields(records)
            samples = samples_of(writer.folder, writer.finished, records)
            facts |= self._described(unit, records, shard.bad, samples)
            writer.write_beside(SAMPLES_NAME, samples.to_parquet())
            wall_s = time.monotonic() - started
            writer.commit(
                parts=shard.n_parts,
                checks={},
                provenance=self._job.provenance
                | task_provenance()
                | {
                    "device": "cpu",
                    "gpu": None,
                    "joules": None,
                    "wall_s": round(wall_s, 3),
                    "tokens_per_s": round(shard.progress.n_tokens_made / wall_s, 1),
                },
                facts=facts,
            )
        self._warn(unit, facts)
        return {name: value for name, value in facts.items() if isinstance(value, (int, float))}

    def _described(
        self,
        unit: WorkUnit,
        records: Sequence[Record | BadRecordError],
        bad: Sequence[BadRecordError],
        samples: Samples,
    ) -> dict[str, Any]:
        return {
            **length_facts(samples),
            **source_facts(unit.records, self._job.provenance.get("sources", ())),
            **bad_record_facts(bad),
            "tokenizer_fingerprint": self._params.tokenizer_fingerprint,
            **template_facts(records, self._tokenise.chat_template),
        }

    def close(self) -> None:
        """Nothing is held open between units."""

    def _read(self, unit: WorkUnit, output: Output) -> list[Record | BadRecordError]:
        """All records of the shard; raises what is wrong with them, a changed source before its bad records."""
        records: list[Record | BadRecordError] = []
        shard_hash = ShardHash()
        for record in read_records(unit.records, shard_hash):
            records.append(record)
            if len(records) % STOP_EVERY_RECORDS == 0 and self._stop:
                raise InterruptedTaskError(f"stopped by {self._stop.signal_name} while reading {unit.partition_key}")
        refuse_changed_source(unit, output, shard_hash)
        bad = [record for record in records if isinstance(record, BadRecordError)]
        if bad and self._params.on_bad_record == "fail":
            more = (
                f" (and {len(bad) - 1:,} more of {len(records):,} records of {unit.partition_key})"
                if len(bad) > 1
                else ""
            )
            raise BadRecordError(f"{bad[0]}{more}; mend it, or set on_bad_record: skip") from bad[0]
        for record in records:
            if isinstance(record, Record):
                self._tokenise.refuse_unread(record)
        return records

    def _warn(self, unit: WorkUnit, facts: Mapping[str, Any]) -> None:
        for name, message in (
            ("n_bad_records", "records could not become documents and were skipped"),
            ("n_empty_documents", "documents have no tokens and were kept out"),
            ("n_control_token_documents", control_tokens_message(facts)),
            ("n_own_ends_documents", "texts have BOS or EOS themselves, and were given no second"),
            ("n_documents_without_loss", "documents have no token that a student learns"),
            (
                "n_fanned_out_turns",
                "documents are further turns of chats that became a document a turn, since the "
                "chat template renders earlier turns differently",
            ),
            ("n_unlearned_turns", "turns are learned in no document: turns is last"),
            ("n_split_documents", "documents are longer than max_length and were split"),
            ("n_dropped_documents", "documents are longer than max_length and were left out"),
            (
                "n_documents_without_bos",
                "chats begin without BOS, which the tokenizer adds to texts and the chat "
                "template does not write: put {{ bos_token }} into chat_template if the teacher needs it",
            ),
            ("n_emptied_null_contents", "documents have content that is null, given to the chat template as empty"),
            ("n_documents_with_unrendered_messages", "documents have a message that the chat template leaves out"),
        ):
            if count := facts.get(name, 0):
                total = f"{count:,} of {facts['n_records']:,}"
                self._report.emit("warning", partition_key=unit.partition_key, message=f"{total} {message}")


def control_tokens_message(facts: Mapping[str, Any]) -> str:
    as_text = facts.get("n_control_tokens_as_text_documents", 0)
    if not as_text:
        return "documents spell out control tokens, which count as such"
    return f"documents spell out control tokens, which count as text in {as_text:,} of them and as such in the others"


def passed_over_fields(records: Sequence[Record | BadRecordError]) -> dict[str, Any]:
    """The fact that counts, for each field that nothing was made of, the records with it; none where there is none."""
    counts = Counter(
        ascii(name)[1:-1][:FIELD_CHARACTERS] if not name.isprintable() else name[:FIELD_CHARACTERS]
        for record in records
        if isinstance(record, Record)
        for name in record.passed_over
    )
    if not counts:
        return {}
    kept = sorted(counts, key=lambda name: (-counts[name], name))[:FIELDS_KEPT]
    others = sum(counts.values()) - sum(counts[name] for name in kept)
    return {"passed_over_fields": {name: counts[name] for name in sorted(kept)} | ({"…": others} if others else {})}


def refuse_changed_source(unit: WorkUnit, output: Output, shard_hash: ShardHash) -> None:
    """Raise InputError when the records that were read are not those that the plan's hash is of."""
    planned = output.identity.get(INPUT_KEY)
    if not isinstance(planned, str):
        raise ContractError(f"{unit.partition_key}: the identity of its output has no {INPUT_KEY!r}, the shard's hash")
    if shard_hash.hexdigest() != planned:
        paths = ", ".join(sorted({records.path for records in unit.records}))
        raise InputError(
            f"{paths} changed since shard {unit.partition_key} was planned: materialize shard_plan again, then the "
            "shards that it finds changed"
        )
