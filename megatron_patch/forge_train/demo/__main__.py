"""``python -m forge_train.demo``."""

import sys

from forge_train.demo.cli import main

if __name__ == "__main__":
    sys.exit(main())
