"""What verl loads in every process (entry-point group `verl.plugins`): importing it registers our names.

verl swallows import errors of plugins at DEBUG level, which would end in a puzzling "unknown loss mode" or in a run
without our loss. So a failure is logged as an error here, before it is raised.
"""

from __future__ import annotations

import logging

logger = logging.getLogger("composer_verl")

try:
    from composer_verl.advantages import register_advantages
    from composer_verl.late import register_late
    from composer_verl.outer import install_at_import
    from composer_verl.policy_losses import register_policy_losses

    LOSS_MODES = register_policy_losses()
    ADVANTAGE_ESTIMATORS = register_advantages()
    register_late()
    install_at_import()
except Exception as error:
    logger.error(
        "composer-plugins could not register its losses with verl: %s: %s. A recipe that names them will not run; "
        "composer_verl is tested with verl 0.9.1.",
        type(error).__name__,
        error,
    )
    raise
