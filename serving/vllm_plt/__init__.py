"""Parallel Loop Transformers (PLT, arXiv 2510.24824) in vLLM: exports of plt_megatron, and LoopCoder-v2's names."""

ARCHITECTURES = ("PLTForCausalLM", "IQuestPLTCoderForCausalLM")


def register() -> None:
    """What vLLM calls in each of its processes: makes configurations and architectures known.

    With a vLLM of another version, or one that lacks what the plugin uses of it, it says so in one line and registers
    nothing, so that other models are served: vLLM itself would end over an error here.
    """
    from vllm.logger import init_logger

    from vllm_plt.version import problem

    logger = init_logger("vllm.plt")
    if message := problem():
        logger.error(message)
        return
    try:
        from transformers import AutoConfig
        from vllm import ModelRegistry

        from vllm_plt.configuration_loopcoder import LoopCoderConfig
        from vllm_plt.configuration_plt import PLTConfig
        from vllm_plt.settings import register_check

        for name in ARCHITECTURES:
            register_check(name)
    except ImportError as error:
        logger.error(f"vllm-plt cannot use this vLLM or transformers, so PLT models are not served: {error}")
        return
    for config in (PLTConfig, LoopCoderConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)
    for name in ARCHITECTURES:
        ModelRegistry.register_model(name, "vllm_plt.model:PLTForCausalLM")
