"""Settings of Megatron-LM that are refused by name, with what is in their way here (docs/throughput.md)."""

from __future__ import annotations

_UNTESTABLE = "nothing of it can be proven without GPUs, and nothing is yet"
_OFFLOAD = "it counts a stack's layers once a forward pass, and loops pass through them several times"
_GRAPH = (
    "a captured layer replays one call's tensors, while a looped one is called once a loop and hands the first loop's "
    "keys and values to the others, new tensors in each microbatch"
)
_FP8_PARAM = (
    "initial weights are written into layers that are built already, where Transformer Engine would keep no copy of "
    "them in full precision; FP8 copies are made once a step instead"
)
_STATES = "moments are fp32: those of another type need Transformer Engine, and are not proven with checkpoints"
_STATES_ON_HOST = "checkpoints would not have its state; deepspeed.offload_optimizer=cpu does it"

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
    "overlap_param_gather_with_optimizer_step": "the loops are one chunk of weights; use parallel.overlap_param_gather",
    "align_param_gather": "the loops are one chunk of weights, which is gathered once",
    "use_precision_aware_optimizer": "it is not proven with this project's checkpoints",
    "exp_avg_dtype": _STATES,
    "exp_avg_sq_dtype": _STATES,
    "optimizer_cpu_offload": _STATES_ON_HOST,
    "optimizer_offload_fraction": _STATES_ON_HOST,
    "use_layer_wise_distributed_optimizer": "set optimizer.name=muon, which has its layout of buffers",
    "use_mup": "set model.mup_base_hidden_size",
    "decoupled_lr": "set optimizer.lr_mult.embedding and optimizer.lr_mult.head",
}
