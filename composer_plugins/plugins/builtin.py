"""The built-ins, registered through the same hooks as any third-party plugin."""

from __future__ import annotations

from composer_plugins import hookimpl
from composer_plugins.plugins.registry import Entry


@hookimpl
def register_objectives(register) -> None:
    policy = "composer_plugins.losses.policy"
    register(Entry("grpo", "clipped ratio, mean over tokens then sequences, (R-mean)/std", f"{policy}:GRPO"))
    register(Entry("dr_grpo", "clipped ratio, constant length denominator, R-mean without std", f"{policy}:DR_GRPO"))
    register(Entry("bnpo", "TRL's bnpo: mean over the tokens of the local micro-batch", f"{policy}:BNPO"))
    register(Entry("dapo", "clip-higher 0.28, mean over the tokens of the global batch", f"{policy}:DAPO"))
    register(Entry("gspo", "sequence-level ratio and clip", f"{policy}:GSPO"))
    register(Entry("cispo", "clipped detached importance weight times log-probability", f"{policy}:CISPO"))


@hookimpl
def register_channels(register) -> None:
    channels = "composer_plugins.channels"
    register(Entry("policy", "policy-gradient objective from the menu", f"{channels}.policy:SPEC"))
    register(Entry("sdpo", "hint-conditioned self-distillation at error turns", f"{channels}.sdpo:SPEC"))
    register(Entry("replay_dpo", "DPO on pairs from trace replay (our addition)", f"{channels}.replay_dpo:SPEC"))


@hookimpl
def register_trace_readers(register) -> None:
    register(Entry("claude_code", "Claude Code session JSONL", "composer_plugins.traces.claude_code:READER"))
    traces = "composer_plugins.traces"
    register(Entry("swe_agent", "SWE-agent .traj document, 0.x and 1.x", f"{traces}.swe_agent:READER"))
    register(Entry("mini_swe_agent", "mini-swe-agent trajectory, v1 and v2", f"{traces}.mini_swe_agent:READER"))
    register(
        Entry(
            "openhands",
            "OpenHands output.jsonl, event streams and conversation folders, V0 and V1",
            f"{traces}.openhands:READER",
        )
    )
    register(Entry("verifiers", "rollouts saved by verifiers and prime-rl", f"{traces}.verifiers_rollouts:READER"))
    register(Entry("verl", "generation dumps of verl's trainers", f"{traces}.verl_rollouts:READER"))
    register(Entry("trl", "TRL conversational datasets, JSONL or JSON", f"{traces}.trl_dataset:READER"))
    register(Entry("atif", "ATIF trajectories 1.x, JSON or JSONL", f"{traces}.atif:READER"))
    register(Entry("openai_messages", "OpenAI chat messages, JSON or JSONL", f"{traces}.openai_messages:READER"))
    register(Entry("codex", "Codex CLI rollouts (JSONL)", "composer_plugins.traces.codex:READER"))
    register(Entry("gemini_cli", "Gemini CLI sessions and saved chats", "composer_plugins.traces.gemini_cli:READER"))
    register(Entry("cline", "Cline tasks and sessions", "composer_plugins.traces.cline:READER"))


@hookimpl
def register_hint_generators(register) -> None:
    hints = "composer_plugins.hints"
    register(Entry("template", "one template per error class", f"{hints}.templates:TemplateHints"))
    register(Entry("feedback", "the error text itself, trimmed", f"{hints}.feedback:FeedbackHints"))
    register(Entry("sibling", "what a later or parallel attempt did differently", f"{hints}.sibling:SiblingHints"))
    register(Entry("llm", "any OpenAI-compatible endpoint, cached", f"{hints}.llm:LLMHints"))


@hookimpl
def register_teachers(register) -> None:
    teachers = "composer_plugins.teachers"
    register(Entry("openai", "any server that speaks the OpenAI chat API", f"{teachers}.openai_api:OpenAITeacher"))
    register(Entry("local", "an in-process transformers model (demonstration)", f"{teachers}.local:LocalTeacher"))


@hookimpl
def register_rewards(register) -> None:
    rewards = "composer_plugins.rewards.tool_call"
    register(Entry("tool_call", "graded: parses, known tool, valid arguments, agrees", f"{rewards}:ToolCallReward"))
