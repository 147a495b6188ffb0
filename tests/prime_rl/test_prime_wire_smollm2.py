"""The wire and the pairs once more, with SmolLM2-135M-Instruct in place of the small random model of those files."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("verifiers.v1", reason="verifiers is not installed (make test-prime-rl)")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "plugins")]

import test_prime_pairs
import test_prime_pairs_sender
import test_prime_wire
from prime_fixtures import server, serving, smollm2, tokenizer_dir  # noqa: F401

POLICY = "smollm2"
pytestmark = [pytest.mark.prime_rl, pytest.mark.model]

failed_group = test_prime_wire.failed_group
section = test_prime_pairs.section
reference = test_prime_pairs.reference
test_an_all_failed_group_keeps_its_self_distillation = (
    test_prime_wire.test_an_all_failed_group_keeps_its_self_distillation
)
test_backward_reaches_the_error_turn_and_no_other_token = (
    test_prime_wire.test_backward_reaches_the_error_turn_and_no_other_token
)
test_the_student_is_the_policy_that_sampled_and_the_hint_moves_the_teacher = (
    test_prime_wire.test_the_student_is_the_policy_that_sampled_and_the_hint_moves_the_teacher
)
test_route_ce_is_pairwise_dpo = test_prime_pairs.test_route_ce_is_pairwise_dpo
test_route_rl_is_pairwise_dpo_with_a_summing_loss = test_prime_pairs.test_route_rl_is_pairwise_dpo_with_a_summing_loss
test_the_gradient_is_that_of_the_mean_pairwise_dpo = (
    test_prime_pairs_sender.test_the_gradient_is_that_of_the_mean_pairwise_dpo
)
