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


@hookimpl
def register_hint_generators(register) -> None:
    register(Entry("template", "one template per error class", "composer_plugins.hints.templates:TemplateHints"))


@hookimpl
def register_teachers(register) -> None:
    teachers = "composer_plugins.teachers"
    register(Entry("openai", "any server that speaks the OpenAI chat API", f"{teachers}.openai_api:OpenAITeacher"))
    register(Entry("local", "an in-process transformers model (demonstration)", f"{teachers}.local:LocalTeacher"))


@hookimpl
def register_rewards(register) -> None:
    rewards = "composer_plugins.rewards.tool_call"
    register(Entry("tool_call", "graded: parses, known tool, valid arguments, agrees", f"{rewards}:ToolCallReward"))
