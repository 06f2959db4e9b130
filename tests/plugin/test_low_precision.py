"""Commands that evaluate in bf16 and fp16, on a CPU too; training with --amp."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import PLUGIN, TRAIN, call, run
from fairseq_cli import eval_lm, validate
from parallel_runs import LM, train
from tolerances import assert_same

from xmoe_fairseq.models.language_model import XMoETransformerLanguageModel

READ = (*PLUGIN, "--cpu", "--num-workers", 0, "--batch-size", 4)
COST = re.compile(r"^MoE: ([\d.]+) of 8 experts per token", re.M)


@pytest.fixture
def dtypes(monkeypatch: pytest.MonkeyPatch) -> set[torch.dtype]:
    """Those of the weights with which a language model computes in this process."""
    found, plain = set[torch.dtype](), XMoETransformerLanguageModel.forward

    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        found.update(p.dtype for p in self.parameters())
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(XMoETransformerLanguageModel, "forward", forward)
    return found


@pytest.mark.parametrize(
    ("command", "main", "number"),
    [
        ("fairseq-eval-lm", eval_lm.cli_main, r"Loss \(base 2\): ([\d.]+)"),
        ("fairseq-validate", validate.cli_main, r"\"valid_loss\": \"([\d.]+)\""),
    ],
)
def test_a_language_model_is_scored_in_low_precision(
    command: str, main: Any, number: str, corpus: tuple[Path, Path], language_checkpoint: Path,
    dtypes: set[torch.dtype],
) -> None:  # fmt: skip
    flags = [corpus[1], *READ, "--path", language_checkpoint, "--log-format", "json"]
    flags += ("--tokens-per-sample", 32) * (command == "fairseq-eval-lm")
    losses = []
    for dtype, more in ((torch.float32, ()), (torch.bfloat16, ("--bf16",)), (torch.float16, ("--fp16",))):
        dtypes.clear()
        output = run(command, *flags, *more)
        (loss,) = re.findall(number, output)
        losses.append(float(loss))
        assert len(COST.findall(output)) == 1
        status, said = call(main, command, *flags, *more)
        assert status == 0 and dtypes == {dtype}, said[-2000:]
    assert losses == [pytest.approx(losses[0], rel=0.01)] * 3


def test_translations_in_bf16(corpus: tuple[Path, Path], translation_checkpoint: Path) -> None:
    """Scores near those of fp32, and yet not they."""
    flags = (*READ, "--source-lang", "en", "--target-lang", "de", "--beam", 1, "--max-len-b", 20)
    flags = (*flags, "--path", translation_checkpoint)
    interactive = ("fairseq-interactive", ("--buffer-size", 4), "w1 w2 w3\nw4\n")
    for command, more, stdin in (("fairseq-generate", (), ""), interactive):
        outputs = [run(command, corpus[0], *flags, *more, *how, stdin=stdin) for how in ((), ("--bf16",))]
        found = [re.findall(r"^H-\d+\t(\S+)\t", output, re.M) for output in outputs]
        exact, rounded = ([float(score) for score in scores] for scores in found)
        assert rounded != exact and len(exact) > 1
        assert rounded == pytest.approx(exact, rel=0.1)
        assert all(len(COST.findall(output)) == 1 for output in outputs)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--fp16", "--bf16"), "--fp16 cannot be combined with --bf16 or --tpu: leave one out"),
        (("--memory-efficient-bf16", "--fp16"), "--fp16 cannot be combined with --bf16 or --tpu"),
        (("--fp16", "--amp"), "--amp cannot be combined with --fp16, got True"),
        (("--amp",), "--amp is for training: give --bf16 or --fp16"),
    ],
)
def test_precisions_that_are_refused(
    flags: tuple[str, ...], line: str, corpus: tuple[Path, Path], language_checkpoint: Path
) -> None:
    output = run("fairseq-eval-lm", corpus[1], *READ, "--path", language_checkpoint, *flags, succeeds=False)
    assert output.splitlines()[-1].startswith(f"fairseq-eval-lm: error: {line}")


class LiveScaler(torch.amp.GradScaler):
    """As on a GPU: there fairseq's is on."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("cpu", **kwargs)

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        assert self.get_scale() == 128
        super().unscale_(optimizer)


def test_amp_trains_the_same_with_a_scaler(
    corpus: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power of 2 rounds nothing. SGD's updates are as large as the gradients, Adam's always alike."""
    flags = (corpus[1], *LM, *TRAIN, "--no-save", "--disable-validation", "--max-update", 3, "--dropout", 0)
    flags = (*flags, "--optimizer", "sgd", "--lr", 0.5)
    exact, off = (train(1, *flags, *more)[0] for more in ((), ("--amp",)))
    monkeypatch.setattr(torch.cuda.amp, "GradScaler", LiveScaler)
    (live,) = train(1, *flags, "--amp")
    assert len(live["norms"]) == 3
    assert_same(live["norms"], off["norms"])
    assert_same(live["weights"], off["weights"])
    for norm, expected in zip(live["norms"], exact["norms"], strict=True):
        assert norm.item() == pytest.approx(expected.item(), rel=0.02)


def test_a_run_in_bf16_does_not_go_on_in_fp16(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    flags = (corpus[1], *PLUGIN, *LM, *TRAIN, "--save-dir", tmp_path, "--max-update")
    run("fairseq-train", *flags, 1, "--bf16")
    refused = run("fairseq-train", *flags, 2, "--fp16", succeeds=False)
    assert "its optimizer's state is of other groups of parameters" in refused.strip().splitlines()[-1]
    assert "add --reset-optimizer" in refused and "Traceback" not in refused
