"""torch.compile: vLLM drops dynamo's guards, so each loop and the rows of a decode step need code of their own."""

import pytest
from helpers import assert_same, engine, prompts, served_model


def test_each_pass_has_a_code_object_of_its_own(exports):
    with engine(exports("plt3")) as llm:
        model = served_model(llm).model
        codes = [type(run).forward.__code__ for run in (*model.passes, model.rows)]
        assert len(set(codes)) == len({code.co_qualname for code in codes}) == 4


@pytest.mark.parametrize("again", [False, True], ids=["compiled", "from the disk's cache"])
@pytest.mark.parametrize("variant", ["plt3", "shifted heads"])
def test_compiled(exports, variant, again):
    """Three loops; the second engine finds on disk what the first one has compiled."""
    export = exports(variant, num_hidden_layers=2)
    with engine(export, enforce_eager=False) as llm:
        model = served_model(llm).model
        assert_same(export, llm, prompts(12))
        assert all(run.compiled or getattr(run, "aot_compiled_fn", None) for run in (*model.passes, model.rows))
