"""train.sh --dry-run: what is counted on the meta device is what arithmetic says; nothing is left behind."""

import json
import sys
from pathlib import Path

import pytest
import torch
from commands import refusal, script
from documented import DOCS

from experiments import arithmetic, costs, dimensions, dry_run, paper_table, train
from experiments.costs import Differs, Found, find
from experiments.paper_table import MODELS
from experiments.plan import Plan
from xmoe_fairseq.moe import Experts
from xmoe_fairseq_compat.errors import FlagError

NOWHERE = Path("nowhere")


def found(task: str, preset: str, model: str, *flags: str, gpus: int = 1, data: Path = NOWHERE) -> Found:
    plan = Plan(task, preset, model, gpus)
    words = train.command(plan, data, Path("run"), 1, [*flags], dry_run=True)
    return find(plan, words[words.index(train.TRAINER) + 1 :], data)


@pytest.mark.parametrize("task", MODELS)
def test_the_documents_table_is_what_is_counted(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, and compared with arithmetic: every third row, the script does all."""
    monkeypatch.delenv("UTILISATION", raising=False)
    monkeypatch.setitem(MODELS, task, MODELS[task][::3])
    lines = (DOCS / "paper_runs.md").read_text(encoding="utf-8").splitlines()
    missing = {*paper_table.table(task).splitlines()} - {*lines}
    assert not missing, "run: bash scripts/paper_table.sh"


def test_the_papers_sizes() -> None:
    """By hand: GPT-2 small has 124 M parameters, 38 M of them embeddings, and sinusoidal positions here."""
    shape = found("lm", "paper", "xmoe-s8", gpus=8).shape
    parts = arithmetic.parameters(shape)
    assert parts["embeddings"] == 50_264 * 768
    assert parts["experts"] == 6 * 64 * (2 * 768 * 384 + 384 + 768)
    assert parts["attention"] == 12 * 4 * (768 * 768 + 768)
    flops = arithmetic.flops(shape, 8)  # eight small experts are the dense FFN
    assert flops["experts"] == flops["dense FFNs"] == 6 * 4 * 768 * 3072 * 16_384


@pytest.mark.parametrize(
    "words",
    [
        "lm claims dense-wide", "wmt tiny topk-s4-cheap", "wmt small topk-s8-shared", "lm small topany-s4",
        "lm tiny hash", "lm dense_to_sparse dense", "wmt dense_to_sparse dense",
        "wmt tiny xmoe-s4-normalized",
        "lm small xmoe-s4 --memory-efficient-bf16",
        "lm tiny xmoe-s4 --moe-combine ones",
        "lm tiny dense --decoder-learned-pos",
        "lm tiny xmoe-s4-budget --moe-target-experts-per-token 1.3",
    ],
)  # fmt: skip
def test_other_models_and_flags(words: str) -> None:
    task, preset, model, *flags = words.split()
    assert found(task, preset, model, *flags).batches > 0


@pytest.mark.parametrize(
    ("name", "stand_in", "why"),
    [
        ("router_parameters", lambda *_: 1, "parameters of routers must be 1 by arithmetic, counted 2,048"),
        ("router_products", lambda *_: 0, "FLOPs of everything else must be "),
        ("bias_columns", lambda *_: 0, "FLOPs of experts must be "),
        ("activations", lambda *_: 0, "memory of activations must be "),
    ],
)
def test_a_difference_is_an_error(
    name: str, stand_in: object, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arithmetic, name, stand_in)
    with pytest.raises(Differs, match=why):
        found("lm", "tiny", "xmoe-s4")


def test_states_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dimensions.PRECISIONS, "", dimensions.Precision(4, 4, averages=4))
    with pytest.raises(Differs, match="memory of states must be "):
        found("lm", "tiny", "dense")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("lm paper xmoe --dry-run", "MODEL must be one of dense"),
        ("lm paper dense --dry-run --checkpoint-activations", "--checkpoint-activations True cannot be"),
        ("lm tiny dense --decoder-output-dim 64 --dry-run", "--decoder-output-dim 64 cannot be combined"),
        ("lm paper topk-s2 --dry-run --moe-router-hidden-dim 8", "-router-hidden-dim 8 cannot be combined"),
        ("lm paper gshard --dry-run", "--moe-router gshard cannot be combined with --dry-run"),
    ],
)  # fmt: skip
def test_what_is_refused(words: str, why: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    task, preset, model, *flags = words.split()
    assert why in refusal(train.main, monkeypatch, task, preset, model, "data", "run", *flags)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("GPUS", "3", "GPUS must divide 262,144 tokens per update into batches of 16,384, got 3"),
        ("UTILISATION", "1.5", "UTILISATION must be above 0 and at most 1, got 1.5"),
        ("UTILISATION", "half", "UTILISATION must be above 0 and at most 1, got half"),
    ],
)
def test_variables(name: str, value: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert why in refusal(train.main, monkeypatch, "lm", "paper", "dense", "data", "run", "--dry-run")


def test_a_preset_for_the_cpu_goes_to_gpus_that_are_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lm_data: Path
) -> None:
    monkeypatch.setenv("GPUS", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ("lm", "tiny", "dense", str(lm_data), str(tmp_path / "run"))
    assert "GPUS=1 puts preset tiny on GPUs, and torch finds none" in refusal(train.main, monkeypatch, *words)
    assert not [*tmp_path.iterdir()]


def test_the_users_data_and_flags(lm_data: Path) -> None:
    there = found("lm", "tiny", "dense", "--max-update", "5", data=lm_data)
    assert there.text.dictionary == 4 + len((lm_data / "bin/dict.txt").read_text().splitlines())
    assert there.text.about("lm").endswith("of DATA, which has no counts/")
    assert there.batches * there.tokens == 5 * 1024
    deeper = found("lm", "tiny", "dense", "--decoder-layers", "3", data=lm_data)
    one = there.parameters["dense FFNs"] // 2
    assert deeper.parameters["dense FFNs"] == 3 * one
    assert deeper.batches * deeper.tokens == 1900 * 1024


def test_an_epoch_of_the_users_pairs(mt_data: Path) -> None:
    (mt_data / "counts").mkdir()
    for name, content in {"bpe-train": {"pieces": 9000, "kept": 500}, "spm": {"dictionary": 60}}.items():
        (mt_data / f"counts/{name}.json").write_text(json.dumps(content))
    here = found("wmt", "paper", "dense", data=mt_data)
    assert (here.text.sentence, here.text.epoch) == (10, 5000)  # 9 pieces and an end
    assert here.batches * here.tokens == pytest.approx(10 * 5000)
    assert here.shape.sentences == 16_384 // 10


def test_nothing_is_drawn_where_there_is_no_memory() -> None:
    before = torch.get_rng_state()
    with torch.device("meta"):
        Experts(2, 8, 8)
    assert torch.equal(torch.get_rng_state(), before)


def test_experts_on_several_ranks() -> None:
    hook = sys.excepthook
    whole, part = (
        found(
            "lm", "small", "xmoe-s4", "--moe-expert-parallel-size", n, "--ddp-backend", "legacy_ddp", gpus=2
        )
        for n in "12"
    )
    assert whole.parameters["experts"] == 2 * part.parameters["experts"]
    assert part.memory["rows from other ranks"] > 0 and "rows from other ranks" not in whole.memory
    assert part.memory["states"] < whole.memory["states"] and part.flops(2) == whole.flops(2)
    with pytest.raises(FlagError, match="--moe-expert-parallel-size must divide"):
        found("lm", "small", "xmoe-s4", "--moe-expert-parallel-size", "3", gpus=2)
    assert sys.excepthook is hook  # else later errors of this process would begin with "[rank0]:"


def test_a_batch_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    run = found("lm", "small", "dense")
    assert not dry_run.fitting(run)
    monkeypatch.setattr(dry_run, "MEMORY", sum(run.memory.values()) - 1)
    assert "does not fit into 80 GB: --batch-size 8 --update-freq 8 would" in dry_run.fitting(run)
    monkeypatch.setattr(dry_run, "MEMORY", costs.BESIDE)
    assert "nor would a single sentence" in dry_run.fitting(run)


def test_through_the_shell(tmp_path: Path) -> None:
    said = script(
        "lm/train.sh", "small", "xmoe-s4", tmp_path / "data", tmp_path / "run", "--dry-run", GPUS="2"
    )
    assert (
        "[dry run] 2 GPUs x 16,384 tokens x update-freq 2 = 65,536 tokens per update; 4,000 updates" in said
    )
    assert (
        "text: dictionary of 50,264, DATA is not there, so the paper's; a batch is 16 x 1,024 tokens" in said
    )
    assert "routed experts per token 1.0 to 8.0" in said and "nothing was written" in said
    assert not [*tmp_path.iterdir()]
