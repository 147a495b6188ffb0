"""Messages that a compaction of Claude Code kept: they stand again after its summary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from composer_plugins.traces.claude_code_tree import Conversation, Node

#: So many steps from record to record are taken per record of a conversation. What is kept is the end of the history:
#: real logs take a few in all, and only a forged one has compactions that each keep everything.
_EFFORT = 16


def kept_uuids(conversation: Conversation) -> dict[int, list[str]]:
    """The uuids of the records that each compaction of the conversation kept, by the `order` of its boundary.

    `compactMetadata.preservedMessages` lists them; versions before that gave the ends of the stretch only
    (`preservedSegment`), which is then walked from its end to its beginning. The session that a resumed one goes on
    from is part of it. Compactions that kept nothing are left out.
    """
    boundaries = [n for n in conversation.nodes if n.kind == "compact" and n.record.compactMetadata]
    boundaries = [n for n in conversation.prefix if n.kind == "compact" and n.record.compactMetadata] + boundaries
    walk: _Walk | None = None
    found: dict[int, list[str]] = {}
    for node in boundaries:
        names = _listed(node.record.compactMetadata)
        if not names and isinstance(node.record.compactMetadata.get("preservedSegment"), dict):
            walk = walk or _Walk(conversation)
            names = walk.between(node.record.compactMetadata["preservedSegment"])
        if names:
            found[node.order] = names
    return found


def _listed(metadata: dict[str, Any]) -> list[str]:
    kept = metadata.get("preservedMessages")
    names = (kept.get("allUuids") or kept.get("uuids")) if isinstance(kept, dict) else None
    return list(dict.fromkeys(n for n in names if isinstance(n, str))) if isinstance(names, list) else []


class _Walk:
    """Walks from record to parent, over all compactions of one conversation in time linear in its length."""

    def __init__(self, conversation: Conversation) -> None:
        self.nodes = {n.record.uuid: n for nodes in (conversation.prefix, conversation.nodes) for n in nodes}
        self.nodes.pop(None, None)
        self.left = _EFFORT * len(self.nodes)

    def between(self, ends: dict[str, Any]) -> list[str]:
        """The uuids from `tailUuid` up to `headUuid`; [] when the one does not lead to the other."""
        head, tail = ends.get("headUuid"), ends.get("tailUuid")
        if not isinstance(head, str) or not isinstance(tail, str) or head not in self.nodes:
            return []
        node: Node | None = self.nodes.get(tail)
        first, names = self.nodes[head].order, []
        while node is not None and node.record.uuid is not None and node.order >= first and self.left > 0:
            self.left -= 1
            names.append(node.record.uuid)
            if node.record.uuid == head:
                return names
            node = node.parent
        return []
