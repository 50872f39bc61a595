"""``python -m forge_train``: see :mod:`forge_train.cli`."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
