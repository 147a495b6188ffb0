"""OpenAITeacher against a real HTTP server on loopback: what servers do, and what must come out."""

from __future__ import annotations

import json
import logging
import socket

import pytest

from composer_plugins.errors import TeacherError
from composer_plugins.teachers.base import TeacherStopped, reason_of
from composer_plugins.teachers.config import OpenAIConfig
from composer_plugins.teachers.openai_api import OpenAITeacher
from composer_plugins.traces.schema import Hint, Message, Status, ToolCall

KEY = "sk-very-secret-0123456789"


@pytest.fixture
def teacher_of():
    built = []

    def make(url: str, **options) -> OpenAITeacher:
        defaults = {"name": "t", "kind": "openai", "base_url": url, "model": "m", "timeout_s": 5.0, "max_retries": 2}
        built.append(OpenAITeacher(OpenAIConfig(**(defaults | options))))
        return built[-1]

    yield make
    for teacher in built:
        teacher.close()


def test_tool_calls_text_calls_and_plain_text(chat_server, teacher_of, make_state, reply):
    answers = [
        reply.completion(calls=[("Read", '{"file_path": "a.py"}')]),
        reply.completion('Look.\n<tool_call>\n{"name": "Read", "arguments": {"file_path": "b.py"}}\n</tool_call>'),
        reply.completion("I cannot."),
        reply.completion(calls=[("Read", '{"file_path": ')]),
        reply.completion(calls=[("Read", '["not an object"]')]),
        reply.completion(calls=[("Read", {"file_path": "c.py"})]),  # some servers send an object
    ]
    server = chat_server(lambda body, n: answers[int(body["messages"][1]["content"].split()[-1][:-1])])
    found = teacher_of(server.url).ask([make_state(i) for i in range(6)])
    assert [r.error for r in found] == [None] * 6
    assert [r.state_id for r in found] == [f"t:{i}" for i in range(6)]
    calls = [r.action.tool_calls for r in found]
    assert calls[0][0].arguments == {"file_path": "a.py"} and calls[1][0].arguments == {"file_path": "b.py"}
    assert found[1].action.content == "Look." and found[2].action.content == "I cannot." and not calls[2]
    assert calls[3][0].raw_arguments == '{"file_path": ' and calls[4][0].raw_arguments == '["not an object"]'
    assert calls[5][0].arguments == {"file_path": "c.py"} and calls[5][0].raw_arguments is None
    assert found[0].prompt_tokens == 11 and found[0].completion_tokens == 7 and found[0].finish_reason == "stop"
    assert found[0].weights_id == "model:m" and not found[0].demonstration


def test_the_request_is_the_state_without_action_and_hint(chat_server, teacher_of, make_state, reply):
    server = chat_server(lambda body, n: reply.completion("x"))
    history = [
        Message(role="user", content="hi"),
        Message(role="assistant", tool_calls=[ToolCall(id="1", name="Read", arguments={"file_path": "é"})]),
        Message(role="tool", content="gone", tool_call_id="1", name="Read"),
    ]
    hint = Hint(text="HINT", error_class="e", status=Status.ERROR, generator="g")
    action = Message(role="assistant", content="RECORDED")
    teacher_of(server.url, temperature=None, max_tokens=None, extra_body={"top_k": 5}).ask(
        [make_state(0, messages=history, hint=hint, action=action)]
    )
    body = server.requests[0]
    assert "HINT" not in json.dumps(body) and "RECORDED" not in json.dumps(body)
    assert body["messages"][1] == {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "Read", "arguments": '{"file_path": "é"}'}}
        ],
    }
    assert body["messages"][2]["tool_call_id"] == "1" and body["tools"][0]["function"]["name"] == "Read"
    assert body["top_k"] == 5 and "temperature" not in body and "max_tokens" not in body


def test_500_then_ok_is_retried(chat_server, teacher_of, make_state, reply):
    server = chat_server(lambda body, n: reply.Reply(b"{}", 500) if n == 0 else reply.completion("fine"))
    [found] = teacher_of(server.url).ask([make_state(0)])
    assert found.error is None and found.action.content == "fine" and len(server.requests) == 2


