"""What the report knows about metrics: unit, one line of meaning, and the group each is drawn in.

Nothing depends on a metric being listed: an unknown `<prefix>/<name>` is drawn under its prefix.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """A block of charts. `origin` says whose idea the channel is."""

    key: str
    title: str
    about: str
    origin: str = ""


CURSOR = "replicates Cursor's published Composer 2.5 recipe as far as it is public"
OURS = "our own addition, not part of Cursor's recipe"

GROUPS = (
    Group("policy", "Channel 1 · policy", "Policy gradient on the rewards of the rollouts.", CURSOR),
    Group(
        "sdpo", "Channel 2 · sdpo", "Self-distillation from the policy's own reading of a hint, at error turns.", CURSOR
    ),
    Group("replay_dpo", "Channel 3 · replay_dpo", "Preference pairs from replaying recorded states.", OURS),
    Group("rollouts", "Rollouts", "What the policy generated and how it was graded."),
)
OTHER = Group("other", "Whole step", "The total loss, the optimizer, and everything without a prefix.")

#: Prefixes of the hosts that belong to one of the groups above.
PREFIX_GROUP = {
    "policy": "policy",
    "clip_ratio": "policy",
    "sdpo": "sdpo",
    "replay_dpo": "replay_dpo",
    "rollouts": "rollouts",
    "rollout": "rollouts",
    "reward": "rollouts",
    "rewards": "rollouts",
    "completions": "rollouts",
    "tools": "rollouts",
    "environment": "rollouts",
    "sampling": "rollouts",
}

#: The metric that is above zero in a step to which the channel contributed.
ACTIVITY = {"policy": "policy/active_tokens", "sdpo": "sdpo/active_tokens", "replay_dpo": "replay_dpo/pairs"}


@dataclass(frozen=True)
class Known:
    """A metric with a unit, a meaning and a group; listed in the order in which it is drawn."""

    unit: str
    about: str
    group: str


def _known(group: str, rows: dict[str, tuple[str, str]]) -> dict[str, Known]:
    return {name: Known(unit, about, group) for name, (unit, about) in rows.items()}


KNOWN: dict[str, Known] = {
    **_known(
        "policy",
        {
            "policy/loss": ("loss", "the policy term, before its weight"),
            "policy/active_tokens": ("tokens", "tokens with a non-zero advantage"),
            "policy/ratio": ("ratio", "mean importance ratio of the policy tokens"),
            "policy/kl": ("nats/token", "distance from the reference policy"),
            "policy/clip_fraction": ("share", "tokens whose ratio was clipped"),
            "policy/grad_norm": ("L2 norm", "this channel's own gradient"),
            "entropy": ("nats/token", "entropy of the policy"),
            "kl": ("nats/token", "distance from the reference policy"),
        },
    ),
    **_known(
        "sdpo",
        {
            "sdpo/divergence": ("nats/token", "distance from the hinted self-teacher on error turns"),
            "sdpo/loss": ("loss", "the distillation term, before its weight"),
            "sdpo/active_tokens": ("tokens", "error-turn tokens with a divergence above zero"),
            "sdpo/hinted_turns": ("turns", "error turns with a hint"),
            "sdpo/is_weight": ("ratio", "mean importance weight, capped"),
            "sdpo/grad_norm": ("L2 norm", "this channel's own gradient"),
        },
    ),
    **_known(
        "replay_dpo",
        {
            "replay_dpo/loss": ("loss", "the preference term, before its weight"),
            "replay_dpo/pairs": ("pairs", "pairs in this step"),
            "replay_dpo/accuracy": ("share", "pairs where the chosen action gained more"),
            "replay_dpo/margin": ("nats", "gap between chosen and rejected log-ratios"),
            "replay_dpo/chosen_shift": ("nats", "log-probability against the initial model"),
            "replay_dpo/rejected_shift": ("nats", "log-probability against the initial model"),
            "replay_dpo/grad_norm": ("L2 norm", "this channel's own gradient"),
        },
    ),
    **_known(
        "rollouts",
        {
            "reward": ("reward", "mean over the rollouts of the step"),
            "reward_std": ("reward", "spread inside the groups"),
            "frac_reward_zero_std": ("share", "groups without spread: no policy gradient"),
            "completions/mean_length": ("tokens", "mean length of a completion"),
            "tools/call_frequency": ("calls", "tool calls per rollout"),
            "tools/failure_frequency": ("share", "tool calls that failed"),
        },
    ),
    **_known(
        "other",
        {
            "loss": ("loss", "all channels, weighted"),
            "grad_norm": ("L2 norm", "gradient of the whole step"),
            "lr": ("per step", "learning rate"),
            "learning_rate": ("per step", "learning rate"),
            "step_time": ("seconds", "wall-clock of the step"),
        },
    ),
}

#: Drawn in one chart: title, meaning, and what to call each line.
TOGETHER = {
    "replay_dpo/chosen_shift": (
        "replay_dpo/…_shift",
        "log-probability against the initial model",
        {"replay_dpo/chosen_shift": "chosen", "replay_dpo/rejected_shift": "rejected"},
    ),
}


def group_of(metric: str) -> Group:
    """Return the group a metric is drawn in; an unknown prefix makes a group of its own."""
    if metric in KNOWN:
        key = KNOWN[metric].group
    elif "/" in metric:
        prefix = metric.split("/", 1)[0]
        key = PREFIX_GROUP.get(prefix, f"prefix:{prefix}")
    else:
        key = "other"
    for group in (*GROUPS, OTHER):
        if group.key == key:
            return group
    return Group(key, key.removeprefix("prefix:") or "/", "Metrics that the host or a plugin logged under this prefix.")


def grouped(names: list[str]) -> list[tuple[Group, list[str]]]:
    """Group metric names: the channels, rollouts, unknown prefixes by name, the rest. Known ones first."""
    found: dict[str, tuple[Group, list[str]]] = {}
    for name in names:
        group = group_of(name)
        found.setdefault(group.key, (group, []))[1].append(name)
    first = [g.key for g in GROUPS]
    order = [*first, *sorted(k for k in found if k.startswith("prefix:")), OTHER.key]
    rank = {name: i for i, name in enumerate(KNOWN)}
    return [
        (found[key][0], sorted(found[key][1], key=lambda n: (rank.get(n, len(rank)), n)))
        for key in order
        if key in found
    ]
