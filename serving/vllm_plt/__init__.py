"""vLLM plugin for Parallel Loop Transformers (PLT, arXiv 2510.24824): plt_megatron's exports and LoopCoder-v2."""

ARCHITECTURES = ("PLTForCausalLM", "IQuestPLTCoderForCausalLM")


def register() -> None:
    """Register the configurations and architectures; vLLM calls this in each of its processes.

    If vLLM has another version, or lacks something that the plugin uses, log one line and register nothing. Raising
    would stop vLLM itself, and with it the serving of other models.
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
