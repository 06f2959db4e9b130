"""One test per mend, which fails where the mend is taken away, but for mends that only commands show."""

import argparse
import copy
import dataclasses
import io
import os
import pickle
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fairseq import checkpoint_utils, options
from fairseq.data import LanguagePairDataset, TokenBlockDataset, data_utils
from fairseq.dataclass import FairseqDataclass
from fairseq.dataclass.configs import EMAConfig
from fairseq.distributed import utils as distributed_utils
from fairseq.models import distributed_fairseq_model
from fairseq.models.ema.ema import EMA
from fairseq.models.transformer import TransformerConfig
from fairseq.modules.dynamic_crf_layer import DynamicCRF
from fairseq.modules.transformer_layer import TransformerEncoderLayerBase
from fairseq.optim.amp_optimizer import AMPOptimizer
from fairseq.tasks import FairseqTask
from torch import nn

import xmoe_fairseq_compat as compat
from xmoe_fairseq_compat import models, registry
from xmoe_fairseq_compat.errors import CheckpointError

COMPAT = Path(compat.__file__)


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[dist.ProcessGroup]:
    """A gloo group of this process alone."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # torch's, which names the rank, would stay
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def encoder_layer() -> TransformerEncoderLayerBase:
    cfg = copy.deepcopy(TransformerConfig())  # its parts are one for all of them
    cfg.encoder.embed_dim, cfg.encoder.ffn_embed_dim, cfg.encoder.attention_heads = 8, 8, 2
    return TransformerEncoderLayerBase(cfg)


def test_start_up_imports_no_library() -> None:
    seen = "import sys; print([m for m in ('fairseq', 'numpy', 'torch', 'xmoe_fairseq') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", seen], text=True).strip() == "[]"


def test_ema_averages_floats_and_copies_whole_numbers() -> None:
    model = nn.BatchNorm1d(2)  # counts its batches
    ema = EMA(model, EMAConfig(ema_decay=0.5))
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.num_batches_tracked.fill_(7)
    ema.step(model)
    assert ema.get_model().weight.tolist() == [2.0, 2.0]
    assert ema.get_model().num_batches_tracked == 7


def test_active_once_however_often_it_is_loaded() -> None:
    assert compat.is_active()
    runpy.run_path(str(COMPAT))
    assert sum(getattr(finder, "mends_fairseq", False) for finder in sys.meta_path) == 1


def test_not_active_where_fairseq_came_first() -> None:
    late = f"""
import runpy, sys, types
sys.modules["fairseq"] = types.ModuleType("fairseq")
print(runpy.run_path({str(COMPAT)!r})["is_active"]())
"""
    # -S: without the start-up line
    assert subprocess.check_output([sys.executable, "-S", "-c", late], text=True).strip() == "False"


@pytest.mark.parametrize("version", ["0.11.1", "0.13.0", "1.0.0"])
def test_another_fairseq_is_left_alone(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compat.Finder.find_spec("fairseq") is not None
    monkeypatch.setattr(registry, "is_their_fairseq", registry.is_their_fairseq.__wrapped__)
    monkeypatch.setattr(metadata, "version", lambda package: version)
    assert compat.Finder.find_spec("fairseq") is None


def test_mends_of_a_module_run_in_the_order_of_their_files() -> None:
    """Of one function each wraps the one before, so this says which is the outer one."""
    first = """
