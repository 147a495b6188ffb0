"""`python -m composer_plugins.models REF...`: see `composer_plugins.models.resolve.main`."""

from composer_plugins.models.resolve import main

main()
