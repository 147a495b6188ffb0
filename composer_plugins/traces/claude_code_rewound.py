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
            for replaced in [n for n in older if last[n.order] < node.order and _replaces(node, n)]:
                for below in _subtree(replaced, children):
                    below.dropped = True
            if node.kind != "micro" and not node.answers:
                older = [*(n for n in older if not n.dropped), node]


def _replaces(node: Node, older: Node) -> bool:
    if node.kind == "user":
        return not node.answers and node.injected is None and older.kind in ("user", "compact")
    if node.kind != "assistant" or older.kind != "assistant" or node.parent.kind == "assistant":
        return False
    return node.record.message.id != older.record.message.id


def _subtree(node: Node, children: dict[int, list[Node]]) -> list[Node]:
    found, stack = [], [node]
    while stack:
        top = stack.pop()
        found.append(top)
        stack.extend(children.get(top.order, ()))
    return found
