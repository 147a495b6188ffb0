"""A channel: half the squared log-ratio to the policy that sampled, a mean over the tokens of the whole step."""

from composer_plugins.channels.base import ChannelSpec
from composer_plugins.channels.levels import SignalLevel
from composer_plugins.losses.masking import masked, safe


class Drift:
    def __init__(self, margin=0.0):
        if margin < 0:
            raise ValueError(f"margin must be 0 or more nats, found {margin}")
        self.margin = margin

    def values(self, batch):
        ratio = safe(batch.logprobs, batch.mask) - safe(batch.old_logprobs.detach(), batch.mask)
        beyond = (ratio.abs() - self.margin).clamp(min=0)
        values = masked(0.5 * beyond**2, batch.mask)
        return values, {
            "tokens": (values.detach() > 0).sum(),
            "nats": beyond.detach().sum() / batch.mask.sum().clamp(min=1),
        }


SPEC = ChannelSpec(
    "acme_drift", (SignalLevel.SAMPLED,), activity="acme_drift/tokens", reduction="global_token_mean", build=Drift
)
