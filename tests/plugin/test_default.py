"""A model built without any routing flag: half of the dense FFN's FLOPs, from the first update on."""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TINY_LM, TINY_MT, TRAIN, logged, run
from fairseq import checkpoint_utils

from xmoe_fairseq.config import read_moe_config
from xmoe_fairseq.moe import moe_layers
from xmoe_fairseq.saved_settings import check_saved_settings
from xmoe_fairseq_compat import misfits
from xmoe_fairseq_compat.errors import CheckpointError, FlagError

FIXED = ("moe_threshold", "moe_threshold_rule", "moe_target_experts_per_token")
SIZES = ("--moe-num-experts", 16, "--moe-ffn-split", 4)
FFN_DIM, ROUTER = 128, 16 / (2 * 128)  # 2 D E FLOPs of a router over 4 D F
LM = (*TINY_LM, *TRAIN, *SIZES, "--decoder-ffn-embed-dim", FFN_DIM)
MT = (*TINY_MT, *TRAIN, *SIZES, "--encoder-ffn-embed-dim", FFN_DIM, "--decoder-ffn-embed-dim", FFN_DIM)


def settings(checkpoint: Path) -> dict[str, Any]:
    state = torch.load(checkpoint, weights_only=True)
    return dict(state["cfg"]["model"])


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({}, (None, "probability", 2.0)),
        *(
            ({"moe_ffn_split": s}, (None, "probability", half))
            for s, half in ((1, 1), (2, 1), (3, 1.5), (8, 4))
        ),
        ({"moe_ffn_split": 8, "moe_num_experts": 3}, (None, "probability", 3)),
        ({"moe_ffn_split": 8, "moe_max_experts_per_token": 1}, (None, "probability", 1)),
        ({"moe_ffn_split": 8, "moe_shared_experts": 1}, (None, "probability", 4)),
        ({"moe_ffn_split": 4, "moe_shared_experts": 2}, (None, "probability", 3)),
        ({"moe_ffn_split": 1, "moe_shared_experts": 1}, (None, "probability", 2)),
        ({"moe_threshold_rule": "mass"}, (None, "mass", 2.0)),
        ({"moe_target_experts_per_token": 3}, (None, "probability", 3)),
        ({"moe_target_experts_per_token": 3, "moe_threshold_rule": "relative"}, (None, "relative", 3)),
        ({"moe_target_experts_per_token": 0}, (0.9, "mass", 0)),
        ({"moe_threshold": 0.0}, (0.0, "mass", 0)),
        ({"moe_threshold": 0.08, "moe_threshold_rule": "probability"}, (0.08, "probability", 0)),
        ({"moe_layer_thresholds": "0.5"}, (None, "mass", 0)),
        ({"moe_router": "topk"}, (None, "auto", -1)),
    ],
)
def test_what_the_flags_stand_for(flags: dict[str, Any], expected: tuple[Any, ...]) -> None:
    config = read_moe_config(Namespace(decoder_layers=2, decoder_ffn_embed_dim=24, **flags), ("decoder",))
    assert tuple(getattr(config, name) for name in FIXED) == expected
    again = Namespace(decoder_layers=2, decoder_ffn_embed_dim=24, **vars(config))
    assert read_moe_config(again, ("decoder",)) == config  # as from a checkpoint


