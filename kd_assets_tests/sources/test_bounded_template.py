"""Chat templates end, and what they give is what transformers gives."""

from __future__ import annotations

import jinja2
import pytest
from transformers import AutoTokenizer

from kd_assets.errors import RecipeError
from kd_assets.sources import bounded_template
from kd_assets.sources.bounded_template import BoundedTemplate, EndlessTemplateError
from kd_assets.sources.chats import ChatRenderer
from kd_assets_tests.sources.conftest import MARKED_TEMPLATE, UNMARKED_TEMPLATE, SaveTokenizer, chat_record

MESSAGES = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "q <b> & {{ x }}"},
    {"role": "assistant", "content": " a\n"},
]


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_template, "MOST_STEPS", 1_000)


@pytest.mark.parametrize(
    "template",
    [
        MARKED_TEMPLATE,
        UNMARKED_TEMPLATE,
        "{{ bos_token }}{% for m in messages %}{{ loop.index * 2 }}{{ m.role ~ m.content | trim }}\n{% endfor %}",
        "{% macro say(m, end='!') -%}  {{ m.content | upper }}{{ end }} {%- endmacro %}{{ say(messages[0]) * 2 }}",
        "{% for m in messages if m.role != 'user' %}{{ m['content'] + '|' }}{% else %}none{% endfor %}",
        "{% macro box(x) %}[{{ caller(x) }}]{% endmacro %}{% call(y) box(3) %}{{ y ** 2 }}{% endcall %}",
        "{% set s = namespace(n=0) %}{% for m in messages %}{% set s.n = s.n + m | length %}{% endfor %}{{ s.n }}",
        "{% filter upper %}{{ messages[1].content }} text{% endfilter %}{% set x | upper %}a{% endset %}{{ x }}",
        "{{ messages | tojson }}{{ messages | map(attribute='role') | join(', ') }}{{ '%s %d' % ('a', 3) }}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
        "{% for x in [[1, [2]], [3]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}",
        "{{ unknown }}{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}{{ 7 // 2 }}{{ 'ab' * 2 }}",
        "  {% generation %}  {{ messages[2].content }}{% endgeneration %}\n{% if true %}\n  x\n{% endif %}\n",
    ],
)
def test_a_bounded_template_gives_what_transformers_gives(save_tokenizer: SaveTokenizer, template: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer())
    for prompt in (False, True):
        ours = BoundedTemplate(template).render(
            **tokenizer.special_tokens_map, messages=MESSAGES, tools=None, documents=None, add_generation_prompt=prompt
        )
        assert ours == tokenizer.apply_chat_template(
            MESSAGES, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% macro f() %}{{ caller() }}{% endmacro %}{% for a in range(9999) %}{% call f() %}{% endcall %}{% endfor %}",
        "{% for a in [1] recursive %}{{ loop([1, 1]) if loop.depth < 60 }}{% endfor %}",
        "{% for a in range(9999) %}{% generation %}{% endgeneration %}{% endfor %}",
    ],
)
@pytest.mark.usefixtures("few_steps")
def test_loops_and_macros_without_end_are_ended(template: str) -> None:
    with pytest.raises(EndlessTemplateError, match="more than 1,000 turns of its loops and calls of its macros"):
        BoundedTemplate(template).render()


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 10**10 }}",
        "{{ 10**10 * 'x' }}",
        "{% set x = [1] * 10**10 %}",
        "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x | replace('x', 'xx') %}{% endfor %}",
        "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x.replace('x', 'xx') %}{% endfor %}",
        "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}",
        "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
        "{{ 10 ** (10 ** 10) }}",
        "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    ],
)
def test_values_that_grow_without_end_are_ended(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_template, "MOST_SIZE", 10_000)
    with pytest.raises(EndlessTemplateError, match=r"a value of more than 10,000|a number of more than"):
        BoundedTemplate(template).render()


def test_a_template_cannot_reach_what_counts_its_steps(few_steps: None) -> None:
    template = "{% set kd_step = 1 %}{% macro kd_sized(x) %}{% endmacro %}{% for a in range(9999) %}{% endfor %}"
    with pytest.raises(EndlessTemplateError):
        BoundedTemplate(template).render(kd_step=1)


def test_each_rendering_has_its_own_steps(few_steps: None) -> None:
    template = BoundedTemplate("{% for a in range(900) %}{% endfor %}{{ messages }}")
    assert [template.render(messages=i) for i in range(3)] == ["0", "1", "2"]


def test_an_endless_template_is_an_error_of_the_recipe_that_names_it(
    save_tokenizer: SaveTokenizer, few_steps: None
) -> None:
    """Not a bad record: with on_bad_record: skip each record would take as long."""
    folder = save_tokenizer("{% for a in range(9999) %}{% endfor %}")
    renderer = ChatRenderer(AutoTokenizer.from_pretrained(folder))
    with pytest.raises(RecipeError, match=rf"the chat template of {folder} does not come to an end .* web\.jsonl:1"):
        renderer.render(chat_record(("user", "q"), ("assistant", "a")))


@pytest.mark.parametrize("template", ["{% for %}", "{{ " + "(" * 3000 + ")" * 3000 + " }}", "{% if x %}"])
def test_what_is_no_template_is_an_error_of_the_recipe(save_tokenizer: SaveTokenizer, template: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer())
    tokenizer.chat_template = template
    with pytest.raises(RecipeError, match="is none that Jinja can read"):
        ChatRenderer(tokenizer)


def test_what_a_template_raises_is_raised() -> None:
    with pytest.raises(jinja2.TemplateError, match="roles must alternate"):
        BoundedTemplate("{{ raise_exception('roles must alternate') }}").render()
