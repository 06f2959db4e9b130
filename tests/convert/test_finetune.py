"""What a converted model is fine-tuned by; and a dense model whose activations were made sparse before."""

from pathlib import Path

import torch
import torch.nn.functional as F
from commands import PLUGIN, TRAIN, call, logged, run
from stock import LM, SMALL, Stock
from tolerances import about, assert_same
from torch import nn

from xmoe_fairseq.batches import Batches
from xmoe_fairseq.convert import convert_command
from xmoe_fairseq.convert.finetune import distillation, task_loss
from xmoe_fairseq.convert.models import Dense, read_dense, read_sparse
from xmoe_fairseq.moe import moe_layers
from xmoe_fairseq.moe.records import fix_thresholds

PENALISED = ("--arch", "xmoe_transformer_lm", "--moe-freq", "0", "--criterion", "moe_cross_entropy",
             "--ffn-sparsity-coeff", "0.1")  # fmt: skip


def converted(path: Path, data: Path, sparse: Path, *flags: object) -> tuple[Dense, nn.Module]:
    """The dense model and the sparse one."""
    words = (path, sparse, "--split", 8, "--calibration", data, *SMALL, *flags)
    assert call(convert_command.main, "xmoe-convert", *words)[0] == 0
    dense = read_dense(path, str(data))
    return dense, read_sparse(sparse, dense.task)


def test_a_model_that_was_penalised_is_converted_tuned_and_opened(stock: Stock, tmp_path: Path) -> None:
    """Without the penalty, which a model with experts refuses, and without the load-balance loss."""
    path, data = stock("lm", *PENALISED)
    dense, sparse = converted(path, data, tmp_path / "sparse.pt", "--finetune-updates", 2)
    sample = next(iter(Batches(dense.task, "valid", 60, 100, 1)))
    loss, size = task_loss(dense)(sparse, sample)
    logits, target = sparse(**sample["net_input"])[0].flatten(0, 1), sample["target"].flatten()
    expected = F.cross_entropy(logits, target, ignore_index=1, reduction="sum")
    assert loss.item() == about(expected) and size == sample["ntokens"]
    said = run("fairseq-validate", data, *PLUGIN, "--cpu", "--path", tmp_path / "sparse.pt", "--task",
               "language_modeling", "--valid-subset", "valid", "--batch-size", 4)  # fmt: skip
    assert "moe_decoder_experts_per_token" in said and "ffn_active" not in said


def test_distillation_is_the_divergence_over_the_target_tokens(stock: Stock, tmp_path: Path) -> None:
    dense, sparse = converted(*stock("mt"), tmp_path / "sparse.pt")
    batches = Batches(dense.task, "valid", 2**62, 100, 1)
    sample = next(batch for batch in batches if not batch["target"].ne(1).all())
    real = sample["target"].ne(1)
    with torch.no_grad():
        loss, size = distillation(dense)(sparse, sample)
        p, q = (model(**sample["net_input"])[0][real].double().softmax(1) for model in (sparse, dense.model))
    assert size == real.sum()
    assert_same(loss.double(), (q * (q / p).log()).sum(), dtype=torch.float32)
    assert loss > 0.01
    fix_thresholds(sparse, [1.0] * len(moe_layers(sparse)))
    whole = distillation(dense)(sparse, sample)[0]
    assert whole.abs() < 1e-4
    whole.backward()
    assert not any(parameter.grad is not None for parameter in dense.model.parameters())


def test_a_stock_model_goes_on_with_the_penalty_and_resumes(stock: Stock, tmp_path: Path) -> None:
    """From fairseq's own checkpoint; then by the same command again."""
    path, data = stock("lm")
    common = (
        "fairseq-train", data, *PLUGIN, *LM, *TRAIN, "--save-dir", tmp_path / "sparser", "--arch",
        "transformer_lm", "--criterion", "moe_cross_entropy", "--ffn-sparsity-coeff", "0.1",
        "--finetune-from-model", path,
    )  # fmt: skip
    first = logged(run(*common, "--max-update", 2), "train_inner")
    assert [line["num_updates"] for line in first] == [1, 2]
    assert all(0 < line["ffn_active"] < 1 and 0 < line["ffn_penalty"] < 1 for line in first)
    again = logged(run(*common, "--max-update", 3), "train_inner")
    assert [line["num_updates"] for line in again] == [3]