@pytest.fixture(scope="module")
def language(corpus: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("default")
    flags = ("--max-update", 12, "--save-interval-updates", 8, "--save-dir", folder)
    return folder, run("fairseq-train", corpus[1], *LM, *flags)


def assert_half(records: list[dict[str, float]], side: str) -> None:
    flops = [record[f"moe_{side}_flops_vs_dense_ffn"] for record in records]
    assert flops[0] <= 0.5 + ROUTER + 1e-3
    assert sum(flops[4:]) / len(flops[4:]) == pytest.approx(0.5 + ROUTER, abs=0.03)


def test_a_language_model_costs_half_of_the_dense_ffn(language: tuple[Path, str]) -> None:
    assert_half(logged(language[1], "train_inner"), "decoder")


def test_a_translation_model_costs_half_of_the_dense_ffn(corpus: tuple[Path, Path]) -> None:
    records = logged(run("fairseq-train", corpus[0], *MT, "--max-update", 12, "--no-save"), "train_inner")
    for side in ("encoder", "decoder"):
        assert_half(records, side)


def test_the_log_and_the_checkpoint_say_what_the_default_is(language: tuple[Path, str]) -> None:
    folder, output = language
    (line,) = [line for line in output.splitlines() if "activated parameters per token" in line]
    assert "per token: about " in line and "shared + 2 x " in line
    assert line.endswith("; by default --moe-threshold-rule probability --moe-target-experts-per-token 2.0")
    saved = settings(folder / "checkpoint_last.pt")
    assert tuple(saved[name] for name in FIXED) == (None, "probability", 2.0)


def test_resuming_goes_on_with_the_default(
    language: tuple[Path, str], corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    (middle,) = language[0].glob("checkpoint_*_8.pt")
    flags = ("--max-update", 12, "--save-dir", tmp_path, "--restore-file", middle)
    output = run("fairseq-train", corpus[1], *LM, *flags)
    assert logged(output, "train_inner")[-1]["loss"] == logged(language[1], "train_inner")[-1]["loss"]


def as_old(checkpoint: Path, old: Path, **changes: Any) -> Path:
    """As it was saved before there were rules, when a t was saved whether it counted or not."""
    state = torch.load(checkpoint, weights_only=True)
    model = state["cfg"]["model"]
    del model["moe_threshold_rule"]
    model |= {"moe_threshold": 0.9, "moe_target_experts_per_token": 0.0, **changes}
    torch.save(state, old)
    return old


@pytest.mark.parametrize(
    "changes, expected, in_use",
    [
        ({}, (0.9, "mass", 0), 0.9),
        ({"moe_target_experts_per_token": 2.0}, (None, "mass", 2), 2 / 16),  # where such a budget begins
        ({"moe_layer_thresholds": "0.25"}, (None, "mass", 0), 0.25),
    ],
)
def test_an_old_checkpoint_means_what_it_meant(
    changes: dict[str, Any],
    expected: tuple[Any, ...],
    in_use: float,
    language: tuple[Path, str],
    tmp_path: Path,
) -> None:
    path = as_old(language[0] / "checkpoint_last.pt", tmp_path / "old.pt", **changes)
    (model,), cfg, _ = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    assert tuple(cfg.model[name] for name in FIXED) == expected
    router: Any = moe_layers(model)[0].router
    assert (router.rule if router.budget is None else router.budget.rule).name == "mass"
    assert float(router.threshold_in_use) == pytest.approx(in_use)


def test_going_on_from_an_old_checkpoint_asks_for_its_threshold(
    language: tuple[Path, str], corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    old = as_old(language[0] / "checkpoint_last.pt", tmp_path / "old.pt")
    flags = (corpus[1], *LM, "--max-update", 2, "--no-save", "--finetune-from-model", old)
    keep = "--moe-threshold 0.9 --moe-threshold-rule mass"
    change = "--moe-target-experts-per-token 2.0 --moe-threshold-rule probability"
    refused = run("fairseq-train", *flags, succeeds=False)
    assert f"; add {keep} to keep them, or {change} to change them\n" in refused
    for given in (keep, change):
        run("fairseq-train", *flags, *given.split())


BUDGET, RULE = "--moe-target-experts-per-token", "--moe-threshold-rule"
NEW = dict(zip(FIXED, (None, "probability", 2.0), strict=True))
OLD = dict(zip(FIXED, (0.9, "mass", 0.0), strict=True))


@pytest.mark.parametrize(
    "saved, words, line",
    [
        (NEW, "", ""),
        (NEW, f"{BUDGET} 2", ""),
        (NEW, "--moe-router topk --moe-topk 2", ""),
        (OLD, "--moe-threshold 0.9", ""),
        (OLD, "--moe-threshold 0.5", ""),
        (OLD | {FIXED[2]: 2.0}, f"{BUDGET} 2 {RULE} mass", ""),
        # By another rule the same number is something else.
        (NEW, "--moe-threshold 0.5", f"{RULE} probability to keep them, or {RULE} mass to change"),
        (OLD, f"{BUDGET} 2", f"{RULE} mass to keep them, or {RULE} probability to change"),
        (NEW | {FIXED[2]: 3.0}, "", f"{BUDGET} 3.0 to keep them, or {BUDGET} 2.0 to change"),
        (
            OLD | {FIXED[0]: None, "moe_layer_thresholds": "0.5"}, "",
            f"--moe-layer-thresholds 0.5 {RULE} mass to keep them, or {BUDGET} 2.0 {RULE} probability to",
        ),
    ],
)  # fmt: skip
def test_which_settings_a_run_that_goes_on_must_give(
    saved: dict[str, Any], words: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["fairseq-train", *words.split()])
    monkeypatch.setattr(misfits, "_words", [])
    names = [word.removeprefix("--").replace("-", "_") for word in words.split()[::2]]
    given = dict(zip(names, map(literal, words.split()[1::2]), strict=True))
    state = {"cfg": {"model": {"moe_router": "threshold", **saved}}, "model": {"layer.moe.router.weight": 0}}
    if not line:
        check_saved_settings("old.pt", state, given)
        return
    with pytest.raises(CheckpointError) as error:
        check_saved_settings("old.pt", state, given)
    assert f"; add {line}" in str(error.value)


def literal(word: str) -> Any:
    return word if word.isalpha() else float(word) if "." in word else int(word)


def test_another_threshold_or_router_for_a_trained_model(
    language: tuple[Path, str], corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    def opened(path: Path, **overrides: Any) -> Any:
        (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(path)], arg_overrides=overrides)
        return moe_layers(model)[0].router

    ours = language[0] / "checkpoint_last.pt"
    assert opened(ours, moe_router="topk", moe_topk=2).k == 2
    with pytest.raises(
        FlagError, match="add 'moe_target_experts_per_token': 0; its rule is probability, got 0.1"
    ):
        opened(ours, moe_threshold=0.1)
    lower = opened(ours, moe_threshold=0.1, moe_target_experts_per_token=0)
    assert (lower.rule.name, lower.threshold_in_use) == ("probability", 0.1)
    flags = ("--moe-router", "topk", "--max-update", 1, "--save-dir", tmp_path)
    run("fairseq-train", corpus[1], *LM, *flags)
    topk = tmp_path / "checkpoint_last.pt"
    with pytest.raises(
        FlagError, match="moe_router must come with its own moe_threshold or moe_layer_thresholds"
    ):
        opened(topk, moe_router="threshold")
    fixed = opened(topk, moe_router="threshold", moe_threshold=0.5)
    assert (fixed.rule.name, fixed.threshold_in_use) == ("mass", 0.5)
