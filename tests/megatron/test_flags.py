"""Each of Megatron's flags that FORGE cannot honour is refused in words that name the way out."""

from __future__ import annotations

import argparse
import importlib.util
from types import SimpleNamespace

import pytest

if importlib.util.find_spec("megatron") is None:
    pytest.skip("megatron-core is not installed", allow_module_level=True)

from forge_train.megatron import arguments


def _given(*flags: str, **others: object) -> SimpleNamespace:
    """Megatron's arguments as far as FORGE asks for them, of a job that it takes."""
    parser = arguments.add_arguments(argparse.ArgumentParser())
    own = vars(parser.parse_args(["--forge", *flags]))
    stock = {"optimizer": "adam", "bf16": True, "clip_grad": 1.0, "transformer_impl": "local"}
    more = {"rerun_mode": "disabled", "ckpt_format": "torch_dist", "data_parallel_size": 2}
    return SimpleNamespace(**{**own, **stock, **more, **others})


def test_a_job_that_can_be_trained_is_not_refused() -> None:
    arguments.check(_given())
    arguments.check(_given("--forge-schedule=immediate"))


@pytest.mark.parametrize(
    ("others", "flag", "way_out"),
    [
        ({"fp16": True}, "--fp16", "use --bf16"),
        ({"use_torch_fsdp2": True}, "--use-torch-fsdp2", "leave it out"),
        ({"use_megatron_fsdp": True}, "--use-megatron-fsdp", "leave it out"),
        ({"transformer_impl": "transformer_engine"}, "--transformer-impl", "local"),
        ({"defer_embedding_wgrad_compute": True}, "--defer-embedding-wgrad-compute", "leave it"),
        ({"cuda_graph_impl": "local"}, "--cuda-graph-impl", "leave it out"),
        ({"save_wgrads_interval": 10}, "--save-wgrads-interval", "leave it out"),
        ({"ckpt_format": "torch"}, "--ckpt-format torch", "use --ckpt-format torch_dist"),
    ],
)
def test_a_flag_is_refused(others: dict[str, object], flag: str, way_out: str) -> None:
    with pytest.raises(ValueError) as error:
        arguments.check(_given(**others))
    assert f"cannot be used with {flag}" in str(error.value) and way_out in str(error.value)


@pytest.mark.parametrize(
    "others",
    [
        {"rampup_batch_size": [2, 2, 8]},
        {"rerun_mode": "validate_results"},
        {"calculate_per_token_loss": True},
    ],
)
def test_immediate_is_refused_where_a_backward_is_not_the_step(
    others: dict[str, object],
) -> None:
    with pytest.raises(ValueError, match="--forge-schedule deferred"):
        arguments.check(_given("--forge-schedule=immediate", **others))
    arguments.check(_given(**others))


@pytest.mark.parametrize("optimizer", ["muon", "soap"])
def test_a_rule_that_is_not_element_wise_is_refused(optimizer: str) -> None:
    with pytest.raises(ValueError, match="use --optimizer adam or sgd or lion"):
        arguments.check(_given(optimizer=optimizer))
