"""Branches of a Claude Code conversation that the user went back from."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from composer_plugins.traces.claude_code_tree import Conversation, Node


def drop_rewound(conversation: Conversation) -> None:
    """A new prompt (or a new model answer) beside an older one replaces it, if the older branch ended."""
    if not conversation.forked:
        return
    inside = [n for n in conversation.nodes if n.parent is not None and n.parent.key == conversation.key]
    children: defaultdict[int, list[Node]] = defaultdict(list)
    last = {node.order: node.order for node in conversation.nodes}
    for node in inside:
        children[node.parent.order].append(node)
    for node in reversed(inside):  # a child always comes after its parent
        last[node.parent.order] = max(last[node.parent.order], last[node.order])
    for order in sorted(order for order, nodes in children.items() if len(nodes) > 1):
        older: list[Node] = []
        for node in children[order]:
            ended = [n for n in older if last[n.order] < node.order] if _starts_anew(node) else ()
            replaced = [n for n in ended if _replaces(node, n)]
            for top in replaced:
                for below in _subtree(top, children):
                    below.dropped = True
            if replaced:
                older = [n for n in older if not n.dropped]
            if node.kind != "micro" and not node.answers:
                older.append(node)


def _starts_anew(node: Node) -> bool:
    """True for a prompt of the user, and for an answer that does not just go on with another one."""
    if node.kind == "user":
        return not node.answers and node.injected is None
    return node.kind == "assistant" and node.parent.kind != "assistant"


def _replaces(node: Node, older: Node) -> bool:
    if node.kind == "user":
        return older.kind in ("user", "compact")
    return older.kind == "assistant" and node.record.message.id != older.record.message.id


def _subtree(node: Node, children: dict[int, list[Node]]) -> list[Node]:
    found, stack = [], [node]
    while stack:
        top = stack.pop()
        found.append(top)
        stack.extend(children.get(top.order, ()))
    return found
