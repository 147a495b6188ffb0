"""A reader: one tab-separated record a line, the first names the format."""

import json

from composer_plugins.traces.classify import classify_text
from composer_plugins.traces.ledger import Problem
from composer_plugins.traces.lines import iter_lines
from composer_plugins.traces.schema import Message, SourceRef, Step, ToolCall, ToolResult, Trace
from composer_plugins.traces.tools import infer_tools

MAGIC = b"ACME-LOG\t1\t"


class AcmeReader:
    name = "acme"

    def sniff(self, head):
        return head.startswith(MAGIC)

    def read(self, path, counts):
        trace = Trace(id=path.stem, format=self.name, messages=[], steps=[], source_file=str(path))
        for number, raw in iter_lines(path):
            counts["read"] += 1
            ref = SourceRef(file=str(path), line=number)
            try:
                kind, *fields = raw.decode().split("\t")
                getattr(self, "_" + kind.replace("-", "_").lower())(trace, ref, *fields)
            except (ValueError, TypeError, AttributeError, LookupError) as error:
                counts["skipped:malformed_record"] += 1
                getattr(counts, "problems", []).append(Problem(str(path), number, "malformed_record", str(error)))
            else:
                counts["used"] += 1
        trace.tools = infer_tools(trace.messages)
        yield trace

    def _acme_log(self, trace, ref, version, session):
        trace.id = trace.session_id = session

    def _user(self, trace, ref, text):
        trace.messages.append(Message(role="user", content=text))

    def _act(self, trace, ref, call_id, tool, arguments):
        call = ToolCall(id=call_id, name=tool, arguments=json.loads(arguments))
        trace.steps.append(Step(index=len(trace.steps), action=len(trace.messages), source_ref=ref))
        trace.messages.append(Message(role="assistant", tool_calls=[call]))

    def _ret(self, trace, ref, call_id, text):
        call = trace.action_of(trace.steps[-1]).tool_calls[0]
        status, error_class, code = classify_text(text, tool=call.name)
        result = ToolResult(call_id=call_id, content=text, status=status, source_ref=ref)
        result.error_class, result.exit_code = error_class, code
        trace.steps[-1].results.append(result)
        trace.messages.append(Message(role="tool", content=text, tool_call_id=call_id, name=call.name))


READER = AcmeReader()
