"""`python -m plt_megatron` is `plt`."""

import sys

from plt_megatron.commands import main

if __name__ == "__main__":
    sys.exit(main())
