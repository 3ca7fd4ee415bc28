"""What a chat template looks at, read off its program: keys of messages, variables, arguments given as text.

Used by `renderer`. What a record carries and its template never reads would vanish without a word; this is how it is
noticed. Where the program leaves it open (a template that takes messages whole, or asks for keys by a variable), it is
said to read everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from jinja2 import meta, nodes

from kd_assets.library_internals import chat_environment

_LIST_TO_LIST = {"list", "reverse", "selectattr", "rejectattr", "select", "reject", "sort", "slice", "batch", "unique"}
_LIST_TO_MESSAGE = {"first", "last", "random"}
_NOTHING_OF_ITS_KEYS = {"length", "count", "default", "d", "groupby"}
_WHOLE_METHODS = {"items", "values", "keys", "copy"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TemplateReads:
    """What a template refers to."""

    names: frozenset[str]
    """Attributes, subscripts and constant strings anywhere in it."""
    variables: frozenset[str]
    """What it takes from outside: `messages`, `tools`, `enable_thinking` …"""
    takes_messages_whole: bool
    """It writes messages as they are, or goes through their keys."""
    tells_arguments_as_text: bool
    """It asks whether the arguments of a tool call are a string, and so has its own way with such."""

    def reads_key(self, name: str) -> bool:
        """Whether a message's key of this name can be in the text."""
        return self.takes_messages_whole or name in self.names


def template_reads(source: str) -> TemplateReads:
    """Raises jinja2.TemplateError for what is no template, RecursionError for one that is nested too deeply."""
    tree = chat_environment().parse(source)
    names = {node.attr for node in tree.find_all(nodes.Getattr)}
    names |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    names |= {node.key for node in tree.find_all(nodes.Keyword)}
    return TemplateReads(
        names=frozenset(names),
        variables=frozenset(meta.find_undeclared_variables(tree)),
        takes_messages_whole=_Messages(tree).are_taken_whole(),
        tells_arguments_as_text=_tells_arguments_as_text(tree),
    )


def _tells_arguments_as_text(tree: nodes.Template) -> bool:
    holds_arguments = {
        node.target.name
        for node in tree.find_all(nodes.Assign)
        if isinstance(node.target, nodes.Name) and _mentions(node.node, "arguments")
    }
    return any(
        test.name == "string"
        and (
            _mentions(test.node, "arguments") or any(n.name in holds_arguments for n in _itself(test.node, nodes.Name))
        )
        for test in tree.find_all(nodes.Test)
    )


def _mentions(node: nodes.Node, name: str) -> bool:
    return any(n.attr == name for n in _itself(node, nodes.Getattr)) or any(
        n.value == name for n in _itself(node, nodes.Const)
    )


def _itself(node: nodes.Node, kind: type[nodes._NodeBound]) -> Iterator[nodes._NodeBound]:
    """The node and those in it, of one kind (`find_all` leaves out the node itself)."""
    if isinstance(node, kind):
        yield node
    yield from node.find_all(kind)


