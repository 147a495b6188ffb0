"""One channel's part of a `composer` section, checked like the loss's; the rest of the section is the trainer's business."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from composer_plugins.config import ComposerConfig, parse_section
from composer_plugins.errors import ConfigError
from composer_prime_rl.section import loss_options


def channel_section(
    composer: Mapping[str, Any], channel: Literal["sdpo", "replay_dpo"], **options: Any
) -> ComposerConfig:
    """Return the section with only `channel` in it, so that the same table can stand in every place of a recipe.

    Args:
        composer: the whole `composer` table.
        channel: what this part of the run does.
        options: further keyword arguments of the loss, such as `sdpo_route`.

    Raises:
        ValueError: unknown keys anywhere in the table, or what prime-rl cannot give for this channel.
    """
    try:
        parse_section(dict(composer))
        return loss_options({"composer": {channel: composer.get(channel) or {}}, **options}).composer
    except ConfigError as error:
        raise ValueError(str(error).replace("trainer.loss.kwargs.", "")) from error
