"""The line that says what the experts cost, after each command that evaluates."""

import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import PLUGIN, logged, run, run_as_torchrun
from toy import language_model, sentences, translation_model, translation_sample

from xmoe_fairseq.cost import SECONDS, CostMeter, measured_time, meter_of
from xmoe_fairseq.criterions.routing_log import routing_sums
from xmoe_fairseq.moe import finite, moe_layers, record_routing

READ = (*PLUGIN, "--cpu", "--num-workers", 0, "--required-batch-size-multiple", 1, "--batch-size", 4)
GENERATE = (*READ, "--source-lang", "en", "--target-lang", "de", "--beam", 3, "--max-len-b", 20)


def costs(output: str) -> list[str]:
    return re.findall(r"^.*MoE: .*$", output, re.M)


def test_what_a_gpus_host_learns_late_ends_before_anything_is_printed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(finite, "can_read", lambda tensor: False)
    model = language_model(moe_threshold=0.5).eval()
    batch = {"src_tokens": torch.randint(4, 20, (2, 9))}
    with torch.no_grad(), CostMeter(model):
        model(**batch)
    moe_layers(model)[0].router.weight.data[0] = torch.nan
    said = pytest.raises(FloatingPointError, match=r"^decoder.layers.1: .* NaN or inf$")
    with torch.no_grad(), said, CostMeter(model):
        model(**batch)
    with torch.no_grad(), said, CostMeter(model):
        model(**batch)
        raise AssertionError("10 < 10")  # of fairseq's search
    with pytest.raises(LookupError), CostMeter(model):  # the first error is the one to show
        model(**batch)
        raise LookupError


@pytest.mark.parametrize(
    "flags",
    [
        {"moe_threshold": 0.5},
        {"moe_router": "topk", "moe_topk": 2, "moe_shared_experts": 1, "moe_zero_experts": 2},
        {"moe_router": "topk", "moe_topk": 2, "moe_eval_capacity_factor": 0.5, "moe_min_capacity": 1},
        *({"moe_router": name} for name in ("base", "expert_threshold", "gshard", "hash", "relu", "topany")),
        *({"moe_router": name, "no_moe_decoder": True} for name in ("expert_choice", "seq_topk")),
    ],
    ids=lambda flags: "-".join(map(str, flags.values())),
)
def test_counts_are_those_of_the_log(flags: dict[str, Any]) -> None:
    """Of tokens that are no padding, in two calls, before and after which nothing counts."""
    if flags.get("moe_router") == "gshard":
        pytest.importorskip("fairscale")
    model = translation_model(**flags).eval()
    inputs = [translation_sample(sentences(n), sentences(n[::-1]))["net_input"] for n in ([5, 2], [3, 7, 1])]
    meter = CostMeter(model)
    with torch.no_grad():
        model(**inputs[0])
        with record_routing(model) as records, meter:
            for each in inputs:
                model(**each)
        model(**inputs[1])
    sums = routing_sums(moe_layers(model), records, torch.device("cpu"))
    names = ("tokens", "flops", "flops_dense_ffn", "flops_all_experts")
    for side, counted in meter.sums.items():
        expected = {name: int(sums[f"moe_{side}_{name}"].sum()) for name in names}
        shared, cheap = (int(sums[f"moe_{side}_rows_{kind}"].sum()) for kind in ("shared", "cheap"))
        expected["rows"] = int(sums[f"moe_{side}_rows_kept_E"].sum()) + shared
        assert counted == Counter(expected, cheap=cheap) and counted["tokens"] == 18 * len(
            [layer for layer in moe_layers(model) if layer.side == side]
        )


def counted(model: Any, **sides: dict[str, int]) -> CostMeter:
    meter = CostMeter(model)
    meter.sums = {side: Counter(sums) for side, sums in sides.items()}
    return meter


def test_lines_by_hand() -> None:
    model = translation_model()
    half = {"tokens": 10, "rows": 19, "flops": 49, "flops_dense_ffn": 100}
    twice = {"tokens": 100, "rows": 400, "flops": 2100, "flops_dense_ffn": 1000}
    alone = "MoE: 1.90 of 8 experts per token, 0.49 of the dense FFN's FLOPs"
    assert counted(model, encoder=half, decoder=half).line() == alone
    assert counted(model, encoder=half, decoder={}).line() == alone
    assert counted(model, encoder=half, decoder=twice).line() == (
        "MoE: 1.90 (encoder) and 4.00 (decoder) of 8 experts per token, 0.49 (encoder) and 2.10 (decoder) of"
        " the dense FFN's FLOPs (together 1.95)"
    )
    assert counted(model, encoder={}, decoder={}).line() == "MoE: no token was routed"
    more = language_model(moe_router="topk", moe_topk=2, moe_shared_experts=1, moe_zero_experts=2)
    assert counted(more, decoder={**half, "cheap": 4}).line() == (
        "MoE: 1.90 of 9 experts and 0.40 cheap ones per token, 0.49 of the dense FFN's FLOPs"
    )
    assert meter_of(language_model(moe_freq=0), "x.pt", {}) is None


