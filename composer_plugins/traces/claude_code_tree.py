"""Which records of a Claude Code file belong together, and which were rewound.

The `parentUuid` tree is used for two things only: to find branches that the user rewound, and to attach a
resumed session to its past. Parallel calls fork the tree too, so the messages themselves are taken in file
order and never by a walk from the leaf to the root.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import msgspec

from composer_plugins.traces.claude_code_records import Line, blocks_of
from composer_plugins.traces.claude_code_rewound import drop_rewound
from composer_plugins.traces.copies import Seen

INJECTED = (
    "<command-name>", "<command-message>", "<command-args>", "<local-command-stdout>", "<local-command-stderr>",
    "<local-command-caveat>", "<bash-input>", "<bash-stdout>", "<bash-stderr>", "<task-notification>",
    "<system-reminder>", "<user-memory-input>", "<teammate-message", "Caveat: The messages below were generated",
)  # fmt: skip
INTERRUPTED = "[Request interrupted"

#: (session id, sub-agent or None) of a conversation.
Key = tuple[str, str | None]


class Node(msgspec.Struct, eq=False):
    """A record that takes part in the conversation. `kind`: user, assistant, compact or micro."""

    record: Line
    line: int
    order: int
    kind: str
    key: Key
    parent: Node | None = None
    #: `parentUuid` names a record that the file does not have.
    dangling: bool = False
    dropped: bool = False
    #: Another record of the conversation comes right after it.
    followed: bool = False

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
    if texts and all(t.lstrip().startswith(INJECTED) for t in texts):
        return "command"
    return None


@dataclass(slots=True, eq=False)
class Conversation:
    """The records of one session, or of one sub-agent of it, in file order."""

    key: Key
    nodes: list[Node] = field(default_factory=list)
    #: Records of an earlier session of the same file that this one resumed: context, not its own steps.
    prefix: list[Node] = field(default_factory=list)
    #: The session that it resumes, until `prefix` is known.
    past: Conversation | None = None
    #: No record of it is to come, and its prefix is known.
    complete: bool = False
    #: Conversations that ended first and continue this one.
    waiting: list[Conversation] = field(default_factory=list)
    #: (order before which, why) the context became another one than the messages show.
    changes: list[tuple[int, str]] = field(default_factory=list)
    #: How the program says that it ended (printed logs only).
    outcome: str | None = None
    #: Sub-agent → the call that started it.
    sub_agents: dict[str, str] = field(default_factory=dict)
    #: Several records come after the same one: an older branch may have been rewound.
    forked: bool = False

    @property
    def session_id(self) -> str:
        """The session, "" when the records name none."""
        return self.key[0]

    @property
    def agent_id(self) -> str | None:
        """The sub-agent, None for the session itself."""
        return self.key[1]


class Forest:
    """Collects the records of one file into conversations; `close` ends the conversations of a session."""

    def __init__(self) -> None:
        self.conversations: dict[Key, Conversation] = {}
        self._of_session: defaultdict[str, list[Conversation]] = defaultdict(list)
        self.by_uuid: dict[str, Node] = {}
        self._links: dict[str, tuple[str | None, Key]] = {}
        self._links_of: defaultdict[str, list[str]] = defaultdict(list)
        self._last_sidechain: dict[str, str] = {}
        self._forgotten = Seen()
        self._any_forgotten = False
        self._count = 0

    def known(self, uuid: str | None) -> bool:
        """True when a record with this uuid was added before."""
        if uuid is None:
            return False
        if uuid in self.by_uuid or uuid in self._links:
            return True
        return self._any_forgotten and _key(uuid) in self._forgotten

    def link(self, record: Line) -> Key:
        """Remember a record that is only a link of the tree (progress, system, attachment)."""
        key = (record.sessionId or "", self._chain(record) if record.isSidechain else None)
        if record.uuid is not None:
            self._links[record.uuid] = (record.parentUuid, key)
            self._links_of[key[0]].append(record.uuid)
        return key

    def changed(self, key: Key, reason: str) -> None:
        """Remember that a context is from here on another one than the messages show."""
        self._home(key).changes.append((self._count, reason))

    def add(self, record: Line, line: int, kind: str) -> Node:
        """Add a record of the conversation."""
        home = self._home((record.sessionId or "", self._chain(record) if record.isSidechain else None))
        parent = record.parentUuid or (record.logicalParentUuid if kind == "compact" else None)
        above, dangling = None, False
        if parent is not None:
            above = self.by_uuid.get(parent)
            if above is None:
                above, dangling = self._resolve(parent)
        elif record.session_id is not None:  # printed: each record follows the last, and the prompt may be missing
            above, dangling = (home.nodes[-1], False) if home.nodes else (None, kind == "assistant")
        if kind == "compact" and record.parentUuid is None:
            dangling = False  # the context starts anew here, whatever was before
        node = Node(record, line, self._count, kind, home.key, above, dangling)
        self._count += 1
        if above is not None and above.key == home.key and kind != "micro":
            home.forked = home.forked or above.followed
            above.followed = True
        if not home.nodes:
            home.past = self._resumed(node)
        home.nodes.append(node)
        if record.uuid is not None:
            self.by_uuid[record.uuid] = node
        return node

    def printed(self, record: Line) -> None:
        """Name the conversation of a record that the program printed; there is no tree then, each follows the last."""
        if record.sessionId is not None:
            record.session_id = None  # a record of the log, which says both
            return
        record.sessionId = record.session_id
        if record.parent_tool_use_id:
            record.isSidechain, record.agentId = True, record.parent_tool_use_id
            self._home((record.sessionId, None)).sub_agents.setdefault(record.agentId, record.agentId)
        elif record.type == "result":
            self._home((record.sessionId, None)).outcome = record.subtype

    def started(self, node: Node, agent_id: str, call_id: str) -> None:
        """Remember which call started a sub-agent."""
        self._home(node.key).sub_agents.setdefault(agent_id, call_id)

    def _home(self, key: Key) -> Conversation:
        home = self.conversations.get(key)
        if home is None:
            home = self.conversations[key] = Conversation(key)
            self._of_session[key[0]].append(home)
        return home

    def _chain(self, record: Line) -> str:
        """The name of the sub-agent whose conversation a sidechain record belongs to."""
        if record.agentId:
            return record.agentId
        session, chain = record.sessionId or "", None
        if record.parentUuid is not None:
            if record.parentUuid in self.by_uuid:
                chain = self.by_uuid[record.parentUuid].key[1]
            elif record.parentUuid in self._links:
                chain = self._links[record.parentUuid][1][1]
            chain = chain or self._last_sidechain.get(session)
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
            if uuid not in self._links or uuid in seen:
                return None, True
            seen.add(uuid)
            uuid = self._links[uuid][0]
        return None, False

    def close(self, sessions: list[str] | None = None, *, forget: bool = False) -> list[Conversation]:
        """End conversations: mark rewound branches, attach resumed sessions to their past.

        Args:
            sessions: those of which no record is to come; None: all.
            forget: drop what the file's later records can no longer refer to (their uuids stay known).

        Returns:
            The conversations that are complete, in the order of their first records. One that continues a session
            that has not ended yet comes with that one.
        """
        names = list(self._of_session) if sessions is None else sessions
        chosen = [c for name in names for c in self._of_session.get(name, ())]
        for conversation in chosen:
            drop_rewound(conversation)
        ready: list[Conversation] = []
        for conversation in chosen:
            if conversation.past is None or conversation.past.complete:
                self._complete(conversation, ready)
            else:
                conversation.past.waiting.append(conversation)
        if forget:
            self._forget(chosen, names)
        return ready

    @staticmethod
    def _complete(start: Conversation, ready: list[Conversation]) -> None:
        queue = [start]
        for conversation in queue:
            if (past := conversation.past) is not None:
                first, conversation.past = conversation.nodes[0], None
                parent, kept = first.parent, (*past.prefix, *past.nodes)
                conversation.prefix = [n for n in kept if n.order <= parent.order and not n.dropped]
                # what changed after the last record of the past changed the context that is gone on from, too
                until = first.order if past.nodes[-1] is parent else parent.order
                before = dict.fromkeys(reason for order, reason in past.changes if order <= until)
                conversation.changes[:0] = [(0, reason) for reason in before]
            conversation.complete = True
            ready.append(conversation)
            waiting, conversation.waiting = conversation.waiting, []
            queue.extend(waiting)

    def _resumed(self, first: Node) -> Conversation | None:
        """The session that the one which begins with `first` resumes, when the file has it."""
        parent = first.parent
        if parent is None or first.kind == "compact" or first.key[1] is not None or parent.key[1] is not None:
            return None
        return self.conversations.get(parent.key) if parent.key != first.key else None

    def _forget(self, chosen: list[Conversation], sessions: list[str]) -> None:
        self._any_forgotten = True
        for conversation in chosen:
            del self.conversations[conversation.key]
            for node in conversation.nodes:
                if node.record.uuid is not None and self.by_uuid.pop(node.record.uuid, None):
                    self._forgotten.add(_key(node.record.uuid))
        for session in sessions:
            self._of_session.pop(session, None)
            self._last_sidechain.pop(session, None)
            for uuid in self._links_of.pop(session, ()):
                if self._links.pop(uuid, None):
                    self._forgotten.add(_key(uuid))


def _key(uuid: str) -> int:
    return hash(uuid) & 0xFFFFFFFFFFFFFFFF
