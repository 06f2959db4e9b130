"""Training with the stock commands: resume, precision, accumulation, hydra, several processes, logging."""

import re
from pathlib import Path

import pytest
import torch
from commands import PLUGIN, TINY_LM, TINY_MT, TRAIN, logged, run, run_as_torchrun
from tolerances import printed

MOE_KEYS = (
    "load_balance_loss", "experts_per_token", "flops_vs_all_experts", "flops_vs_dense_ffn", "dropped_share",
    "load_cv", "max_violation", "dead_experts", "router_entropy",
)  # fmt: skip


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    state = torch.load(checkpoint, weights_only=True)
    optimizer = state["last_optimizer_state"]["state"]
    moments = {f"{i}.{name}": value for i, slot in optimizer.items() for name, value in slot.items()}
    # fairseq never sets nor reads this buffer of its sinusoidal positions, nor trains the fast path's copies.
    unused = re.compile(r".*\._float_tensor|encoder\.layers\.\d+\.(in_proj|out_proj|fc1|fc2)_(weight|bias)")
    model = {name: value for name, value in state["model"].items() if not unused.fullmatch(name)}
    return model | {name: torch.as_tensor(value) for name, value in moments.items()}


@pytest.mark.parametrize(
    "kind, balance", [("translation", "bias"), ("language", "first"), ("language", "global")]
)
def test_resuming_continues_bit_for_bit(
    kind: str, balance: str, corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    flags = (corpus[0], *TINY_MT) if kind == "translation" else (corpus[1], *TINY_LM)
    flags = (
        *flags,
        *TRAIN,
        "--moe-balance",
        balance,
        "--update-freq",
        2,
        "--dropout",
        "0.2",
        "--disable-validation",
        "--store-ema",
        "--save-dir",
    )
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run("fairseq-train", *flags, straight, "--max-update", 8)
    run("fairseq-train", *flags, resumed, "--max-update", 3)
    output = run("fairseq-train", *flags, resumed, "--max-update", 8)
    assert "Loaded checkpoint" in output
    expected, got = tensors(straight / "checkpoint_last.pt"), tensors(resumed / "checkpoint_last.pt")
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def test_statistics_are_logged_for_both_sides_and_count_recomputed_layers_once(
    corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    flags = (
        corpus[0],
        *TINY_MT,
        *TRAIN,
        "--max-update",
        4,
        "--update-freq",
        2,
        "--no-save",
        "--save-dir",
        tmp_path,
    )
    pytest.importorskip("tensorboardX")
    plain = run("fairseq-train", *flags, "--tensorboard-logdir", tmp_path / "tb")
    recomputed = run("fairseq-train", *flags, "--checkpoint-activations")
    keys = [
        f"{split}_moe_{side}_{key}"
        for split in ("train", "valid")
        for side in ("encoder", "decoder")
        for key in MOE_KEYS
    ]
    records = logged(plain, "train")[-1] | logged(plain, "valid")[-1]
    again = logged(recomputed, "train")[-1] | logged(recomputed, "valid")[-1]
    for key in keys:
        assert again[key] == printed(records[key], 4), key
    for side in ("encoder", "decoder"):
        assert (
            1.0 <= records[f"train_moe_{side}_load_balance_loss"] < 2.0
        )  # a mean, however many were added up
        share = records[f"train_moe_{side}_experts_per_token"]
        assert 1.0 <= share <= 4.0
        router = 8 / (2 * 16)  # costs as many experts: 2DE over 4DF
        dense_share = records[f"train_moe_{side}_flops_vs_dense_ffn"]
        assert dense_share == printed((share + router) / 2, 4)
        assert records[f"train_moe_{side}_dropped_share"] == 0
    written = b"".join(path.read_bytes() for path in (tmp_path / "tb").rglob("events*"))
    for key in MOE_KEYS:
        assert f"moe_encoder_{key}".encode() in written


@pytest.mark.parametrize("precision", ["--bf16", "--amp", "--fp16"])
def test_low_precision_trains(precision: str, corpus: tuple[Path, Path], tmp_path: Path) -> None:
    output = run(
        "fairseq-train",
        corpus[1],
        *TINY_LM,
        *TRAIN,
        "--lr",
        "5e-3",
        "--max-update",
        30,
        "--no-save",
        "--save-dir",
        tmp_path,
        precision,
    )
    losses = [record["loss"] for record in logged(output, "train_inner")]
    assert losses[-1] < losses[0] - 0.3
    assert logged(output, "train")[-1]["train_moe_decoder_load_balance_loss"] >= 0.99
    experts = 8 * (2 * 32 * 16 + 32 + 16)
    assert f"num. expert model params: {experts} (num. trained: {experts})" in output


@pytest.mark.parametrize("metric", ["bleu", "accuracy"])
def test_a_metric_that_nobody_logs_is_refused_before_the_first_update(
    metric: str, corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    flags = (*TINY_MT, *TRAIN, "--max-epoch", 1, "--save-dir", tmp_path, "--best-checkpoint-metric")
    output = run("fairseq-train", corpus[0], *flags, metric, succeeds=False)
    said = output.strip().splitlines()[-1]
    assert said.startswith(
        "fairseq-train: error: --best-checkpoint-metric must be one that validation logs ("
    )
    assert "moe_encoder_load_cv, " in said and f"got {metric}" in said
    assert said.endswith("; add --eval-bleu") == (metric == "bleu")
    assert not logged(output, "train_inner") and "Traceback" not in output


def test_any_metric_that_is_logged_chooses_the_best(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    flags = (*TINY_MT, *TRAIN, "--max-epoch", 1, "--save-dir", tmp_path, "--best-checkpoint-metric")
    run("fairseq-train", corpus[0], *flags, "moe_decoder_load_cv")
    assert (tmp_path / "checkpoint_best.pt").exists()


@pytest.mark.parametrize("backend", ["legacy_ddp", "pytorch_ddp"])
def test_two_processes_train(backend: str, corpus: tuple[Path, Path], tmp_path: Path) -> None:
    output = run_as_torchrun(
        2, "fairseq-train", corpus[0], *TINY_MT, *TRAIN, "--max-update", 3, "--distributed-backend", "gloo",
        "--ddp-backend", backend, "--save-dir", tmp_path,
    )  # fmt: skip
    record = logged(output, "train")[-1]
    assert record["train_num_updates"] == 3
    assert record["train_bsz"] > 8  # both ranks' sentences
    assert record["train_moe_encoder_experts_per_token"] >= 1
    assert (tmp_path / "checkpoint_last.pt").exists()


HYDRA = (
    "common.user_dir=" + PLUGIN[1], "common.cpu=true", "common.reset_logging=true", "common.log_format=json",
    "dataset.num_workers=0", "optimization.max_update=2", "optimization.lr=[0.001]", "optimizer=adam",
    "checkpoint.no_save=true",
)  # fmt: skip


@pytest.mark.parametrize("arch", ["xmoe_transformer_lm", "xmoe_transformer_lm_tiny"])
def test_hydra_trains_a_language_model(arch: str, corpus: tuple[Path, Path], tmp_path: Path) -> None:
    output = run(
        "fairseq-hydra-train", f"hydra.run.dir={tmp_path}", *HYDRA, "task=language_modeling",
        f"task.data={corpus[1]}", "task.tokens_per_sample=16", "dataset.batch_size=4", f"+model._name={arch}",
        "+model.decoder_embed_dim=32", "+model.decoder_input_dim=32", "+model.decoder_output_dim=32",
        "+model.decoder_layers=2", "+model.moe_num_experts=4", "criterion._name=moe_cross_entropy",
    )  # fmt: skip
    assert logged(output, "train")[-1]["train_moe_decoder_experts_per_token"] >= 1


def test_the_readmes_hydra_command(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    printed = re.search(r"`fairseq-hydra-train\s([^`]+) \.\.\.`", readme)
    assert printed and "+criterion.moe_loss_coeff=" in printed[1]
    command = (
        "fairseq-hydra-train", f"hydra.run.dir={tmp_path}", *HYDRA, *printed[1].split(),
        "task=language_modeling", f"task.data={corpus[1]}", "task.tokens_per_sample=16",
        "dataset.batch_size=4", "+model.decoder_embed_dim=32", "+model.decoder_input_dim=32",
        "+model.decoder_output_dim=32", "+model.decoder_layers=2",
    )  # fmt: skip
    assert logged(run(*command), "train")[-1]["train_moe_decoder_experts_per_token"] >= 1
    output = run(*command, "criterion.moe_loss_coeff=-1", succeeds=False)
    assert "--moe-loss-coeff must be" in output and "got -1" in output  # it reaches the criterion


def test_hydra_trains_a_translation_model_and_checks_flags(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    flags = (
        f"hydra.run.dir={tmp_path}", *HYDRA, "task=translation", f"task.data={corpus[0]}",
        "task.source_lang=en", "task.target_lang=de", "dataset.batch_size=4", "+model._name=xmoe_transformer",
        "+model.encoder_embed_dim=32", "+model.encoder_layers=2", "+model.decoder_layers=2",
        "+model.moe_num_experts=4", "criterion._name=moe_label_smoothed_cross_entropy",
    )  # fmt: skip
    assert logged(run("fairseq-hydra-train", *flags), "train")[-1]["train_moe_encoder_experts_per_token"] >= 1
    output = run("fairseq-hydra-train", *flags, "+model.moe_threshold=1.5", succeeds=False)
    assert "--moe-threshold must be in [0, 1], got 1.5" in output


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--moe-threshold", "1.5"), "--moe-threshold must be in [0, 1], got 1.5"),
        (("--moe-ffn-split", "5"), "--moe-ffn-split must divide --encoder-ffn-embed-dim 32, got 5"),
        (("--moe-loss-coeff", "-1"), "--moe-loss-coeff must be 0 or more, got -1.0"),
        (
            ("--moe-router", "topk", "--moe-topk", "1", "--moe-combine", "normalized"),
            "--moe-combine normalized needs more than one expert per token: a single one weighs 1, which "
            "teaches the router nothing",
        ),
    ],
)
def test_wrong_flags_end_with_one_clear_line(
    flags: tuple, message: str, corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    output = run(
        "fairseq-train",
        corpus[0],
        *TINY_MT,
        *TRAIN,
        *flags,
        "--max-update",
        1,
        "--save-dir",
        tmp_path / "run",
        succeeds=False,
    )
    assert output.strip().splitlines()[-1] == f"fairseq-train: error: {message}"
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


ADAPTIVE = ("--criterion", "adaptive_loss", "--adaptive-softmax-cutoff", "10,20", "--moe-router", "topk")


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ("--criterion", "cross_entropy"),
            "--moe-router relu cannot be trained without its loss: use moe_cross_entropy, got --criterion "
            "cross_entropy",
        ),
        (
            ("--criterion", "moe_cross_entropy", "--moe-loss-coeff", 0.1),
            "--moe-loss-coeff must be left out with --moe-router relu, which steers its own, got 0.1",
        ),
    ],
)
def test_a_router_whose_loss_has_a_weight_of_its_own_is_trained_with_it(
    flags: tuple[object, ...], message: str, corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    once = ("--max-update", 1, "--no-save", "--save-dir", tmp_path, "--moe-router", "relu")
    output = run("fairseq-train", corpus[1], *TINY_LM, *TRAIN, *once, *flags, succeeds=False)
    assert output.strip().splitlines()[-1] == f"fairseq-train: error: {message}"


@pytest.mark.parametrize(
    ("flags", "use"),
    [
        (("--criterion", "cross_entropy", "--moe-router", "topk"), "moe_cross_entropy"),
        (ADAPTIVE, "moe_adaptive_loss"),
        (("--criterion", "cross_entropy", "--moe-router", "hash"), ""),  # a table is balanced by itself
    ],
)
def test_a_criterion_without_the_load_balance_loss_gets_a_warning(
    flags: tuple[str, ...], use: str, corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    once = ("--max-update", 1, "--no-save", "--save-dir", tmp_path)
    output = run("fairseq-train", corpus[1], *TINY_LM, *TRAIN, *flags, *once)
    warning = (
        f"--criterion {flags[1]} leaves out the load-balance loss, so tokens may crowd onto few experts;"
    )
    assert (f"{warning} use {use}\n" in output) == bool(use)
    assert ("leaves out the load-balance loss" in output) == bool(use)
