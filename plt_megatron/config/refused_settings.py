"""Settings of Megatron-LM that are refused by name, with the reason (docs/throughput.md)."""

from __future__ import annotations

_UNTESTABLE = "it can only be verified on GPUs, and is not yet"
_OFFLOAD = "it counts a stack's layers once per forward pass, but loops pass through them several times"
_GRAPH = (
    "a captured layer replays one call's tensors, while a looped one is called once per loop and passes the first "
    "loop's keys and values to the others, as new tensors in each microbatch"
)
_FP8_PARAM = (
    "initial weights are written into layers that are already built, where Transformer Engine would keep no copy of "
    "them in full precision; FP8 copies are made once per step instead"
)
_STATES = "moments are fp32: other types need Transformer Engine, and are not verified with checkpoints"
_STATES_ON_HOST = "checkpoints would lack its state; use deepspeed.offload_optimizer=cpu"

REFUSED = {
    "tp_comm_overlap": _UNTESTABLE,
    "fp8_param_gather": _FP8_PARAM,
    "fp8_param": _FP8_PARAM,
    "cpu_offloading": _OFFLOAD,
    "cpu_offloading_num_layers": _OFFLOAD,
    "fine_grained_activation_offloading": _OFFLOAD,
    "offload_modules": _OFFLOAD,
    "cuda_graph_impl": _GRAPH,
    "cuda_graph_modules": _GRAPH,
    "cuda_graph_scope": _GRAPH,
    "enable_cuda_graph": _GRAPH,
    "external_cuda_graph": _GRAPH,
    "overlap_param_gather_with_optimizer_step": "loops share one chunk of weights; use parallel.overlap_param_gather",
    "align_param_gather": "loops share one chunk of weights, which is gathered once",
    "use_precision_aware_optimizer": "it is not verified with this project's checkpoints",
    "exp_avg_dtype": _STATES,
    "exp_avg_sq_dtype": _STATES,
    "optimizer_cpu_offload": _STATES_ON_HOST,
    "optimizer_offload_fraction": _STATES_ON_HOST,
    "use_layer_wise_distributed_optimizer": "set optimizer.name=muon, which uses its buffer layout",
    "use_mup": "set model.mup_base_hidden_size",
    "decoupled_lr": "set optimizer.lr_mult.embedding and optimizer.lr_mult.head",
}
