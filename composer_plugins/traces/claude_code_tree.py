"""Which records of a Claude Code file belong together, and which were rewound.

The `parentUuid` tree is used for two things only: to find branches that the user rewound, and to attach a
resumed session to its past. Parallel calls fork the tree too, so the messages themselves are taken in file
order and never by a walk from the leaf to the root.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from composer_plugins.traces.claude_code_records import Line, blocks_of

INJECTED = (
    "<command-name>", "<command-message>", "<command-args>", "<local-command-stdout>", "<local-command-stderr>",
    "<local-command-caveat>", "<bash-input>", "<bash-stdout>", "<bash-stderr>", "<task-notification>",
    "<system-reminder>", "<user-memory-input>", "<teammate-message", "Caveat: The messages below were generated",
)  # fmt: skip
INTERRUPTED = "[Request interrupted"


@dataclass(slots=True, eq=False)
class Node:
    """A record that takes part in the conversation. `kind`: user, assistant, compact or micro."""

    record: Line
    line: int
    order: int
    kind: str
    parent: Node | None = None
    #: `parentUuid` names a record that the file does not have.
    dangling: bool = False
    dropped: bool = False
    children: list[Node] = field(default_factory=list)

    @property
    def answers(self) -> bool:
        """True when it holds tool results."""
        content = self.record.message.content if self.record.message else ""
        return self.kind == "user" and not isinstance(content, str) and any(b.tool_use_id for b in content)

    @property
    def injected(self) -> str | None:
        """What kind of injected text a user record is; None when the user wrote it."""
        return injected_kind(self.record)


def injected_kind(record: Line) -> str | None:
    """Name what put a user record there: meta, command, interruption, summary; None: the user did."""
    if record.isCompactSummary:
        return "compact_summary"
    if record.isMeta:
        return "meta"
    if record.message is None:
        return None
    texts = [b.text or "" for b in blocks_of(record.message) if b.type == "text"]
    if texts and texts[0].startswith(INTERRUPTED):
        return "interruption"
    stripped = [t.lstrip() for t in texts]
    if stripped and all(t.startswith(INJECTED) for t in stripped):
        return "command"
    return None


@dataclass(slots=True)
class Conversation:
    """The records of one session, or of one sub-agent of it, in file order."""

    session_id: str
    agent_id: str | None
    nodes: list[Node] = field(default_factory=list)
    #: Records of an earlier session of the same file that this one resumed: context, not its own steps.
    prefix: list[Node] = field(default_factory=list)


class Forest:
    """Collects the records of one file into conversations."""

    def __init__(self) -> None:
        self.conversations: dict[tuple[str, str | None], Conversation] = {}
        self.by_uuid: dict[str, Node] = {}
        self._through: dict[str, str | None] = {}
        self._chain_of: dict[str, str | None] = {}
        self._last_sidechain: dict[str, str] = {}
        self._homes: dict[int, Conversation] = {}
        self._count = 0

    @property
    def size(self) -> int:
        """How many conversation records were added so far."""
        return self._count

    def chain(self, record: Line) -> str | None:
        """The sub-agent whose conversation an added record belongs to; None: the main one."""
        return self._chain_of.get(record.uuid or "")

    def known(self, uuid: str | None) -> bool:
        """True when a record with this uuid was added before."""
        return uuid is not None and (uuid in self.by_uuid or uuid in self._through)

    def pass_through(self, record: Line) -> None:
        """Remember a record that is only a link of the tree (progress, system, attachment)."""
        if record.uuid is not None:
            self._through[record.uuid] = record.parentUuid
            self._chain_of[record.uuid] = self._chain(record)

    def add(self, record: Line, line: int, kind: str) -> Node:
        """Add a record of the conversation."""
        node = Node(record, line, self._count, kind)
        self._count += 1
        chain = self._chain(record)
        key = (record.sessionId or "", chain)
        home = self.conversations.get(key)
        if home is None:
            home = self.conversations[key] = Conversation(key[0], chain)
        node.parent, node.dangling = self._resolve(record.parentUuid)
        if node.parent is not None:
            node.parent.children.append(node)
        home.nodes.append(node)
        self._homes[node.order] = home
        if record.uuid is not None:
            self.by_uuid[record.uuid] = node
            self._chain_of[record.uuid] = chain
        return node

    def _chain(self, record: Line) -> str | None:
        """None for the main conversation, else the name of the sub-agent's."""
        if not record.isSidechain:
            return None
        if record.agentId:
            return record.agentId
        session = record.sessionId or ""
        chain = self._chain_of.get(record.parentUuid or "")
        if chain is None and record.parentUuid is not None:
            chain = self._last_sidechain.get(session)
        if chain is None:
            chain = "sidechain-" + (record.uuid or str(self._count))[:8]
        self._last_sidechain[session] = chain
        return chain

    def _resolve(self, uuid: str | None) -> tuple[Node | None, bool]:
        """Find the conversation record above, walking through links; (None, True) when it is not there."""
        seen = set()
        while uuid is not None:
            if uuid in self.by_uuid:
                return self.by_uuid[uuid], False
            if uuid not in self._through or uuid in seen:
                return None, True
            seen.add(uuid)
            uuid = self._through[uuid]
        return None, False

    def finish(self) -> list[Conversation]:
        """Mark rewound branches, attach resumed sessions to their past, and return the conversations."""
        for conversation in self.conversations.values():
            self._drop_rewound(conversation)
        for conversation in self.conversations.values():
            if conversation.agent_id is None:
                self._attach(conversation)
        return list(self.conversations.values())

    def _drop_rewound(self, conversation: Conversation) -> None:
        """A new prompt (or a new model answer) beside an older one replaces it, if the older branch ended."""
        siblings: dict[int, list[Node]] = defaultdict(list)
        for node in conversation.nodes:
            if node.parent is not None and node.kind in ("user", "assistant"):
                siblings[node.parent.order].append(node)
        for group in siblings.values():
            for position, node in enumerate(group[1:], 1):
                for older in group[:position]:
                    if not older.dropped and self._replaces(node, older, conversation):
                        self._drop(older, conversation)

    def _replaces(self, node: Node, older: Node, conversation: Conversation) -> bool:
        if self._homes[node.parent.order] is not conversation or node.kind != older.kind:
            return False
        if node.kind == "user":
            prompts = not node.answers and not older.answers and node.injected is None
            return prompts and self._last_order(older, conversation) < node.order
        same = node.record.message.id == older.record.message.id or node.parent.kind == "assistant"
        return not same and self._last_order(older, conversation) < node.order

    def _last_order(self, node: Node, conversation: Conversation) -> int:
        return max(n.order for n in self._subtree(node, conversation))

    def _drop(self, node: Node, conversation: Conversation) -> None:
        for below in self._subtree(node, conversation):
            below.dropped = True

    def _subtree(self, node: Node, conversation: Conversation) -> list[Node]:
        found, stack = [], [node]
        while stack:
            top = stack.pop()
            found.append(top)
            stack.extend(c for c in top.children if self._homes[c.order] is conversation)
        return found

    def _attach(self, conversation: Conversation) -> None:
        parent = conversation.nodes[0].parent
        if parent is None:
            return
        past = self._homes[parent.order]
        if past is conversation or past.agent_id is not None:
            return
        kept = [*past.prefix, *past.nodes]
        conversation.prefix = [n for n in kept if n.order <= parent.order and not n.dropped]
