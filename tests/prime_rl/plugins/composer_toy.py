"""A verifiers taskset, harness and renderer for the tests: two file tools, one of which fails when it is told to.

The harness talks to verifiers' own interception server, so the rollout is verifiers' own from end to end; only the
program inside the box is a loop in this process.
"""

from __future__ import annotations

import json
import re

import httpx
import verifiers.v1 as vf
from renderers.base import ParsedResponse, ParsedToolCall, ToolCallParseStatus
from renderers.configs import BaseRendererConfig
from renderers.default import DefaultRenderer, DefaultRendererConfig
from verifiers.v1.runtimes import ProgramResult

__all__ = ["ToyHarness", "ToyTaskset"]

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": name,
            "parameters": {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
        },
    }
    for name in ("bash", "list_files")
]


class ToyData(vf.TaskData):
    results: tuple[str, ...] = ()
    """What the tool answers, call by call; then the episode ends."""
    score: float = 0.0
    wanted: str | None = None
    """The last answer that earns the score; None: any."""
    hint: str | None = None


class ToyTask(vf.Task[ToyData]):
    @vf.reward
    async def recorded_score(self, trace) -> float:
        said = [node.message.content for node in trace.nodes if node.message.role == "assistant"]
        return self.data.score if self.data.wanted in (None, said[-1] if said else "") else 0.0


class ToyTasksetConfig(vf.TasksetConfig):
    tasks: tuple[dict, ...] = ()


class ToyTaskset(vf.Taskset[ToyTask, ToyTasksetConfig]):
    def load(self):
        for i, task in enumerate(self.config.tasks):
            yield ToyTask(ToyData(idx=i, **task), self.config.task)


class ToyHarnessConfig(vf.HarnessConfig):
    pass


class ToyHarness(vf.Harness[ToyHarnessConfig]):
    APPENDS_SYSTEM_PROMPT = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def setup(self, runtime) -> None:
        pass

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data) -> ProgramResult:
        messages = [{"role": "user", "content": data.prompt}]
        headers = {"Authorization": f"Bearer {secret}"}
        async with httpx.AsyncClient(timeout=120, headers=headers) as client:
            for result in [*data.results, None]:
                body = {"model": ctx.model, "messages": messages, "tools": TOOLS}
                answer = await client.post(f"{endpoint}/chat/completions", json=body)
                answer.raise_for_status()
                message = answer.json()["choices"][0]["message"]
                messages.append({k: v for k, v in message.items() if v is not None})
                calls = message.get("tool_calls") or []
                if result is None or not calls:
                    break
                messages += [{"role": "tool", "tool_call_id": c["id"], "content": result} for c in calls]
        return ProgramResult(0, "", "")


class ToyRendererConfig(BaseRendererConfig):
    name: str = "toy"


_CALL = re.compile(r"<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)


class ToyRenderer(DefaultRenderer):
    """The tokenizer's own chat template, with tool calls read from the text."""

    config_class = ToyRendererConfig
    supports_tools = True

    def __init__(self, tokenizer, config=None) -> None:
        super().__init__(tokenizer, DefaultRendererConfig())

    def parse_response(self, token_ids, *, tools=None, prompt_ids=None) -> ParsedResponse:
        text = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        calls = [
            ParsedToolCall(
                raw=found, name=json.loads(found)["name"], arguments=json.loads(found)["arguments"],
                status=ToolCallParseStatus.OK,
            )
            for found in _CALL.findall(text)
        ]  # fmt: skip
        return ParsedResponse(content=_CALL.sub("", text).strip(), tool_calls=calls)
