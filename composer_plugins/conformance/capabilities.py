"""The short vocabulary in which an implementer says what it can do; contracts name these words, never hosts."""

from __future__ import annotations

from enum import StrEnum


class Capability(StrEnum):
    """What an adapter offers. A contract that needs a word which is not declared is reported as not offered."""

    #: sdpo from log-probs of sampled tokens, from top-k log-probs, from the whole distribution.
    SAMPLED = "sampled"
    TOPK = "topk"
    FULL = "full"
    #: sdpo's capped importance weight min(pi/pi_old, is_clip) where the ratio is not 1.
    OFF_POLICY_SDPO = "off_policy_sdpo"
    #: Objectives whose ratio is one per sequence.
    SEQUENCE_RATIO = "sequence_ratio"
    #: The optimizer step can be split over micro-batches (gradient accumulation).
    ACCUMULATION = "accumulation"
    #: Rows reach the loss with padding; or several in one row without.
    PADDED = "padded"
    PACKED = "packed"
    #: Data-parallel processes.
    MULTI_RANK = "multi_rank"
    #: replay_dpo pairwise in the loss, or as advantages of single rows.
    PAIRWISE = "pairwise"
    ADVANTAGE_FORM = "advantage_form"
    #: The suite sees how often the model runs and what the teacher reads.
    FORWARDS = "forwards"
    #: Self-teachers.
    LIVE_TEACHER = "live_teacher"
    EMA_TEACHER = "ema_teacher"
    REFERENCE_TEACHER = "reference_teacher"
    #: Several optimizer steps, stopped and resumed in between.
    RESUME = "resume"
    BF16 = "bf16"
    #: The host's monitor warns of a channel that contributes nothing.
    MONITOR = "monitor"
