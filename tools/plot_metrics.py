#!/usr/bin/env python3
"""`plt-plot` from a checkout: python tools/plot_metrics.py --help"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from plt_megatron.commands.plot import main

    sys.exit(main())
