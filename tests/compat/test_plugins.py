"""What the patches know of a plugin: what it registers, and what it declares where it is not loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.checkpoint_utils import load_checkpoint_to_cpu
from hostile import checkpoint

import xmoe_fairseq.hooks  # noqa: F401  (with which its own functions are registered before those below)
from xmoe_fairseq_compat import plugins
from xmoe_fairseq_compat.errors import CheckpointError, FlagError
from xmoe_fairseq_compat.misfits import other_sizes
from xmoe_fairseq_compat.override_rules import check_overrides, refuse


def test_a_checkpoint_is_what_plugins_make_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """let_plugins_complete_a_checkpoint"""

    def complete(state: dict[str, Any], path: Any, overrides: dict[str, Any] | None) -> dict[str, Any]:
        return {**state, "model": {"read from": path, **(overrides or {"only": "read"})}}

    path = str(checkpoint(tmp_path))
    monkeypatch.setattr(plugins, "after_load", [*plugins.after_load, complete])
    assert load_checkpoint_to_cpu(path)["model"] == {"read from": path, "only": "read"}
    assert load_checkpoint_to_cpu(path, {"dropout": 0.5})["model"] == {"read from": path, "dropout": 0.5}


def test_a_checkpoint_in_several_files_without_the_plugin_that_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugins, "after_load", [])
    entry = {"model": {"w": None}, "expert_shards": {"id": "1-a", "files": ["experts/1-a_0-of-1.pt"]}}
    path = checkpoint(tmp_path, lambda state: state.update(entry))
    with pytest.raises(CheckpointError) as error:
        load_checkpoint_to_cpu(str(path))
    missing = "some of it lies in other files; add --user-dir xmoe_fairseq to read them"
    assert str(error.value) == f"cannot load checkpoint {path}: {missing}"
    checkpoint(tmp_path, lambda state: state.update(model={"w": None, "v": torch.ones(1)}, other=5))
    assert load_checkpoint_to_cpu(str(path))["model"]["w"] is None, (
        "of no plugin: the model says what it lacks"
    )


def test_rules_and_sizes_of_a_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "override_rules", [lambda changed, all_: refuse(f"{changed} of {all_}")])
    with pytest.raises(FlagError, match="--model-overrides: {'a': 1} of {'a': 1, 'b': 3}"):
        check_overrides({"a": 1}, {"model": {"a": 2, "b": 3}}, "x.pt")
    saved, here = {"my_width": 8, "dropout": 0}, {"my_width": 9, "dropout": 1}
    assert other_sizes(saved, here) == ""
    monkeypatch.setattr(plugins, "shaping", ["my_.*"])
    assert other_sizes(saved, here) == " (it was trained with --my-width 8, here 9)"


def test_names_that_an_installed_plugin_declares() -> None:
    for name in ("--moe-freq", "moe_cross_entropy", "xmoe_transformer", "expert_shards"):
        declared = plugins.plugin_of(name)
        assert declared and declared.value == "xmoe_fairseq", name
    assert plugins.plugin_of("transformer") is None
    assert plugins.is_command("xmoe-convert") and not plugins.is_command("pip")
    assert {"xmoe_transformer", "xmoe_transformer_lm"} <= set(plugins.models())
