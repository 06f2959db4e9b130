"""--moe-kernel: what computes the experts is forced for a run, and is no property of what it trained."""

from pathlib import Path
from typing import Any

import torch
from commands import TINY_LM, TRAIN, run
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
    assert opened() == opened({"moe_threshold": 0.5}) == ["auto"]
    assert opened({"moe_kernel": "loop"}) == opened({"model": {"moe_kernel": "loop"}}) == ["loop"]
    output = train(corpus, tmp_path, "--max-update", 2)  # goes on, with another
    assert "experts are computed by kernel" in output and "kernel plain" not in output


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
    assert output.count("experts are computed by kernel loop (cpu, torch.float32)") == 1


def test_a_call_that_the_kernel_cannot_take_ends_with_one_line(
    corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    output = train(corpus, tmp_path, "--moe-kernel", "single", "--max-update", 1, succeeds=False)
    last = "fairseq-train: error: kernel single (use_kernel, --moe-kernel) needs one token, got "
    assert output.splitlines()[-1].startswith(last) and "Traceback" not in output
