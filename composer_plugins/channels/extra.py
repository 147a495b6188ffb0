"""Channels that a plugin adds: a value per sampled token, reduced and weighted like ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from composer_plugins.channels.base import ChannelSpec, Term, TokenBatch, TokenChannel
from composer_plugins.channels.levels import SignalLevel
from composer_plugins.errors import ConfigError, PluginError, UnsupportedError
from composer_plugins.losses.masking import masked
from composer_plugins.losses.reduction import Reduction, count_units, scale_elements

if TYPE_CHECKING:
    import torch

    from composer_plugins.config import ComposerConfig

BUILT_IN = ("policy", "sdpo", "replay_dpo")


@dataclass(frozen=True)
class ExtraChannel:
    """One plugin channel of a run.

    Args:
        name: its key in `composer.channels`. spec: as registered. weight: in the total loss.
        channel: built from the section's `options`.
    """

    name: str
    spec: ChannelSpec
    weight: float
    channel: TokenChannel

    @property
    def reduction(self) -> Reduction:
        """How its values are reduced."""
        return Reduction(self.spec.reduction)

    def units(self, mask: torch.Tensor, *, length_constant: int | None = None) -> float:
        """This micro-batch's share of the denominator, from its mask (B, T)."""
        return float(count_units(mask, self.reduction, length_constant=length_constant))

    def term(self, batch: TokenBatch, denominator: torch.Tensor | float) -> Term:
        """Build the term of one micro-batch.

        Args:
            batch: what the channel sees.
            denominator: sum of `units` over all micro-batches and ranks of the optimizer step.

        Raises:
            PluginError: the channel did not return one value per token.
        """
        values, metrics = self.channel.values(batch)
        if values.shape != batch.mask.shape:
            raise PluginError(
                f"The channel {self.name!r} must return one value per token, shape {tuple(batch.mask.shape)}, "
                f"found {tuple(values.shape)}."
            )
        scaled = scale_elements(masked(values, batch.mask), batch.mask, self.reduction)
        named = {f"{self.name}/{key}": float(value) for key, value in metrics.items()}
        if self.spec.activity not in named:
            raise PluginError(
                f"The channel {self.name!r} names {self.spec.activity!r} as its activity, but returned only "
                f"{', '.join(named) or 'no metric'}: return it with every batch."
            )
        return Term(self.name, scaled, denominator, self.weight, named)


def extra_channels(
    config: ComposerConfig, *, reductions: tuple[Reduction, ...] = tuple(Reduction)
) -> list[ExtraChannel]:
    """Return the plugin channels of a run whose weight is above 0.

    Args:
        config: the whole section.
        reductions: those that the host can give exactly.

    Raises:
        ConfigError: unknown channel, a built-in's name, or options that the channel does not take.
        UnsupportedError: the host cannot give the channel's reduction or signal level.
    """
    from composer_plugins.plugins import get_plugin_manager

    found = []
    for name, section in config.channels.items():
        if name in BUILT_IN:
            raise ConfigError(f"composer.channels.{name}: this channel has a section of its own, composer.{name}.")
        spec = get_plugin_manager().channels.get(name).load()
        if section.weight == 0:
            continue
        if not isinstance(spec, ChannelSpec) or spec.build is None or spec.reduction is None:
            raise ConfigError(
                f"The channel {name!r} must register a ChannelSpec with `build` and `reduction` to be used from "
                "composer.channels: fix the plugin that registered it."
            )
        if SignalLevel.SAMPLED not in spec.levels:
            raise UnsupportedError(f"composer.channels.{name} needs {', '.join(spec.levels)}; plugins get `sampled`.")
        if Reduction(spec.reduction) not in reductions:
            raise UnsupportedError(
                f"composer.channels.{name} reduces by {spec.reduction}, which this host cannot give exactly; it has "
                f"{', '.join(reductions)}."
            )
        try:
            channel = spec.build(**section.options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"composer.channels.{name}.options: {error}") from error
        found.append(ExtraChannel(name, spec, section.weight, channel))
    return found
