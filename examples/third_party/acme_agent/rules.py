"""A hint generator: one rule per class of error, and nothing where there is no rule."""

from composer_plugins.hints.slots import FailureHints
from composer_plugins.traces.schema import Hint

RULES = {
    "command_not_found": "That command is not installed here. Tools come from `make setup`; never install one by hand.",
    "test_failure": "Read the first failing test and the code that it calls before you change anything.",
    "edit_no_match": "Read the file again: the text to replace must be in it letter by letter.",
}


class RuleHints(FailureHints):
    name = "acme_rules"

    def _hint(self, failure):
        rule = RULES.get(failure.error_class)
        if rule is None:
            return None
        return Hint(text=rule, error_class=failure.error_class, status=failure.status, generator=self.name)