def test_429_waits_as_long_as_retry_after_says(chat_server, teacher_of, make_state, reply):
    server = chat_server(
        lambda body, n: reply.Reply(b"{}", 429, {"Retry-After": "1.5"}) if n == 0 else reply.completion("fine")
    )
    [found] = teacher_of(server.url).ask([make_state(0)])
    assert found.error is None
    assert server.times[1] - server.times[0] >= 1.5


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (lambda r: r.Reply(b"not json at all"), "malformed"),
        (lambda r: r.Reply(b'{"choices": ['), "malformed"),
        (lambda r: r.Reply(b'{"error": {"message": "overloaded"}}'), "malformed"),
        (lambda r: r.Reply(b'{"choices": []}'), "malformed"),
        (lambda r: r.Reply(b"<html>", headers={"Content-Type": "text/html"}), "malformed"),
        (lambda r: r.Reply(b'{"choices": [{"message": {"content": "\xff\xfe"}}]}'), "malformed"),
        (lambda r: r.Reply(b"{}", 503), "server_error"),
        (lambda r: r.Reply(b"{}", 429), "rate_limited"),
        (lambda r: r.Reply(b'{"error": {"message": "too many tokens"}}', 400), "refused"),
        (lambda r: r.Reply(delay=3), "timeout"),
        (lambda r: r.Reply(drop=True), "connection"),
        (lambda r: r.Reply(status=302, headers={"Location": "http://127.0.0.1:9/v1"}), "refused"),
    ],
)  # fmt: skip
def test_one_bad_state_does_not_spoil_the_batch(chat_server, teacher_of, make_state, reply, bad, reason):
    def script(body, n):
        return bad(reply) if "file 1." in body["messages"][1]["content"] else reply.completion("ok")

    server = chat_server(script)
    found = teacher_of(server.url, timeout_s=0.5, max_retries=1).ask([make_state(i) for i in range(3)])
    assert [r.action and r.action.content for r in found] == ["ok", None, "ok"]
    assert reason_of(found[1].error) == reason, found[1].error


def test_no_server_at_all(teacher_of, make_state):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    [found] = teacher_of(f"http://127.0.0.1:{port}/v1", max_retries=0).ask([make_state(0)])
    assert reason_of(found.error) == "connection"


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_key_stops_at_once_and_never_shows_the_key(
    chat_server, teacher_of, make_state, reply, monkeypatch, caplog, status
):
    monkeypatch.setenv("T_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    body = json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}"}}).encode()
    server = chat_server(lambda request, n: reply.completion("ok") if n == 0 else reply.Reply(body, status))
    teacher = teacher_of(server.url, api_key_env="T_KEY", max_concurrency=1)
    with pytest.raises(TeacherStopped) as stopped:
        teacher.ask([make_state(i) for i in range(8)])
    assert len(server.requests) == 2, "the rest must not be sent"
    assert [r.state_id for r in stopped.value.replays] == ["t:0"], "what had arrived must be kept"
    assert server.authorizations[0] == f"Bearer {KEY}"
    text = str(stopped.value) + caplog.text + repr(teacher.config) + repr(vars(stopped.value))
    assert KEY not in text and "[key]" in str(stopped.value)


def test_a_key_in_a_single_failure_is_removed(chat_server, teacher_of, make_state, reply, monkeypatch):
    monkeypatch.setenv("T_KEY", KEY)
    server = chat_server(lambda body, n: reply.Reply(f"no {KEY}".encode(), 400))
    [found] = teacher_of(server.url, api_key_env="T_KEY").ask([make_state(0)])
    assert reason_of(found.error) == "refused" and KEY not in found.error


def test_missing_key_and_foreign_host_are_refused_before_anything_is_sent(monkeypatch):
    monkeypatch.delenv("T_KEY", raising=False)
    local = {"name": "t", "kind": "openai", "model": "m", "base_url": "http://localhost:1/v1"}
    with pytest.raises(TeacherError, match="T_KEY"):
        OpenAITeacher(OpenAIConfig(**local, api_key_env="T_KEY"))
    with pytest.raises(TeacherError, match=r"no scrubber.*allow_unscrubbed: true"):
        OpenAITeacher(OpenAIConfig(**local | {"base_url": "https://api.example.com/v1"}))
    # Looks local, is not.
    for host in ("localhost.example.com", "127.0.0.1.example.com", "0.0.0.0", "10.0.0.3"):
        with pytest.raises(TeacherError):
            OpenAITeacher(OpenAIConfig(**local | {"base_url": f"http://{host}/v1"}))
    OpenAITeacher(OpenAIConfig(**local | {"base_url": "https://api.example.com/v1"}, allow_unscrubbed=True)).close()


def test_a_proxy_does_not_carry_loopback_traffic_away(chat_server, teacher_of, make_state, reply, monkeypatch):
    proxy = chat_server(lambda body, n: reply.completion("from the proxy"))
    server = chat_server(lambda body, n: reply.completion("from the server"))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy.url.removesuffix("/v1"))
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    [found] = teacher_of(server.url).ask([make_state(0)])
    assert found.action.content == "from the server" and not proxy.requests


def test_no_more_than_max_concurrency_in_flight(chat_server, teacher_of, make_state, reply):
    def script(body, n):
        answer = reply.completion("x")
        answer.delay = 0.1
        return answer

    server = chat_server(script)
    teacher_of(server.url, max_concurrency=3).ask([make_state(i) for i in range(9)])
    assert server.most_in_flight == 3
