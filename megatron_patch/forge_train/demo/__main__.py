"""``python -m forge_train.demo``."""

import sys

from forge_train.demo.cli import main

if __name__ == "__main__":  # the ranks import this file again under another name
    sys.exit(main())
