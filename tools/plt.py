"""`plt` from a checkout. The other scripts here and in launch/ are links to this one: tools/plot.py is `plt plot`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    root = Path(__file__).resolve().parents[1]
    sys.path[: not sys.flags.safe_path] = [str(root)]  # instead of this folder, whose names would shadow packages
    from plt_megatron.commands import main

    name = Path(__file__).stem.replace("_", "-")
    sys.exit(main(sys.argv[1:] if name == "plt" else [name, *sys.argv[1:]]))
