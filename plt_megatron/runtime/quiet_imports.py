"""What imports have to say about a machine is silenced; plt doctor reports what matters."""

from __future__ import annotations

import logging
import warnings


def quiet_imports(level: int = logging.INFO) -> None:
    """Silence torch's, megatron-core's and transformers' routine messages; our own are logged from `level` on.

    A process that has imported torch calls it after that: torch sets its loggers' levels.
    """
    warnings.filterwarnings("ignore", module=r"(megatron|torch|transformers)\..*")
    logging.basicConfig(level=level, format="%(message)s")
    for name in ("megatron", "torch", "torch.utils.cpp_extension", "absl"):
        logging.getLogger(name).setLevel(logging.ERROR)