import xmoe_fairseq_compat.usage, xmoe_fairseq_compat.scoring
from xmoe_fairseq_compat import registry
registry.read_all()
files = {name: [mend.__module__ for _, mend in mends] for name, mends in registry.after.items()}
assert all(found == sorted(found) for found in files.values()), files
print(len(set(files["fairseq_cli.train"])) > 1)
"""
    command, env = (
        [sys.executable, "-S", "-c", first],
        {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert subprocess.check_output(command, text=True, env=env).strip() == "True"


def test_versions_that_have_no_defect_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(registry, "after", {"m": [(lambda: False, ran.append), (lambda: True, ran.append)]})
    module = SimpleNamespace()
    registry.mended("m", lambda module: None)(module)
    assert ran == [module]


def test_configs_as_defaults() -> None:
    @dataclasses.dataclass
    class Inner(FairseqDataclass):
        width: int = 1

    @dataclasses.dataclass
    class Outer(FairseqDataclass):
        inner: Inner = Inner()

    assert Outer.__dataclass_fields__["inner"].default == Inner()
    assert dataclasses.dataclass.__module__ == "dataclasses", "the standard library must be as it was"


def test_plain_types_in_a_checkpoint() -> None:
    state = {
        "args": argparse.Namespace(lr=1),
        "loss": np.float64(2),
        "ids": np.arange(3),
        "flag": np.bool_(1),
    }
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded["args"] == state["args"] and loaded["loss"] == 2 and loaded["ids"].tolist() == [0, 1, 2]


def test_numpy_1_and_2_names_in_a_checkpoint() -> None:
    file = io.BytesIO()
    torch.save({"loss": np.float32(2)}, file, _use_new_zipfile_serialization=False)
    for core in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        named = file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
        named = named.replace(b"numpy.core.multiarray", core)
        assert torch.load(io.BytesIO(named), weights_only=True)["loss"] == 2


class Stranger:
    pass


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"model": {}, "extra": Stranger()}, "it holds .*Stranger, which is not on the list of types"),
        ({"model": {}, "extra": os.system}, "it holds posix.system, which is not on the list of types"),
        ({"weight": torch.ones(1)}, "it has no entry 'model'"),
        ({"model": {}}, "it has no entry 'cfg'"),
        ({"model": {}, "cfg": {}}, "it has no entry 'optimizer_history'"),
        (b"", "it is damaged or no checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1", "it is damaged or no checkpoint"),
        (b"error 404: not found", "it is damaged or no checkpoint"),
        (pickle.dumps({"model": Stranger()}, protocol=2), "it holds .*Stranger"),
    ],
)
def test_refused_checkpoints(content: object, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(CheckpointError, match=f"cannot load checkpoint {file}: {problem}") as error:
        checkpoint_utils.load_checkpoint_to_cpu(str(file))
    assert "\n" not in str(error.value)


def test_truncated_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    torch.save({"model": {"weight": torch.ones(1000)}}, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(RuntimeError, match="it is damaged or no checkpoint"):
        checkpoint_utils.load_checkpoint_to_cpu(str(file))


def test_missing_checkpoint_stays_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "none.pt"))


def test_encoder_layer_evaluates() -> None:
    layer = encoder_layer().eval()
    padding = torch.tensor([[False, False, True]])
    with torch.no_grad():
        assert not layer.can_use_fastpath
        assert layer(torch.ones(3, 1, 8), padding).isfinite().all()


def test_ddp_on_cpu_does_not_wait_for_unused_weights(group: dist.ProcessGroup) -> None:
    layer = encoder_layer()
    trainable = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
    ddp = distributed_fairseq_model.DistributedDataParallel(layer, device_ids=[0], process_group=group)
    for _ in range(2):
        ddp(torch.ones(3, 1, 8), None).sum().backward()
    assert [name for name, parameter in layer.named_parameters() if parameter.requires_grad] == trainable


def test_gather_on_cpu(group: dist.ProcessGroup) -> None:
    large = {"loss": 1.5, "ids": list(range(20_000))}
    assert distributed_utils.all_gather_list(large, group, max_size=16384) == [large]


def test_old_numpy_names() -> None:
    assert data_utils.get_buckets(np.array([1, 2, 3, 9]), 2).tolist() == [2, 9]
    mask = data_utils.compute_mask_indices((2, 20), None, 0.3, 4, no_overlap=True, min_masks=1)
    assert mask.shape == (2, 20)
    lines = [torch.tensor([4, 2]), torch.tensor([5, 6, 2])]
    blocks = TokenBlockDataset(lines, [2, 3], None, pad=1, eos=2, break_mode="eos")
    assert blocks[1].tolist() == [5, 6, 2]
    words = SimpleNamespace(pad=lambda: 1, eos=lambda: 2, unk=lambda: 3)
    sizes = np.array([2, 3])
    pairs = LanguagePairDataset(lines, sizes, words, lines, sizes, words, num_buckets=1)
    assert pairs.bucketed_num_tokens.tolist() == [3, 3]
    crf = DynamicCRF(num_embedding=5, low_rank=2, beam_size=3)
    targets = torch.tensor([[1, 2]])
    assert crf(torch.zeros(1, 2, 5), targets, torch.ones(1, 2, dtype=torch.bool)).isfinite().all()


def test_bf16_does_not_ask_for_a_tpu() -> None:
    arguments = ["data", "--bf16", "--cpu", "--batch-size", "1", "--arch", "transformer_tiny"]
    parsed = options.parse_args_and_arch(options.get_training_parser(), arguments)
    assert parsed.bf16 and not parsed.tpu


def test_amp_computes_in_bf16_on_a_cpu() -> None:
    """autocast_on_cpu"""
    seen = []

    class Model(nn.Linear):
        def set_num_updates(self, number: int) -> None:
            pass

    def criterion(model: Model, sample: torch.Tensor) -> tuple[torch.Tensor, int, dict]:
        y = model(sample)
        seen.append(y.dtype)
        return y.sum(), 1, {}

    for optimizer in (object.__new__(AMPOptimizer), SimpleNamespace()):
        optimizer.backward = lambda loss: None
        FairseqTask(None).train_step(torch.ones(1, 2), Model(2, 2), criterion, optimizer, 0)
    assert seen == [torch.bfloat16, torch.float32]


def help_of_training(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        options.parse_args_and_arch(options.get_training_parser(), ["--help", *arguments])
    assert not end.value.code
    return capsys.readouterr().out


def test_help_has_the_flags_of_what_was_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ("--arch", "transformer_lm", "--task", "language_modeling", "--optimizer", "adam")
    text = help_of_training(capsys, *chosen)
    for flag in ("--decoder-layers", "--tokens-per-sample", "--adam-betas", "--max-update"):
        assert len(re.findall(rf"^  {flag} ", text, re.M)) == 1
    assert "--decoder-layers" not in help_of_training(capsys)


def test_training_without_an_architecture_is_refused_with_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as end:
        options.parse_args_and_arch(options.get_training_parser(), ["data"])
    assert end.value.code == 2 and "error: --arch must be given" in capsys.readouterr().err


def test_development_versions_of_torch_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """read_development_versions"""
    monkeypatch.setattr(torch, "__version__", "2.14.0a0+git1234")
    module = SimpleNamespace()
    models.read_development_versions(module)
    assert module.torch.__version__ == "2.14.0"
    assert module.torch.cat is torch.cat
