#!/usr/bin/env python3
"""`plt-export` from a checkout: python tools/convert_to_hf.py --help"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from plt_megatron.commands.export_hf import main

    sys.exit(main())
