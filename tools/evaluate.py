#!/usr/bin/env python3
"""`plt-evaluate` from a checkout: python tools/evaluate.py --help"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from plt_megatron.commands.evaluate import main

    sys.exit(main())
