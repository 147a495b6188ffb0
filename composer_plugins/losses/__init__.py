"""Pure losses: one value per element, unreduced, and the reductions that turn them into a scalar.

`policy` and `advantages` are channel 1, `divergence` channel 2, `dpo` channel 3; `reduction` says what the
sum is divided by and `masking` keeps padding out of values and gradients. Nothing here knows a host.
"""
