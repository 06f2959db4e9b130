"""What is refused when a training starts."""

import contextlib
from types import SimpleNamespace
from typing import Any

import fairseq_cli.train
import pytest
import torch
from fairseq import optim
from fairseq.distributed import utils
from omegaconf import OmegaConf

from xmoe_fairseq_compat import starting
from xmoe_fairseq_compat.errors import CheckpointError, FlagError


def configuration(**given: Any) -> Any:
    groups = {
        "common": {"tpu": False, "cpu": True},
        "checkpoint": {"patience": -1},
        "dataset": {"disable_validation": False},
        "lr_scheduler": {"_name": "fixed"},
        "distributed_training": {
            "ddp_backend": "pytorch_ddp", "distributed_world_size": 1, "distributed_init_method": None,
            "distributed_backend": "nccl",
            "tpu": False, "pipeline_model_parallel": False, "distributed_port": -1,
            "distributed_no_spawn": True,
        },
    }  # fmt: skip
    for group in groups.values():
        group.update({name: value for name, value in given.items() if name in group})
    return OmegaConf.create(groups)


@pytest.mark.parametrize(
    "given, line",
    [
        ({"tpu": True}, "--tpu needs torch_xla; leave it out"),
        ({"ddp_backend": "slowmo"}, "--ddp-backend slowmo needs GPUs; use --ddp-backend legacy_ddp or"),
        ({"patience": 3, "disable_validation": True}, "--patience needs validation; leave out --disable"),
        (
            {"_name": "reduce_lr_on_plateau", "disable_validation": True},
            "--lr-scheduler reduce_lr_on_plateau needs validation; leave out --disable-validation",
        ),
        ({"ddp_backend": "fully_sharded"}, "--ddp-backend fully_sharded needs GPUs; use"),
    ],
)
def test_flags_that_need_what_is_not_there(given: dict[str, Any], line: str) -> None:
    ran: list[Any] = []
    with pytest.raises(ValueError, match=f"^{line}"):
        utils.call_main(configuration(**given), ran.append)
    assert not ran
    utils.call_main(configuration(patience=3), ran.append)
    assert len(ran) == 1


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_ranks_on_the_cpu_need_gloo(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ran: list[Any] = []
    needs_gloo = pytest.raises(FlagError, match="needs GPUs; give --distributed-backend gloo with --cpu")
    with needs_gloo if backend == "nccl" else contextlib.nullcontext():
        utils.call_main(configuration(distributed_backend=backend), ran.append)
    assert len(ran) == (backend == "gloo")


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    cfg = configuration(distributed_world_size=2).distributed_training
    with pytest.raises(
        FlagError, match="^--distributed-world-size must be at most the number of GPUs, 1, got 2"
    ):
        utils.infer_init_method(cfg, force_distributed=True)


def test_training_without_an_optimizer() -> None:
    with pytest.raises(FlagError, match="^--optimizer must be given, such as --optimizer adam$"):
        optim.build_optimizer(None, [])


def test_a_checkpoint_that_holds_nan_is_refused() -> None:
    nan = torch.tensor([1.0, float("nan")])
    state = {
        "model": {
            "fc.weight": torch.ones(2),
            "embed_positions._float_tensor": nan,
            "ids": torch.ones(1).long(),
        }
    }
    module = SimpleNamespace(load_checkpoint_to_cpu=lambda path: state)
    starting.refuse_weights_that_are_no_numbers(module)
    assert module.load_checkpoint_to_cpu("x.pt") is state
    state["model"]["fc.weight"] = nan
    with pytest.raises(
        CheckpointError, match="^cannot load checkpoint x.pt: it holds NaN in fc.weight; take an"
    ):
        module.load_checkpoint_to_cpu("x.pt")


def test_plasma_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FlagError, match="^--use-plasma-view needs plasma_store, which pyarrow had up to"):
        fairseq_cli.train.PlasmaStore(path="/tmp/plasma")


def test_modules_that_are_there() -> None:
    assert starting.has_module("fairseq.trainer")
    assert not starting.has_module("fairseq.no_such") and not starting.has_module("no_such.thing")
