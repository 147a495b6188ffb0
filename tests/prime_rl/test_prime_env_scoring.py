"""Scoring token ids over HTTP: the numbers, and every way in which a server can fail."""

import asyncio
import math
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent / "plugins"))

from composer_prime_rl.scoring import Endpoint, PrefillScorer, ScoringError, ScoringOptions
from prime_policy_server import GARBAGE, PolicyServer

IDS = [5, 9, 3, 7, 7, 30, 2]


@pytest.fixture(scope="module")
def tiny():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def server(tiny):
    server = PolicyServer(tiny, None, "policy")
    yield server
    server.close()


def score(server, *, start=3, ids=IDS, **options):
    async def ask():
        scorer = PrefillScorer(ScoringOptions(**{"backoff": 0.0, "timeout": 20, **options}))
        try:
            return await scorer.score(Endpoint(server.base_url, "policy", "key", {"X-A": "b"}, "v7"), ids, start)
        finally:
            await scorer.aclose()

    return asyncio.run(ask())


def test_the_log_probs_are_the_models_own(server, tiny):
    found = score(server)
    logits = tiny(input_ids=torch.tensor([IDS])).logits[0].double()
    rows = logits - logits.logsumexp(-1, keepdim=True)
    assert found == pytest.approx([float(rows[i - 1, IDS[i]]) for i in range(3, len(IDS))], abs=1e-5)


def test_the_request_is_the_one_that_prime_rl_sends(server):
    score(server)
    (request,) = server.requests
    assert request["path"] == "/inference/v1/generate"  # at the root, although the base URL ends in /v1
    assert request["token_ids"] == IDS and request["model"] == "policy" and request["cache_salt"] == "v7"
    assert request["sampling_params"] == {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "prompt_logprobs": 1}
    assert request["headers"]["Authorization"] == "Bearer key" and request["headers"]["X-A"] == "b"


@pytest.mark.parametrize("fault", ["500", "503", "429", "close", "html", *GARBAGE])
def test_a_passing_fault_is_tried_again(server, fault):
    clean = score(server)
    server.requests.clear()
    server.faults.extend([fault, fault])
    assert score(server, retries=2) == clean
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("500", "server_error"), ("429", "server_error"), ("close", "unreachable"), ("html", "garbage")]
    + [(name, "garbage") for name in GARBAGE],
)
def test_a_lasting_fault_is_an_error_with_its_reason(server, fault, reason):
    server.faults.extend([fault] * 2)
    with pytest.raises(ScoringError) as found:
        score(server, retries=1)
    assert found.value.reason == reason
    assert len(server.requests) == 2


def test_a_refusal_is_not_repeated(server):
    server.faults.append("400")
    with pytest.raises(ScoringError) as found:
        score(server, retries=5)
    assert found.value.reason == "refused" and len(server.requests) == 1


@pytest.mark.parametrize("fault", ["hang", "drip"])
def test_a_server_that_hangs_or_drips_costs_no_more_than_the_timeout(server, fault):
    server.faults.extend([fault] * 2)
    begin = time.monotonic()
    with pytest.raises(ScoringError) as found:
        score(server, timeout=0.3, retries=1)
    assert found.value.reason == "timeout" and time.monotonic() - begin < 2.5


def test_no_server_at_all():
    class Nowhere:
        base_url = "http://127.0.0.1:9/v1"

    with pytest.raises(ScoringError) as found:
        score(Nowhere, retries=0)
    assert found.value.reason == "unreachable"


def test_a_certain_token_may_round_above_zero_but_no_further(server, monkeypatch):
    entries = server.prompt_logprobs(IDS)
    entries["prompt_logprobs"][3] = {str(IDS[3]): {"logprob": 1e-6}}
    monkeypatch.setattr(server, "prompt_logprobs", lambda ids: entries)
    assert score(server)[0] == 0.0 and all(math.isfinite(value) for value in score(server))


@pytest.mark.parametrize("start", [0, len(IDS)])
def test_a_span_has_a_token_before_it_and_one_in_it(server, start):
    with pytest.raises(ValueError, match="Expected 1 <= start"):
        score(server, start=start)