@dataclass(slots=True)
class _Messages:
    """Which names of a template stand for a message or for several, and what is done with them."""

    tree: nodes.Template
    lists: set[str] = field(default_factory=lambda: {"messages"})
    single: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        macros = {macro.name: macro for macro in self.tree.find_all(nodes.Macro)}
        while True:
            n_known = len(self.lists) + len(self.single)
            for assign in self.tree.find_all(nodes.Assign):
                self._bind(_name_of(assign.target), assign.node)
            for loop in self.tree.find_all(nodes.For):
                if self._is_list(loop.iter) and (name := _name_of(loop.target)):
                    self.single.add(name)
            for call in self.tree.find_all(nodes.Call):
                if isinstance(call.node, nodes.Name) and (macro := macros.get(call.node.name)):
                    for parameter, argument in zip(macro.args, call.args, strict=False):
                        self._bind(parameter.name, argument)
                    for keyword in call.kwargs:
                        self._bind(keyword.key, keyword.value)
                if isinstance(call.node, nodes.Name) and call.node.name == "namespace":
                    for keyword in call.kwargs:  # whatever the namespace is called
                        self._bind(f".{keyword.key}", keyword.value)
            if len(self.lists) + len(self.single) == n_known:
                return

    def are_taken_whole(self) -> bool:
        tree, whole = self.tree, self._is_message_or_list
        macros = {macro.name for macro in tree.find_all(nodes.Macro)}
        return (
            any(self._filtered_whole(node) for node in tree.find_all(nodes.Filter))
            or any(self._called_whole(node, macros) for node in tree.find_all(nodes.Call))
            or any(self._is_message(node.iter) for node in tree.find_all(nodes.For))
            or any(whole(n) for node in tree.find_all(nodes.Output) for n in node.nodes)
            or any(whole(n) for node in tree.find_all(nodes.Concat) for n in node.nodes)
            or any(
                self._is_message(node.node) and not isinstance(node.arg, nodes.Const)
                for node in tree.find_all(nodes.Getitem)
            )
        )

    def _filtered_whole(self, node: nodes.Filter) -> bool:
        if node.node is None or node.name in _NOTHING_OF_ITS_KEYS:
            return False
        if self._is_message(node.node):
            return True
        by_attribute = any(keyword.key == "attribute" for keyword in node.kwargs)
        return self._is_list(node.node) and not by_attribute and node.name not in _LIST_TO_LIST | _LIST_TO_MESSAGE

    def _called_whole(self, node: nodes.Call, macros: set[str]) -> bool:
        if isinstance(node.node, nodes.Getattr) and self._is_message(node.node.node):
            return node.node.attr in _WHOLE_METHODS or any(
                not isinstance(argument, nodes.Const) for argument in node.args[:1]
            )
        known = isinstance(node.node, nodes.Name) and node.node.name in {*macros, "namespace", "range"}
        return not known and any(self._is_message_or_list(argument) for argument in node.args)

    def _bind(self, name: str | None, value: nodes.Node) -> None:
        if name and self._is_list(value):
            self.lists.add(name)
        elif name and self._is_message(value):
            self.single.add(name)

    def _is_message_or_list(self, node: nodes.Node) -> bool:
        return self._is_message(node) or self._is_list(node)

    def _is_list(self, node: nodes.Node | None) -> bool:
        if isinstance(node, nodes.Getitem):
            return self._is_list(node.node) and isinstance(node.arg, nodes.Slice)
        if isinstance(node, nodes.Filter):
            return self._is_list(node.node) and node.name in _LIST_TO_LIST
        if isinstance(node, (nodes.Add, nodes.Or, nodes.And)):
            return self._is_list(node.left) or self._is_list(node.right)
        if isinstance(node, nodes.CondExpr):
            return self._is_list(node.expr1) or self._is_list(node.expr2)
        if isinstance(node, nodes.List):
            return any(self._is_message(item) for item in node.items)
        return _name_of(node) in self.lists

    def _is_message(self, node: nodes.Node | None) -> bool:
        if isinstance(node, nodes.Getitem):
            return self._is_list(node.node) and not isinstance(node.arg, nodes.Slice)
        if isinstance(node, nodes.Filter):
            return self._is_list(node.node) and node.name in _LIST_TO_MESSAGE
        if isinstance(node, nodes.CondExpr):
            return self._is_message(node.expr1) or self._is_message(node.expr2)
        return _name_of(node) in self.single


def _name_of(node: nodes.Node | None) -> str | None:
    """What a value is bound to: a variable, or (with a dot before it) an attribute of any namespace."""
    if isinstance(node, nodes.Name):
        return node.name
    if isinstance(node, nodes.NSRef):
        return f".{node.attr}"
    if isinstance(node, nodes.Getattr):
        return f".{node.attr}"
    return None
