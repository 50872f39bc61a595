"""``torchrun … -m forge_train.megatron SCRIPT FLAGS --forge``: the user's own script, with FORGE's flags.

The script is run unedited, as ``__main__``, after the patches are in place.
"""  # noqa: E501  (a command)

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

_USAGE = """usage: torchrun ... -m forge_train.megatron SCRIPT [FLAGS OF THE SCRIPT] [--forge]

Runs a Megatron-LM training script, such as pretrain_gpt.py, unedited. FORGE's flags are in the
script's --help.
"""


def main(arguments: list[str]) -> int:
    """Run the script; its own exit status, or 2 where there is none to run."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE, end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    script = Path(arguments[0])
    if not script.is_file():
        print(f"forge_train.megatron: no script at {script}\n{_USAGE}", end="", file=sys.stderr)
        return 2
    # As python SCRIPT would have it: what lies beside the script can be imported.
    sys.path.insert(0, str(script.resolve().parent))
    sys.argv = arguments
    if os.environ.get("FORGE_MEGATRON_CPU") == "1":
        from . import cpu

        cpu.enable()
    from . import install

    install()
    runpy.run_path(str(script), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
