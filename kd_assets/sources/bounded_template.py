"""A chat template that ends: rendered as transformers renders it, in a bounded number of steps and with bounded values.

Used by `chats`, in jobs only. A template is a program that comes with a model. Jinja's sandbox keeps it from the
machine, and from ranges above 100,000; loops within loops, macros that call themselves twice, and texts doubled again
and again it does not notice. The invariant: what a template gives does not depend on how fast the machine is, so steps
are counted, not seconds: each turn of a loop (also one that its condition passes over) and each call of a macro is one.
Between two steps lies a part of the template without loops, and no value in it is larger than `MOST_SIZE`. What is not
bounded is the memory of one call of a text function (`'x'.ljust(10**10)`): that ends with an error of the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from kd_assets.library_internals import chat_environment

MOST_STEPS = 10_000_000
"""A chat of a thousand messages in a template that compares each with every other takes a tenth of it."""
MOST_SIZE = 1 << 28
"""Characters of a text or items of a list; a record's line is no longer (`MAX_LINE_BYTES`)."""
MOST_BITS = 100_000
"""Of a number."""


class EndlessTemplateError(Exception):
    """The bounds are reached. Not one of Jinja's errors, which say that a template refuses a chat."""


class BoundedTemplate:
    """One template, compiled. Not for several threads at a time: it counts the steps of the rendering in hand."""

    def __init__(self, source: str) -> None:
        """Raises jinja2.TemplateError for what is no template, and RecursionError for one that is nested too deeply."""
        environment = chat_environment()
        environment.extend(kd_step=_Items(self._step), kd_sized=_Items(_sized), kd_times=_times, kd_power=_power)
        self._steps = 0
        self._template = environment.from_string(_Bounds().visit(environment.parse(source)))
        # Each rendering copies them, and copying a chain of dicts takes as long as a short chat.
        self._template.globals = dict(self._template.globals)

    def render(self, **variables: Any) -> str:
        """Raises EndlessTemplateError, and whatever a template raises."""
        self._steps = 0
        text: str = self._template.render(**variables)
        return text

    def _step(self, _: Any) -> bool:
        self._steps += 1
        if self._steps > MOST_STEPS:
            raise EndlessTemplateError(f"more than {MOST_STEPS:,} turns of its loops and calls of its macros")
        return True


class _Bounds(NodeTransformer):
    """Puts the counting and the checks of sizes into a parsed template, where the template itself cannot reach them."""

    _n_captures = 0
    """Blocks around the node in hand whose output becomes a value."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_step(node.lineno), lineno=node.lineno))
        if node.test is not None:
            node.test = nodes.And(_step(node.lineno), node.test, lineno=node.lineno)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_step(node.lineno), lineno=node.lineno))
        return node

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.CallBlock:
        self.generic_visit(node.call)  # it stays a call: it is given the block
        node.body = [new for statement in node.body for new in self.visit_list(statement)]
        node.body.insert(0, nodes.ExprStmt(_step(node.lineno), lineno=node.lineno))
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Expr:
        self.generic_visit(node)
        # Without a node it is that of a block ({% filter upper %}), and has to stay what it is.
        return node if node.node is None else _checked(node)

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        self.generic_visit(node)
        # What a name or an item stands for was checked when it was made; only where it becomes part of a new value, it
        # may make that grow.
        made_before = () if self._n_captures else (nodes.Name, nodes.Getitem, nodes.Getattr)
        node.nodes = [n if isinstance(n, made_before) else _checked(n) for n in node.nodes]
        return node

    def _visit_capture(self, node: nodes.Node) -> nodes.Node:
        self._n_captures += 1
        self.generic_visit(node)
        self._n_captures -= 1
        return node

    visit_AssignBlock = visit_FilterBlock = _visit_capture

    def visit_Mul(self, node: nodes.Mul) -> nodes.Expr:
        self.generic_visit(node)
        return _call("kd_times", node.left, node.right, lineno=node.lineno)

    def visit_Pow(self, node: nodes.Pow) -> nodes.Expr:
        self.generic_visit(node)
        return _call("kd_power", node.left, node.right, lineno=node.lineno)

    def _visit_checked(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        return _checked(node)

    visit_Add = visit_Concat = visit_Mod = visit_Call = _visit_checked


def _call(name: str, *arguments: nodes.Expr, lineno: int) -> nodes.Call:
    """A call of what the environment holds under a name; a template's own names are others."""
    return nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None, lineno=lineno)


def _step(lineno: int) -> nodes.Expr:
    return nodes.Getitem(nodes.EnvironmentAttribute("kd_step"), nodes.Const(0), "load", lineno=lineno)


def _checked(node: nodes.Expr) -> nodes.Expr:
    """The expression with its value checked, once; what is written in the template has the size that it has."""
    is_checked = isinstance(node, (nodes.Getitem, nodes.Call)) and isinstance(node.node, nodes.EnvironmentAttribute)
    if is_checked or isinstance(node, (nodes.TemplateData, nodes.Const)):
        return node
    return nodes.Getitem(nodes.EnvironmentAttribute("kd_sized"), node, "load", lineno=node.lineno)


class _Items:
    """A function as items of an object: the sandbox looks long at each call, and at an item not at all."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function

    def __getitem__(self, value: Any) -> Any:
        return self._function(value)


def _sized(value: Any) -> Any:
    if isinstance(value, (str, bytes, list, tuple, dict)) and len(value) > MOST_SIZE:
        raise EndlessTemplateError(f"a value of more than {MOST_SIZE:,} characters or items")
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise EndlessTemplateError(f"a number of more than {MOST_BITS:,} bits")
    return value


def _times(left: Any, right: Any) -> Any:
    for sequence, n in ((left, right), (right, left)):
        if isinstance(sequence, (str, bytes, list, tuple)) and isinstance(n, int) and len(sequence) * n > MOST_SIZE:
            raise EndlessTemplateError(f"a value of more than {MOST_SIZE:,} characters or items")
    return _sized(left * right)


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * exponent > MOST_BITS:
        raise EndlessTemplateError(f"a number of more than {MOST_BITS:,} bits")
    return base**exponent
