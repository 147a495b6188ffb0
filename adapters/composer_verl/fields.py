"""Names under which the driver and the workers exchange what channel 2 needs."""

from __future__ import annotations

#: Per response token: non-zero where the token has a self-teacher.
SDPO_MASK = "sdpo_mask"
#: Per response token: log-probability under the hint, nats, at the rollout temperature; zero elsewhere.
SDPO_TEACHER = "sdpo_teacher_log_probs"
#: Per row: how many tokens of the row's whole mini-batch (all ranks) have a self-teacher.
SDPO_TOKENS = "sdpo_tokens"
#: On a batch to score: whose weights read it, when not the live ones.
TEACHER, EMA_TEACHER = "composer_teacher", "ema"
#: On a batch to train on: the update rate of the averaged weights.
EMA_RATE = "composer_ema_rate"

# Level `topk`
#: Per response token: k vocabulary entries, and the teacher's log-probabilities of them; zeros without a self-teacher.
SDPO_TOPK_IDS, SDPO_TOPK_TEACHER = "sdpo_topk_ids", "sdpo_topk_teacher"
#: On a batch to score: how many entries per span token, and which (a field) if not its own most likely ones.
TOPK, TOPK_ASKED = "composer_topk", "composer_topk_ids"
#: What the engine returns for such a batch, number i of k: verl's logits hook takes one value per token and name.
TOPK_ID, TOPK_VALUE = "composer_topk_id_{}", "composer_topk_value_{}"
#: What our loss returns to the engine when it is shown the student's logits: per token of prompt and response.
SDPO_VALUES, SDPO_DIVERGENCE = "sdpo_values", "sdpo_divergence"
