"""The suites of `composer-rl conformance` on this package."""

from pathlib import Path

import numpy as np
from acme_agent.drift import SPEC
from acme_agent.reader import READER
from acme_agent.rules import RuleHints

from composer_plugins.conformance.channels import ChannelConformance
from composer_plugins.conformance.hints import HintGeneratorConformance
from composer_plugins.conformance.readers import TraceReaderConformance


class TestDrift(ChannelConformance):
    def spec(self):
        return SPEC

    def options(self):
        return {"margin": 0.05}

    def oracle(self, logprobs, old_logprobs, advantages, token_ids):
        ratio = logprobs - old_logprobs
        beyond = np.maximum(np.abs(ratio) - 0.05, 0)
        return 0.5 * beyond**2, beyond * np.sign(ratio)


class TestReader(TraceReaderConformance):
    def reader(self):
        return READER

    def samples(self):
        return [Path(__file__).with_name("session.txt")]


class TestRules(HintGeneratorConformance):
    def generator(self):
        return RuleHints()
