"""`python -m composer_plugins.cli`, for launchers that take a module."""

from composer_plugins.cli import main

main()
