"""Routers by name: what is registered, and that all who speak of routers draw it from there."""

import pytest
from torch import nn

from xmoe_fairseq.moe import Router, TopKRouter, register_router
from xmoe_fairseq.moe.routers import registry
from xmoe_fairseq.moe.routers.registry import Flag, registered_routers, router_named


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ROUTERS", dict(registry._ROUTERS))


def test_every_file_registers_its_router() -> None:
    assert list(registered_routers()) == [
        "threshold", "base", "expert_choice", "expert_threshold", "gshard", "hash", "relu", "seq_topk",
        "topany", "topk",
    ]  # fmt: skip


def test_one_name_is_one_class() -> None:
    def define() -> type[Router]:
        @register_router("mine")
        class Mine(TopKRouter):  # takes flags that there are
            pass

        return Mine

    define()
    again = define()  # a notebook's cell that runs again
    assert router_named("mine") is again
    with pytest.raises(ValueError, match="router topk is registered already, as .*routers.topk.TopKRouter"):
        register_router("topk")(router_named("mine"))


def test_what_is_no_router_is_refused() -> None:
    with pytest.raises(
        ValueError, match="router mine must be a Router, TokenRouter or RouterKind, got .*Linear"
    ):
        register_router("mine")(nn.Linear)


def test_flags_from_outside_come_too_late() -> None:
    class Flagged(Router):
        flags = (Flag("moe_mine", 0, "mine"),)

    with pytest.raises(
        ValueError, match="router mine must take its arguments by --moe-router-args, not by own"
    ):
        register_router("mine")(Flagged)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="must be one of threshold, base, .*, got mine; .* needs the --user-dir"
    ):
        router_named("mine")
