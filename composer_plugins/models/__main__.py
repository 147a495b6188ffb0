"""`python -m composer_plugins.models REF`: fetch a model if need be, load it once, print where it came from."""

import sys

from composer_plugins.errors import ComposerError
from composer_plugins.models.loading import load_model
from composer_plugins.models.resolve import resolve_model

if len(sys.argv) != 2:
    sys.exit("Usage: python -m composer_plugins.models REFERENCE")
try:
    resolved = resolve_model(sys.argv[1])
    load_model(resolved)
except ComposerError as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
print(f"{sys.argv[1]}: from {resolved.source}, weights sha256 {resolved.sha256}")
