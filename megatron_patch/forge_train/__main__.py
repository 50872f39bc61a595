"""``python -m forge_train warm``: the package's command line."""

from __future__ import annotations

import sys

from .warm_cli import main

if __name__ == "__main__":
    sys.exit(main())
