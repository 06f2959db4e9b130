"""One test per patch of fairseq's models, which fails where the patch is taken away."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import run
from fairseq import checkpoint_utils
from fairseq.dataclass.configs import EMAConfig
from fairseq.models.ema.ema import EMA
from stock import LANGUAGE
from tolerances import assert_same
from torch import Tensor, nn
from toy import encoder_layer, language_model, sentences, translation_model

from xmoe_fairseq_compat import models
from xmoe_fairseq_compat.errors import CheckpointError, FlagError, UserError


def pre_norm_model(**overrides: Any) -> Any:
    return language_model(moe_freq=0, share_decoder_input_output_embed=True, **overrides).eval()


def saved(path: Path, model: Any, extra_state: dict[str, Any]) -> str:
    """The least that fairseq takes for a checkpoint."""
    state = {
        "model": model.state_dict(),
        "cfg": {},
        "extra_state": extra_state,
        "optimizer_history": [{"best_loss": 1}],
    }
    torch.save(state, path)
    return str(path)


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(tokens)[0]
    return result


def test_the_average_of_a_pre_norm_model_keeps_its_last_norm(tmp_path: Path) -> None:
    """With decay 0 the average is the model itself."""
    model, tokens = pre_norm_model(), sentences([9, 9])
    ema = EMA(model, EMAConfig(ema_decay=0.0))
    with torch.no_grad():
        model.decoder.layer_norm.weight.fill_(3.0)
    ema.step(model)
    path = saved(tmp_path / "a.pt", model, {"ema": ema.get_model().state_dict()})
    checkpoint_utils.save_ema_as_checkpoint(path, str(tmp_path / "ema.pt"))
    loaded = pre_norm_model()
    loaded.load_state_dict(checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "ema.pt"))["model"])
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


@pytest.mark.parametrize("fp32", [False, True])
def test_the_average_of_a_tied_weight_decays_once(fp32: bool) -> None:
    model = pre_norm_model()
    ema = EMA(model, EMAConfig(ema_decay=0.5, ema_fp32=fp32))
    with torch.no_grad():
        before = {name: value.clone() for name, value in model.state_dict().items()}
        for parameter in model.parameters():
            parameter.add_(1.0)
    ema.step(model)
    average = ema.get_model()
    assert average.decoder.output_projection.weight is average.decoder.embed_tokens.weight
    averages = dict(average.named_parameters())
    assert_same(averages, {name: before[name] + 0.5 for name in averages})


def test_an_average_saved_without_its_last_norm_takes_the_models(caplog: pytest.LogCaptureFixture) -> None:
    model = pre_norm_model()
    ema = EMA(model, EMAConfig(ema_decay=0.5))
    damaged = {n: v for n, v in model.state_dict().items() if not n.startswith("decoder.layer_norm")}
    damaged["decoder.version"] = torch.ones(1)
    with caplog.at_level(logging.WARNING):
        ema.restore(damaged)
    assert "lacks decoder.layer_norm.weight, decoder.layer_norm.bias: taken from the model" in caplog.text
    assert ema.get_model().decoder.layer_norm is not None
    assert ema.get_model().state_dict()["decoder.version"].tolist() == [3.0]


def test_a_checkpoint_with_a_part_of_an_average_is_refused(tmp_path: Path) -> None:
    model = pre_norm_model()
    part = {n: v for n, v in model.state_dict().items() if n != "decoder.layer_norm.bias"}
    with pytest.raises(CheckpointError, match=r"averaged weights \(EMA\) lack decoder.layer_norm.bias"):
        checkpoint_utils.load_ema_from_checkpoint(saved(tmp_path / "part.pt", model, {"ema": part}))
    with pytest.raises(CheckpointError, match="train with --store-ema"):
        checkpoint_utils.load_ema_from_checkpoint(saved(tmp_path / "none.pt", model, {}))


@pytest.mark.parametrize(
    ("dtype", "decay", "fp32", "refused"),
    [
        (torch.float16, 0.9999, False, True),
        (torch.float16, 0.9999, True, False),
        (torch.float16, 0.99, False, False),
        (torch.bfloat16, 0.999, False, True),
        (torch.float32, 0.9999, False, False),
        (torch.float32, 1.0, False, True),
    ],
)
def test_an_average_that_would_stand_still_is_refused(
    dtype: torch.dtype, decay: float, fp32: bool, refused: bool
) -> None:
    model = translation_model(moe_freq=0).to(dtype)
    config = EMAConfig(ema_decay=decay, ema_fp32=fp32)
    if refused:
        with pytest.raises(FlagError, match="^--ema-decay") as error:
            EMA(model, config)
        if 0 <= decay < 1:  # what the line advises is taken
            EMA(model, EMAConfig(ema_decay=float(str(error.value).rpartition(" ")[2]))).step(model)
    else:
        EMA(model, config).step(model)


def test_embeddings_that_do_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "vectors"
    for text, message in (("", "it is empty"), ("1 2\nw 0.5 x\n", "could not convert")):
        file.write_text(text)
        with pytest.raises(UserError, match=f"^embeddings .*vectors must hold .*: {message}"):
            translation_model(moe_freq=0, encoder_embed_path=str(file))
    with pytest.raises(UserError, match="^embeddings /no/such: No such file or directory$"):
        translation_model(moe_freq=0, encoder_embed_path="/no/such")
    file.write_text("1 2\nsymbol0 0.5 0.25\n")
    with pytest.raises(FlagError, match="'symbol0' has 2 numbers, the model 32"):
        translation_model(moe_freq=0, encoder_embed_path=str(file))
    file.write_text("1 32\nsymbol0" + " 0.5" * 32 + "\n")
    model = translation_model(moe_freq=0, encoder_embed_path=str(file))
    assert torch.equal(model.encoder.embed_tokens.weight[4], torch.full((32,), 0.5))


def test_an_average_may_begin_where_a_run_goes_on(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    flags = (corpus[1], *LANGUAGE, "--save-dir", tmp_path, "--max-update")
    run("fairseq-train", *flags, 1)
    output = run("fairseq-train", *flags, 2, "--store-ema", "--ema-decay", 0.5)
    assert "holds no average (EMA): it begins at its weights" in output
    state = checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "checkpoint_last.pt"))
    assert state["extra_state"]["ema"].keys() >= {"decoder.embed_tokens.weight"}


def test_ema_averages_floats_and_copies_whole_numbers() -> None:
    model = nn.BatchNorm1d(2)  # counts its batches
    ema = EMA(model, EMAConfig(ema_decay=0.5))
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.num_batches_tracked.fill_(7)
    ema.step(model)
    assert ema.get_model().weight.tolist() == [2.0, 2.0]
    assert ema.get_model().num_batches_tracked == 7


def test_encoder_layer_evaluates() -> None:
    layer = encoder_layer().eval()
    padding = torch.tensor([[False, False, True]])
    with torch.no_grad():
        assert not layer.can_use_fastpath
        assert layer(torch.ones(3, 1, 8), padding).isfinite().all()


def test_development_versions_of_torch_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """read_development_versions"""
    monkeypatch.setattr(torch, "__version__", "2.14.0a0+git1234")
    module = SimpleNamespace()
    models.read_development_versions(module)
    assert module.torch.__version__ == "2.14.0"
    assert module.torch.cat is torch.cat
