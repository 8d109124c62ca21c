#!/usr/bin/env python3
"""`plt-config` from a checkout: python tools/config.py --help"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from plt_megatron.commands.config import main

    sys.exit(main())
