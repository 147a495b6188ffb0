"""What a verl run says about its channels: a silent one warns, or stops the run, with the reason."""

from __future__ import annotations

import json
from pathlib import Path

from composer_plugins.channels.silence import SilenceMonitor
from composer_plugins.config import ComposerConfig

STATE_FILE = "composer_state.json"
#: Metric of the driver that is above zero in a step to which the channel contributed.
ACTIVITY = {"sdpo": "actor/sdpo/active_tokens", "replay_dpo": "actor/replay_dpo/pairs"}


class StepMonitor:
    """Closes a step of the trainer.

    Args:
        section: the `composer` section.
    """

    def __init__(self, section: ComposerConfig) -> None:
        self.section = section
        self.silence = SilenceMonitor(section.monitor.silent_after, section.monitor.on_silence)

    def close(self, metrics: dict[str, float], why: dict[str, str]) -> None:
        """Look at a step's metrics, all of them.

        Args:
            metrics: as verl logs them. A step without an actor update (critic warm-up) says nothing about the channels.
            why: the reason to give for a channel that was silent.

        Raises:
            SilentChannelError: with `monitor.on_silence: error`.
        """
        if "actor/grad_norm" not in metrics:
            return
        for channel, name in ACTIVITY.items():
            if getattr(self.section, channel).weight > 0:
                self.silence.update(channel, float(metrics.get(name, 0.0)), why=why.get(channel, f"{name} is 0"))
        if self.section.policy.weight > 0:
            spread = [abs(float(metrics.get(f"critic/advantages/{end}", 0.0))) for end in ("max", "min")]
            reason = "every group of the step had equal rewards, so all advantages are zero"
            self.silence.update("policy", max(spread), why=reason)

    def save(self, folder: Path) -> None:
        """Write the silence counters into a checkpoint folder of verl's (`global_step_N`)."""
        (folder / STATE_FILE).write_text(json.dumps(self.silence.state_dict()))

    def load(self, folder: Path) -> None:
        """Restore the counters; a checkpoint of verl's own trainer has none."""
        path = folder / STATE_FILE
        if path.exists():
            self.silence.load_state_dict(json.loads(path.read_text()))
