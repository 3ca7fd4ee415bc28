"""How far a coded part, decoded from the disk, is from the numbers of its source: measured anew, by the limits that the
check `codec` has for what the encoder says of itself."""

from __future__ import annotations

import pyarrow as pa

from kd_assets.store.codecs.state_codec import largest_error
from kd_assets.store.codecs.state_columns import states_error
from kd_assets.store.codecs.topk_columns import divergence_on_disk
from kd_assets.store.codecs.topk_compact import divergence_limit
from kd_assets.store.codecs.topk_schema import COMPACT
from kd_assets.store.partfile import PartFile
from kd_assets.store.schema import k_of


def measured(part: PartFile, plain: pa.Table, codec: str) -> tuple[str, float, float]:
    """What is measured, the largest found, and the largest that coding can cost; a group of rows at a time.

    `plain`: the source's rows, which are those of the part.
    """
    found = 0.0
    for group in range(part.n_groups):
        stored = part.stored_group(group)
        rows = plain.slice(int(part.first_rows[group]), stored.num_rows).combine_chunks()
        if codec == COMPACT:
            found = max(found, float(divergence_on_disk(stored, rows).max(initial=0.0)))
        else:
            found = max(found, states_error(rows, part.decoded(stored))["max_codec_state_error"])
    if codec == COMPACT:
        return "max_kl", found, divergence_limit(k_of(plain.schema))
    return "max_state_error", found, largest_error(codec)
