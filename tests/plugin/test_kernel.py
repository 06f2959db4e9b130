"""--moe-kernel: what computes the experts is forced for a run, and is no property of what it trained."""

from pathlib import Path
from typing import Any

import torch
from commands import PLUGIN, TINY_LM, TRAIN, run
from fairseq import checkpoint_utils

from xmoe_fairseq.moe import moe_layers


def train(corpus: tuple[Path, Path], folder: Path, *flags: object, succeeds: bool = True) -> str:
    fixed = (corpus[1], *TINY_LM, *TRAIN, "--disable-validation", "--save-dir", folder)
    return run("fairseq-train", *fixed, *flags, succeeds=succeeds)


def test_a_checkpoint_opens_with_auto_again_unless_it_is_asked_for_another(
    corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    def opened(overrides: Any = None) -> list[str]:
        (model,), *_ = checkpoint_utils.load_model_ensemble([str(checkpoint)], overrides)
        return [layer.experts.kernel for layer in moe_layers(model)]

    output = train(corpus, tmp_path, "--moe-kernel", "plain", "--max-update", 1)
    assert output.count("experts are computed by kernel plain (cpu, torch.float32)") == 1
    assert output.count("experts are computed by kernel") == 1
    checkpoint = tmp_path / "checkpoint_last.pt"
    assert torch.load(checkpoint, weights_only=True)["cfg"]["model"]["moe_kernel"] == "plain"
    assert opened() == opened({"moe_output_scale": 2.0}) == ["auto"]
    assert opened({"moe_kernel": "native"}) == opened({"model": {"moe_kernel": "native"}}) == ["native"]
    output = train(corpus, tmp_path, "--max-update", 2)  # goes on, with another
    assert "experts are computed by kernel" in output and "kernel plain" not in output


def test_a_kernel_that_there_is_no_more_stops_no_checkpoint_and_is_refused_as_a_flag(
    corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    """There were `loop` and `single`."""
    train(corpus, tmp_path, "--max-update", 1)
    checkpoint = tmp_path / "checkpoint_last.pt"
    state = torch.load(checkpoint, weights_only=True)
    state["cfg"]["model"]["moe_kernel"] = "loop"
    torch.save(state, checkpoint)
    scoring = ("fairseq-eval-lm", corpus[1], *PLUGIN, "--path", checkpoint, "--gen-subset", "valid")
    assert run(*scoring).count("experts are computed by kernel") == 1
    output = run(*scoring, "--model-overrides", "{'moe_kernel': 'loop'}", succeeds=False)
    known = "--moe-kernel must be one of auto, native, grouped, plain, got loop"
    assert output.splitlines()[-1] == f"fairseq-eval-lm: error: {known}"
    output = train(corpus, tmp_path, "--max-update", 2, "--moe-kernel", "loop", succeeds=False)
    assert output.splitlines()[-1] == f"fairseq-train: error: {known}"
    assert "experts are computed by kernel" in train(corpus, tmp_path, "--max-update", 2)


ELSEWHERE = """
from pathlib import Path
import xmoe_fairseq
from xmoe_fairseq.moe import native
native.HERE = Path(__file__).parent
"""


def test_without_the_native_library_one_line_says_so(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    user_dir = tmp_path / "elsewhere"
    user_dir.mkdir()
    (user_dir / "__init__.py").write_text(ELSEWHERE)
    output = train(corpus, tmp_path, "--user-dir", user_dir, "--max-update", 2)
    assert output.count("no native kernel") == output.count("python -m xmoe_fairseq.moe.native") == 1
    assert output.count("experts are computed by kernel plain (cpu, torch.float32)") == 1


def test_a_call_that_the_kernel_cannot_take_ends_with_one_line(
    corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    output = train(corpus, tmp_path, "--moe-kernel", "native", "--activation-fn", "tanh", succeeds=False)
    last = "fairseq-train: error: kernel native (use_kernel, --moe-kernel) needs relu, gelu or silu, got tanh"
    assert output.splitlines()[-1] == last and "Traceback" not in output
