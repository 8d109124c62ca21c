"""torch.compile and CUDA graphs.

vLLM drops dynamo's guards, so each loop and the rows of a decode step need their own code object. Piecewise graphs need
inputs at fixed addresses, so they cannot be used for passes whose inputs are new tensors.
"""

import pytest
from helpers import SIZES, YARN, assert_same, engine, prompts, served_model


def passes(model) -> list:
    return [run for run in (model.prelude, *model.passes, model.coda, model.rows) if run is not None]


@pytest.mark.parametrize(("variant", "count"), [("plt3", 4), ("span", 5)])
def test_each_pass_has_a_code_object_of_its_own(exports, variant, count):
    with engine(exports(variant)) as llm:
        codes = [type(run).forward.__code__ for run in passes(served_model(llm).model)]
        assert len(set(codes)) == len({code.co_qualname for code in codes}) == count


@pytest.mark.parametrize("again", [False, True], ids=["compiled", "from the disk's cache"])
@pytest.mark.parametrize(
    ("variant", "changes", "requests"),
    [
        ("plt3", {"num_hidden_layers": 2, "rope_parameters": YARN}, 24),
        ("keys alone, span, shifted", {}, 24),
        ("span", {"num_hidden_layers": 3}, 1),
        ("last loop, span", {"num_hidden_layers": 3, "loop_span": [1, 3]}, 24),
    ],
)
def test_compiled(exports, variant, changes, requests, again):
    """Compiled passes give transformers' tokens, also when a second engine loads them from the disk cache."""
    export = exports(variant, **changes)
    with engine(export, enforce_eager=False, max_num_seqs=requests) as llm:
        model = served_model(llm).model
        assert_same(export, llm, prompts(12))
        assert all(run.compiled or getattr(run, "aot_compiled_fn", None) for run in passes(model))


@pytest.mark.parametrize("variant", ["plt2", "no CLP"])
def test_no_pass_runs_in_a_piecewise_graph(exports, monkeypatch, variant):
    """Passes leave piecewise graphs, which replay fixed addresses, even if the runner asks for them."""
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import get_forward_context
    from vllm.v1.worker import gpu_model_runner

    asked, seen, addresses = [CUDAGraphMode.PIECEWISE], [], set()
    context = gpu_model_runner.set_forward_context

    def in_mode(*args, **kwargs):
        return context(*args, **{**kwargs, "cudagraph_runtime_mode": asked[0]})

    def watched(forward):
        def look(positions, hidden_states, *carried):
            seen.append(get_forward_context().cudagraph_runtime_mode)
            addresses.add(hidden_states.data_ptr())
            return forward(positions, hidden_states, *carried)

        return look

    with engine(exports(variant)) as llm:
        model = served_model(llm).model
        for run in passes(model):
            monkeypatch.setattr(run, "forward", watched(run.forward))
        monkeypatch.setattr(gpu_model_runner, "set_forward_context", in_mode)
        for mode, expected in ((CUDAGraphMode.PIECEWISE, CUDAGraphMode.NONE), (CUDAGraphMode.FULL, CUDAGraphMode.FULL)):
            asked[0], seen[:] = mode, []
            assert_same(exports(variant), llm, prompts(6, seed=asked[0].value), tokens=6)
            assert set(seen) == {expected}
        assert len(addresses) > 2


def test_padding_leaves_the_null_block_as_it_is(exports):
    """A graph's padding rows, which hold arbitrary values, are not stored in the null block, which attention reads."""
    import torch
    from vllm.forward_context import ForwardContext, override_forward_context
    from vllm_plt.carry import CarryMetadata

    with engine(exports("plt3")) as llm:
        carry = served_model(llm).model.carry
        starts, slots = torch.arange(4), torch.tensor([70, -1, -1])
        table = torch.tensor([[2], [0], [0]], dtype=torch.int32).repeat(1, 8)
        metadata = CarryMetadata(starts, torch.tensor([40, 0, 0]), table, slots, 1)
        context = ForwardContext({}, {layer.name: metadata for layer in carry.slices}, {})
        states = torch.full((2, 3, SIZES["hidden_size"]), float("nan"))
        states[:, 0] = 0.5
        with override_forward_context(context):
            carry.write("hidden", states, slice(None))
            for _, view in carry.views():
                assert (view[:, 2, 70 % view.shape[2]] == 0.5).any() and torch.isfinite(view[:, 0]).all()
