"""Chats as text: what a chat template makes of a record's messages, and which of its characters a student learns.

Used by `tokenise`, in jobs only. `renderer` puts the others together: `template` renders, `template_reads` knows what a
template looks at, `messages` gives it the messages in the form that it takes, `turns` finds what the assistant says.
"""

from kd_assets.sources.chats.renderer import ChatRenderer
from kd_assets.sources.chats.template import TEMPLATE_DATE, TextSpan, with_fixed_date
from kd_assets.sources.chats.turns import RenderedChat

__all__ = ["TEMPLATE_DATE", "ChatRenderer", "RenderedChat", "TextSpan", "with_fixed_date"]
