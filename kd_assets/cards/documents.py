"""A document of a cache in lines that people read."""

from __future__ import annotations

from kd_assets.cards.tokens import Decode
from kd_assets.cards.words import pairs, quoted
from kd_assets.store.reading.summary import DocumentView, Position


def document_lines(view: DocumentView, decode: Decode | None) -> list[str]:
    """Its ids or text, a few of the teacher's predictions, and the beginning of its vectors."""
    more = " …" if view.n_tokens > len(view.input_ids) else ""
    shown = quoted(decode(view.input_ids)) if decode is not None else " ".join(map(str, view.input_ids))
    extra = f"  {pairs(view.fields)}" if view.fields else ""
    lines = [
        f"  {view.document_id}  [{view.partition_key}]  {view.n_tokens} tokens, {view.n_loss_tokens} trained{extra}",
        f"    {shown}{more}",
    ]
    lines += [_position_line(position, decode) for position in view.positions]
    for name, vector in view.vectors.items():
        shape = " × ".join(map(str, vector["shape"]))
        values = ", ".join(f"{value:.4g}" for value in vector["first_values"])
        lines.append(f"    {name}: {shape}, first vector [{values}, …] of norm {vector['first_norm']:.4g}")
    return lines


def _position_line(position: Position, decode: Decode | None) -> str:
    def token(token_id: int) -> str:
        return str(token_id) if decode is None else quoted(decode([token_id]))

    top = ", ".join(f"{token(token_id)} {probability:.3f}" for token_id, probability in position.top[:5])
    target = f"{token(position.target_id)} {position.target_probability:.3f}"
    return f"    after {token(position.token_id)} (position {position.position}) came {target}; teacher: {top}"
