#!/usr/bin/env python3
"""`plt-average` from a checkout: python tools/average_checkpoints.py --help"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from plt_megatron.commands.average import main

    sys.exit(main())
