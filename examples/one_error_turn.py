"""One error turn from log line to gradient, with real numbers (docs/tutorial/one-error-turn.md explains them).

    python examples/one_error_turn.py                          # the shipped sample, the Edit that failed on line 142
    python examples/one_error_turn.py --log session.jsonl --result-line 73

It reads the log, cuts the state to a token budget, writes and splices the hint, and then scores the recorded
action twice with one model: as the student (no hint) and as the self-teacher (hint). No training is done.
"""

from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path

import torch
from composer_trl.hinted_turns import HintedTurn, HintSplicer
from composer_trl.model_access import ModelAccess
from composer_trl.self_teacher import SelfTeacher

from composer_plugins.channels.levels import SignalLevel
from composer_plugins.channels.sdpo import resolve_level, sdpo_term, sdpo_values
from composer_plugins.config import SDPOConfig, TeacherWeights
from composer_plugins.hints.apply import add_hints
from composer_plugins.hints.templates import TemplateHints
from composer_plugins.models import install_tool_template, load_model, token_counter
from composer_plugins.traces.ingest import find_reader
from composer_plugins.traces.ledger import Ledger
from composer_plugins.traces.schema import State
from composer_plugins.traces.states import build_states

SAMPLE = Path(str(files("composer_plugins") / "data" / "samples" / "claude_code_session.jsonl"))


def find_state(log: Path, result_line: int, budget: int, count_tokens) -> State:
    """Return the hinted state of the step whose failed result stands on a physical line of the log."""
    traces = find_reader(log).read(log, Ledger(read=0, used=0))
    for state in add_hints(build_states(traces, budget=budget, count_tokens=count_tokens), TemplateHints()):
        if state.hint is not None and any(r.source_ref and r.source_ref.line == result_line for r in state.results):
            return state
    raise SystemExit(f"No failed tool result on line {result_line} of {log} that fits {budget} tokens.")


def action_ids(tokenizer, state: State, context: list[int]) -> list[int]:
    """Return the recorded action's ids as the model would have sampled them: up to its end-of-turn token."""
    messages = [m.to_chat() for m in [*state.messages, state.action]]
    full = list(tokenizer.apply_chat_template(messages, tools=state.tool_schemas(), tokenize=True, return_dict=False))
    assert full[: len(context)] == context, "the chat template rewrites the context after an action"
    ids = full[len(context) :]
    return ids[: ids.index(tokenizer.eos_token_id) + 1]


def score(model, config: SDPOConfig, context: list[int], action: list[int], turn: HintedTurn):
    """Return (term, divergence (N,), student logits, teacher logits) of one turn, the student with gradient."""
    access, teacher = ModelAccess(model), SelfTeacher(model, config.teacher)
    ids = torch.tensor([context + action])
    student = access.hidden(ids, torch.ones_like(ids))[0, len(context) - 1 : -1]
    read = teacher.hidden([turn], [torch.tensor(action)], 0, weights=teacher.weights)
    student_logits, teacher_logits = access.logits(student), access.logits(read, teacher.weights).detach()
    level = resolve_level(config, (SignalLevel.FULL,))
    values, divergence = sdpo_values(config, level, student_logits=student_logits, teacher_logits=teacher_logits)
    term = sdpo_term(config, values, denominator=float(len(action)), divergence=divergence)
    return term, divergence, student_logits.detach(), teacher_logits


def print_tokens(tokenizer, action: list[int], divergence, student, teacher, count: int) -> None:
    """List the first tokens of the action: how far the hint moved the model at each."""
    print("\n  t  token         KL(S||T)   log-prob: no hint     hint   top token: no hint, hint")
    for i, token in enumerate(action[:count]):
        top = [repr(tokenizer.decode([int(x[i].argmax())])) for x in (student, teacher)]
        print(
            f"{i:3}  {tokenizer.decode([token])!r:12} {float(divergence[i]):9.4f} {float(student[i, token]):20.3f} "
            f"{float(teacher[i, token]):8.3f}   {top[0]:12} {top[1]}"
        )


def print_tools(tokenizer, state: State, action: list[int], divergence, student, teacher) -> None:
    """List, where the action names its tool, the log-prob of every tool's name (its first token) and its push.

    The push is -dKL/dlogit = S (KL - log S + log T): above 0, gradient descent makes the token more likely.
    """
    texts = [tokenizer.decode(action[:i]) for i in range(len(action))]
    t = next((i for i, text in enumerate(texts) if text.endswith('"name": "')), None)
    if t is None:
        return
    print(f"\nat t = {t}, the tool's name\n  tool       log-prob: no hint     hint      push")
    for name in sorted(state.tools):
        token = tokenizer.encode(name, add_special_tokens=False)[0]
        log_s, log_t = student[t, token], teacher[t, token]
        push = log_s.exp() * (divergence[t] - log_s + log_t)
        print(f"  {name:10} {float(log_s):17.3f} {float(log_t):8.3f} {float(push):+9.4f}")


def gradient_norm(model, term) -> float:
    """Return the L2 norm over all parameters of the term's gradient."""
    model.zero_grad(set_to_none=True)
    term.loss().backward()
    return float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, default=SAMPLE)
    parser.add_argument("--result-line", type=int, default=142)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=24, help="how many tokens of the action to list")
    parser.add_argument("--tail", type=int, default=45, help="how many tokens of the context's end to show")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    model, tokenizer = load_model(arguments.model)
    install_tool_template(tokenizer)
    tokenizer.model_max_length = int(1e30)  # states are counted before they are cut
    state = find_state(arguments.log, arguments.result_line, arguments.budget, token_counter(tokenizer))
    messages = [m.to_chat() for m in state.messages]
    context = list(
        tokenizer.apply_chat_template(
            messages, tools=state.tool_schemas(), add_generation_prompt=True, tokenize=True, return_dict=False
        )
    )
    action = action_ids(tokenizer, state, context)
    hinted = HintSplicer(tokenizer, role="user").splice(context, state.hint.text)
    size = len(hinted) - len(context)
    print(f"state {state.id}: {len(context)} tokens, cut {state.cut}")
    print(f"hint ({state.hint.error_class}), spliced in as {size} tokens: {state.hint.text}\n")
    print(f"--- the student reads ...\n{tokenizer.decode(context[-arguments.tail :])}")
    print(f"--- the self-teacher reads ...\n{tokenizer.decode(hinted[-arguments.tail - size :])}\n")

    config = SDPOConfig(weight=1.0, teacher=TeacherWeights(kind="live"))
    mask = [True] * len(action)
    for name, prefix, hint in (("no hint", context, ""), ("hint", hinted, state.hint.text)):
        turn = HintedTurn(0, len(action), mask, prefix, hint, "recorded")
        term, divergence, student, teacher = score(model, config, context, action, turn)
        print(
            f"{name}: {term.metrics['sdpo/tokens']:.0f} tokens, {term.metrics['sdpo/active_tokens']:.0f} active, "
            f"mean divergence {term.metrics['sdpo/divergence']:.4f} nats, loss {float(term.loss().detach()):.4f}, "
            f"gradient norm {gradient_norm(model, term):.4g}"
        )
    student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    print_tokens(tokenizer, action, divergence, student, teacher, arguments.tokens)
    print_tools(tokenizer, state, action, divergence, student, teacher)


if __name__ == "__main__":
    main()
