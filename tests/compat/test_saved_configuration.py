"""The configuration of a checkpoint: plain, no larger than it looks, and all there."""

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils
from hostile import checkpoint, refused

from xmoe_fairseq_compat import saved_configuration
from xmoe_fairseq_compat.checkpoints import load_checkpoint
from xmoe_fairseq_compat.errors import CheckpointError


def doubled(times: int) -> dict[str, Any]:
    node: dict[str, Any] = {str(number): number for number in range(1000)}
    for _ in range(times):
        node = {"left": node, "right": node}
    return node


def without_end() -> list[Any]:
    node: list[Any] = []
    node += [node, node]
    return node


def deep() -> list[Any]:
    node: list[Any] = []
    for _ in range(200):
        node = [node]
    return node


@pytest.mark.parametrize(
    ("node", "problem"),
    [
        (doubled(10), "entries that become 1,[0-9,]+ when they are read"),
        (without_end(), "is nested without end at cfg.task.node"),
        (deep(), "is nested without end at cfg.task.node"),
        ("${oc.env:HOME}", r"cfg.task.node is '\$\{oc.env:HOME\}', a reference"),
        (["${model}${model}"], "cfg.task.node.0 is .*, a reference"),
        ("${model}", "cfg.task.node is .*, a reference"),  # to many values
        ("${task.node}", "cfg.task.node is .*, a reference"),
        ("${task.none}", "cfg.task.node is .*, a reference"),
    ],
)
def test_a_configuration_that_grows_is_refused(node: Any, problem: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, lambda state: state["cfg"]["task"].update(node=node))
    assert re.search(problem, refused(path))


def test_references_to_plain_values_are_followed(tmp_path: Path) -> None:
    """fairseq saved them until May 2021."""
    own = {"lr": [0.1, 0.2], "seed": None, "first": "${task.second}", "second": 3}
    asked = {"a": "${task.lr}", "b": ["${task.seed}"], "c": "${task.first}"}
    path = checkpoint(tmp_path, lambda state: state["cfg"]["task"].update(own, asked=asked))
    task = load_checkpoint(path)["cfg"]["task"]
    assert task["asked"] == {"a": [0.1, 0.2], "b": [None], "c": 3} and task["first"] == 3
    assert task["asked"]["a"] is not task["lr"]


def test_references_that_repeat_a_long_list_count_as_often(tmp_path: Path) -> None:
    many = {"long": list(range(1000)), "asked": ["${task.long}"] * 5000}
    path = checkpoint(tmp_path, lambda state: state["cfg"]["task"].update(many))
    assert re.search("entries that become 5,[0-9,]+ when they are read", refused(path))


def test_an_honest_configuration_may_be_large_and_share_parts() -> None:
    pairs = [f"en-l{number}" for number in range(200_000)]
    saved_configuration.check_configuration(
        "file", {"task": {"lang_pairs": pairs}, "model": {"lang_pairs": pairs}}
    )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"extra_state": "DROP"}, "it has no entry 'extra_state'"),
        ({"cfg": "DROP", "args": "DROP"}, "it has no entry 'cfg'"),
        ({"cfg": None}, "its entry 'cfg' is 'None'"),
        ({"cfg": [1]}, r"its entry 'cfg' is '\[1\]'"),
        ({"model": {5: torch.ones(1)}}, "its model holds 5, where the name of a tensor belongs"),
        (
            {"args": argparse.Namespace(arch="xmoe_of_old")},
            "'xmoe_of_old' .if that is a model or task, add its",
        ),
        ({"model": [1]}, r"its entry 'model' is '\[1\]'"),
        ({"optimizer_history": []}, "its entry 'optimizer_history' is"),
        ({"optimizer_history": [5]}, "cannot be read"),
        ({"optimizer_history": [{}]}, "cannot be read"),
        ({"cfg": {"task": {"eval_wer_config": 5}}}, "cannot be read"),
    ],
)
def test_a_checkpoint_without_its_parts(change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    """say_what_a_checkpoint_lacks"""

    def apply(state: dict[str, Any]) -> None:
        state.update(change)
        for name in [name for name, value in change.items() if value == "DROP"]:
            del state[name]

    path = checkpoint(tmp_path, apply)
    with pytest.raises(CheckpointError, match=problem) as error:
        checkpoint_utils.load_checkpoint_to_cpu(str(path))
    assert "\n" not in str(error.value) and str(path) in str(error.value)
