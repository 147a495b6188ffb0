"""What the entry point names: it registers, and imports nothing heavy."""

from composer_plugins import hookimpl
from composer_plugins.plugins import Entry


@hookimpl
def register_channels(register):
    register(Entry("acme_drift", "keeps the policy near the one that sampled", "acme_agent.drift:SPEC"))


@hookimpl
def register_trace_readers(register):
    register(Entry("acme", "logs of the ACME agent", "acme_agent.reader:READER"))


@hookimpl
def register_hint_generators(register):
    register(Entry("acme_rules", "our team's rules after an error", "acme_agent.rules:RuleHints"))
