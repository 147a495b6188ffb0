"""Messages that a compaction of Claude Code kept: they stand again after the summary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from composer_plugins.traces.claude_code_tree import Conversation, Node


def kept_uuids(conversation: Conversation) -> frozenset[str]:
    """The uuids of all records that some compaction of the conversation kept.

    `compactMetadata.preservedMessages` lists them; versions before that gave the ends of the stretch only
    (`preservedSegment`), which is then walked from its end to its beginning.
    """
    found: set[str] = set()
    for node in conversation.nodes:
        if node.kind == "compact" and node.record.compactMetadata:
            found.update(_listed(node.record.compactMetadata) or _walked(node.record.compactMetadata, conversation))
    return frozenset(found)


def _listed(metadata: dict[str, Any]) -> list[str]:
    kept = metadata.get("preservedMessages")
    names = (kept.get("allUuids") or kept.get("uuids")) if isinstance(kept, dict) else None
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _walked(metadata: dict[str, Any], conversation: Conversation) -> list[str]:
    ends = metadata.get("preservedSegment")
    if not isinstance(ends, dict):
        return []
    node: Node | None = next((n for n in conversation.nodes if n.record.uuid == ends.get("tailUuid")), None)
    names: list[str] = []
    while node is not None and node.record.uuid is not None:
        names.append(node.record.uuid)
        if node.record.uuid == ends.get("headUuid"):
            return names
        node = node.parent
    return []
