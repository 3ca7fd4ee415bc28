"""What templates look at, read off short ones."""

from __future__ import annotations

import pytest

from kd_assets.sources.chats.template_reads import template_reads


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | tojson }}",
        "{{ messages }}",
        "{{ messages[0] | tojson }}",
        "{% for m in messages[1:] %}{{ m | string }}{% endfor %}",
        "{% set rest = messages | reverse %}{% for m in rest %}{{ m ~ 'x' }}{% endfor %}",
        "{% macro say(x) %}{% for k in x %}{{ k }}{% endfor %}{% endmacro %}{{ say(messages[0]) }}",
        "{% for m in messages %}{% for k, v in m.items() %}{{ v }}{% endfor %}{% endfor %}",
        "{% for m in messages %}{{ dict(m) }}{% endfor %}",
        "{% set ns = namespace(all=messages) %}{% for m in ns.all %}{{ m | tojson }}{% endfor %}",
    ],
)
def test_a_template_that_writes_messages_as_they_are_reads_every_key(template: str) -> None:
    assert template_reads(template).reads_key("anything")


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role }}{{ m['content'] }}{% endfor %}{{ messages | length }}",
        "{% for m in messages %}{{ m.content | tojson }}{{ m.get('name') }}{% endfor %}",
        "{{ messages | map(attribute='role') | join }}{{ (messages | last).content }}{{ tools | tojson }}",
    ],
)
def test_a_template_that_asks_for_keys_reads_those(template: str) -> None:
    reads = template_reads(template)
    assert reads.reads_key("role") or reads.reads_key("content")
    assert not reads.reads_key("weight")
    assert "messages" in reads.variables


def test_text_between_the_tags_is_nothing_that_is_read() -> None:
    assert not template_reads("weight {# m.weight #}{% for m in messages %}{{ m.role }}{% endfor %}").reads_key(
        "weight"
    )
