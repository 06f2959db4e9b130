"""Going on from a checkpoint: what is not there, and weights that do not fit."""

import re
from pathlib import Path

import pytest
import torch
from fairseq import checkpoint_utils, options
from fairseq.dataclass.configs import CheckpointConfig
from fairseq.models import BaseFairseqModel
from torch import nn

from xmoe_fairseq_compat.errors import CheckpointError, FlagError
from xmoe_fairseq_compat.misfits import WeightsError, check_left_out, misfit, other_sizes
from xmoe_fairseq_compat.resuming import check_named_files


@pytest.mark.parametrize("flag", ["--restore-file", "--finetune-from-model", "--continue-once"])
@pytest.mark.parametrize("name", ["typo.pt", "folder.pt"])
def test_files_that_are_not_there(flag: str, name: str, tmp_path: Path) -> None:
    """refuse_a_missing_checkpoint"""
    (tmp_path / "folder.pt").mkdir()
    cfg = CheckpointConfig(save_dir=str(tmp_path))
    is_file = checkpoint_utils.PathManager.isfile
    check_named_files(cfg, "", is_file)  # there is no checkpoint_last.pt, and nobody asked for it
    setattr(cfg, flag[2:].replace("-", "_"), str(tmp_path / name))
    with pytest.raises(FlagError, match=f"{flag}: there is no file {tmp_path}/{name}"):
        check_named_files(cfg, "", is_file)
    (tmp_path / "checkpoint_last.pt").touch()  # which a run that goes on reads in the place of the others
    if flag != "--restore-file":
        check_named_files(cfg, "", is_file)


def test_flags_that_exclude_each_other() -> None:
    cfg = CheckpointConfig(finetune_from_model="a.pt", restore_file="b.pt")
    with pytest.raises(FlagError, match="--finetune-from-model and --restore-file b.pt cannot be combined"):
        check_named_files(cfg, "", lambda path: True)
    cfg = CheckpointConfig(finetune_from_model="a.pt", reset_lr_scheduler=True)
    with pytest.raises(FlagError, match="--reset-lr-scheduler cannot be combined with --finetune-from-model"):
        check_named_files(cfg, "", lambda path: True)


class Model(BaseFairseqModel):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))


def test_weights_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """name_the_weights_that_do_not_fit, name_the_checkpoint_that_does_not_fit"""
    state = Model(3, 5).state_dict()
    with pytest.raises(WeightsError) as error:
        Model(2, 3).load_state_dict(state)
    assert str(error.value) == (
        "its weights do not fit the model: layers.0.weight is [3, 3], not [2, 2], layers.0.bias is [3], not"
        " [2], layers.1.weight is [3, 3], not [2, 2] and 3 more; it has besides layers.3.weight,"
        " layers.3.bias, layers.4.weight and 1 more"
    )
    with pytest.raises(WeightsError, match="it has no layers.5.weight, layers.5.bias$"):
        Model(3, 6).load_state_dict(state)
    with pytest.raises(WeightsError, match="layers.0.bias is no tensor$"):
        Model(3, 5).load_state_dict({**state, "layers.0.bias": 5})

    class Task:
        def build_model(self, cfg: object) -> Model:
            return Model(2, 5)

    file = tmp_path / "checkpoint.pt"
    history = {"num_updates": 1, "criterion_name": "x", "lr_scheduler_state": {}}
    cfg = {"model": {"_name": "transformer"}}
    torch.save({"args": None, "cfg": cfg, "model": state, "optimizer_history": [history],
                "extra_state": {}, "last_optimizer_state": None}, file)  # fmt: skip
    with pytest.raises(CheckpointError, match=f"cannot load checkpoint {file}: its weights do not") as error:
        checkpoint_utils.load_model_ensemble_and_task([str(file)], task=Task())
    assert "\n" not in str(error.value)


def test_another_dictionary_is_recognised() -> None:
    table = nn.ModuleDict({"embed_tokens": nn.Embedding(7, 2)})
    other = nn.ModuleDict({"embed_tokens": nn.Embedding(9, 2)})
    with pytest.raises(RuntimeError) as error:
        table.load_state_dict(other.state_dict())
    assert re.search(
        r"is \[9, 2\], not \[7, 2\]; it was trained with another dictionary$", misfit(str(error.value))
    )
    assert misfit("CUDA out of memory") is None


def test_sizes_are_compared_not_what_a_run_may_change() -> None:
    saved = {"decoder_layers": 2, "decoder_embed_dim": 8, "dropout": 0.1, "moe_freq": 2, "old_dim": 1}
    here = {"decoder_layers": 2, "decoder_embed_dim": 16, "dropout": 0.3, "moe_freq": 1, "data_dim": 1}
    expected = " (it was trained with --decoder-embed-dim 8, here 16, --moe-freq 2, here 1)"
    assert other_sizes(saved, here) == expected
    assert other_sizes(saved, saved) == ""


def test_a_script_may_change_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it hands over counts, not its own command line."""
    changed = {"activation_fn": ("gelu", "relu")}
    arguments = ["data", "--batch-size", "1", "--arch", "transformer"]
    options.parse_args_and_arch(options.get_training_parser(), [*arguments, "--activation-fn", "relu"])
    check_left_out("x.pt", changed)
    options.parse_args_and_arch(options.get_training_parser(), arguments)
    with pytest.raises(CheckpointError, match="add --activation-fn gelu to keep"):
        check_left_out("x.pt", changed)
    monkeypatch.setattr("sys.argv", ["bin/fairseq-hydra-train", "--config-name", "of_mine"])
    with pytest.raises(CheckpointError, match=r"add \+\+model.activation_fn=gelu to keep"):
        check_left_out("x.pt", changed)
    monkeypatch.setattr("xmoe_fairseq_compat.misfits._words", [])
    monkeypatch.setattr("sys.argv", ["bin/fairseq-hydra-train", "++model.activation_fn=relu"])
    check_left_out("x.pt", changed)


@pytest.mark.parametrize(
    ("saved", "here", "what"),
    [
        (False, True, "add an --arch without --decoder-normalize-before to keep them"),
        (True, False, "add --decoder-normalize-before to keep them"),
    ],
)
def test_a_switch_that_is_off_is_not_told_to_be_typed(
    saved: bool, here: bool, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xmoe_fairseq_compat.misfits._words", ["data"])
    change = ", or --decoder-normalize-before to change them" if here else ""
    with pytest.raises(CheckpointError) as error:
        check_left_out("x.pt", {"decoder_normalize_before": (saved, here)})
    assert str(error.value).endswith(what + change)