def test_translations_are_as_they_were_and_the_line_comes_last(
    corpus: tuple[Path, Path], translation_checkpoint: Path, tmp_path: Path
) -> None:
    flags = (corpus[0], *GENERATE, "--path", translation_checkpoint)
    output = run("fairseq-generate", *flags)
    (line,) = costs(output)
    assert output.endswith(f"{line}\n") and line.startswith("MoE: ") and "of 8 experts per token" in line
    fewer = ("--model-overrides", "{'moe_threshold': 0.0}")
    said = run("fairseq-generate", *flags, *fewer, "--results-path", tmp_path)
    # Top-1, E 8 and s 2: half, and a router of D x E beside the 2 x D x F of the dense FFN
    assert costs(said) == ["MoE: 1.00 of 8 experts per token, 0.62 of the dense FFN's FLOPs"]
    written = (tmp_path / "generate-test.txt").read_text()
    assert "MoE: " not in written and "Generate test with beam=3: BLEU4" in written.splitlines()[-1]


def test_ranks_are_added_up(corpus: tuple[Path, Path], translation_checkpoint: Path) -> None:
    """3 batches: the fourth rank has none, and computes one that counts for nothing."""
    flags = (*READ, "--path", translation_checkpoint, "--valid-subset", "valid,test", "--task", "translation")
    one = costs(run("fairseq-validate", corpus[0], *flags))
    assert len(one) == 1
    several = run_as_torchrun(4, "fairseq-validate", corpus[0], *flags, "--distributed-backend", "gloo")
    assert costs(several) == one


def test_what_is_validated_is_what_is_logged(corpus: tuple[Path, Path], language_checkpoint: Path) -> None:
    flags = (*READ, "--path", language_checkpoint, "--task", "language_modeling", "--log-format", "json")
    output = run("fairseq-validate", corpus[1], *flags, "--valid-subset", "test")
    (record,) = logged(output, "test")
    (line,) = costs(output)
    said = re.fullmatch("MoE: (.*) of 8 experts per token, (.*) of the dense FFN's FLOPs", line)
    assert said
    for number, name in zip(said.groups(), ("experts_per_token", "flops_vs_dense_ffn"), strict=True):
        assert float(number) == pytest.approx(record[f"test_moe_decoder_{name}"], abs=0.0051)
    flags = (*READ, "--path", language_checkpoint, "--tokens-per-sample", 32)
    assert len(costs(run("fairseq-eval-lm", corpus[1], *flags))) == 1


def test_each_model_of_an_ensemble_has_a_line(
    corpus: tuple[Path, Path], translation_checkpoint: Path, tmp_path: Path
) -> None:
    second = shutil.copy(translation_checkpoint, tmp_path / "second.pt")
    both = f"{translation_checkpoint}:{second}"
    typed = ("--buffer-size", 4)
    output = run("fairseq-interactive", corpus[0], *GENERATE, *typed, "--path", both, stdin="w1 w2 w3\nw4\n")
    first, other = costs(output)
    assert first.startswith(f"{translation_checkpoint}: MoE: ") and other.startswith(f"{second}: MoE: ")
    assert first.split(": ", 1)[1] == other.split(": ", 1)[1]
    nothing = run("fairseq-interactive", corpus[0], *GENERATE, *typed, "--path", second)
    assert costs(nothing) == ["MoE: no token was routed"]


def test_the_time_that_was_measured(tmp_path: Path) -> None:
    checkpoint, seconds, report = (tmp_path / name for name in ("best.pt", SECONDS, "best.json"))
    checkpoint.touch()
    assert measured_time(checkpoint) == ""
    record = {"ratio": 0.927, "to_dense_ffn": True, "checkpoint": "best.pt"}
    seconds.write_text(json.dumps(record))
    assert measured_time(checkpoint) == ", 0.93 of its time (seconds.json)"
    model = language_model()
    assert meter_of(model, str(checkpoint), {"beam": 5}).time == measured_time(checkpoint)  # type: ignore[union-attr]
    for asked in ({"moe_threshold": 0.5}, {"model": {"moe_threshold": 0.5}}):
        assert meter_of(model, str(checkpoint), asked).time == ""  # type: ignore[union-attr]
    for other in ({"to_dense_ffn": False}, {"checkpoint": "last.pt"}):
        seconds.write_text(json.dumps(record | other))
        assert measured_time(checkpoint) == ""
    seconds.write_text('{"ratio": 0.5}')  # of an earlier version
    assert measured_time(checkpoint) == ""
    rows = {"chosen": {"ffn_seconds": 1.0}, "budget 0.5": {"ffn_seconds": 9.0}}
    for name, expected in (("dense", ", 0.50 of its time (best.json)"), ("as it is", "")):
        report.write_text(json.dumps({"reference": {"name": name, "ffn_seconds": 2.0}, "rows": rows}))
        assert measured_time(checkpoint) == expected
    seconds.write_text(json.dumps(record))
    later = seconds.stat().st_mtime_ns + 10**9  # trained on since
    os.utime(checkpoint, ns=(later, later))
    assert measured_time(checkpoint) == ""
