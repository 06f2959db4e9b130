"""What is told of the experts' loads: in the log, in a file, in TensorBoard's folder, of parameters."""

import json
import logging
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TINY_LM, TINY_MT, TRAIN, logged, run, run_as_torchrun
from fairseq import metrics
from toy import language_model, translation_model

from xmoe_fairseq.activated import describe_model
from xmoe_fairseq.criterions import MoECrossEntropyCriterion
from xmoe_fairseq.load import FILE, LoadReport, numbers, write_records
from xmoe_fairseq.moe import Routing, RoutingStats, moe_layers

SIZE = 2 * 32 * 24 + 24 + 32  # of one expert of the toys


def stats(rows: list[int]) -> RoutingStats:
    """Of tokens that take one expert each."""
    expert_R = torch.arange(len(rows)).repeat_interleave(torch.tensor(rows))
    token_R, ones = torch.arange(len(expert_R)), torch.ones(len(expert_R))
    probs_TE = torch.nn.functional.one_hot(expert_R, len(rows)).float()
    no_loss, size = partial(probs_TE.new_zeros, ()), len(expert_R)
    return RoutingStats.of(
        Routing(token_R, expert_R, token_R * 0, ones, probs_TE, size, no_loss, no_loss)
    )  # fmt: skip


def log(*updates: list[list[int]], wanted: int = 1) -> None:
    """As a criterion does it: of each update the rows of each decoder layer's experts, `wanted` times as many
    before a capacity."""
    for layers in updates:
        each = [vars(stats(rows)) for rows in layers]
        for own in each:
            own["rows_wanted"] = own["rows_wanted"] * wanted
        sums = {f"moe_decoder_{name}": torch.stack([own[name] for own in each]) for name in each[0]}
        flops = {f"moe_decoder_{name}": torch.ones(len(each)) for name in
                 ("flops", "flops_all_experts", "flops_dense_ffn")}  # fmt: skip
        none = {"loss": 0.0, "ntokens": 1, "sample_size": 1}
        MoECrossEntropyCriterion.reduce_metrics([sums | flops | none])


@pytest.fixture
def report(tmp_path: Path) -> LoadReport:
    """Of a model with two MoE layers of 4 experts."""
    model = language_model(decoder_layers=4, moe_num_experts=4)
    checkpoint = Namespace(no_save=False, save_dir=str(tmp_path))
    common = Namespace(log_interval=2, tensorboard_logdir=None)
    return LoadReport(Namespace(checkpoint=checkpoint, common=common), model)


@pytest.fixture(autouse=True)
def _fresh_meters() -> Any:
    metrics.reset()
    yield
    metrics.reset()


def test_logged_by_hand() -> None:
    """Of sums over updates: what each had alone would be 1 dead expert more, and a larger violation."""
    with metrics.aggregate(new_root=True) as meters:
        log([[2, 0, 2, 0], [1, 1, 1, 1]], [[2, 2, 0, 0], [3, 3, 1, 1]])
    values = meters.get_smoothed_values()
    assert values["moe_decoder_dead_experts"] == 1  # layer 1 has 4, 2, 2, 0; layer 2 has 4, 4, 2, 2
    assert values["moe_decoder_max_violation"] == round((4 / 2 - 1 + 4 / 3 - 1) / 2, 4)


def test_experts_without_tokens_are_named_once(report: LoadReport, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING), metrics.aggregate("train_inner"):
        for update in range(1, 6):
            log([[2, 0, update % 2, 0], [1, 1, 1, 1]])
            report.after_update(update)
        log([[2, 0, 0, 0], [1, 1, 1, 0]])  # since the start, as nobody resets here
        report.after_update(6)
        metrics.reset_meters("train_inner")
        log([[2, 1, 1, 1], [1, 1, 1, 0]])
        report.after_update(7)
        report.after_update(8)
        metrics.reset_meters("train_inner")
        report.after_update(10)
    first, second = (record.getMessage() for record in caplog.records)
    assert first == "experts that got no token in the last 2 updates: decoder.layers.1: 2 of 4 (1, 3)"
    assert second == "experts that got no token in the last 2 updates: decoder.layers.3: 1 of 4 (3)"


@pytest.mark.parametrize(  # a factor below 0: in evaluation, too
    ("factor", "wanted", "validated", "is_told"),
    [(2, 4, 1, True), (2, 4, 4, False), (2, 1, 1, False), (0, 4, 1, False), (-2, 4, 1, False)],
)
def test_a_capacity_in_training_alone_is_told_once(
    factor: float, wanted: int, validated: int, is_told: bool, report: LoadReport, caplog: Any
) -> None:
    """And where it is the layers', not a router's own, and evaluation has none."""
    for layer in report.layers:
        layer.capacity_factor, layer.eval_capacity_factor = abs(factor), max(-factor, 0)
    with metrics.aggregate("train"):
        log([[2, 1, 1, 1], [1, 1, 1, 1]], wanted=wanted)
    for _ in "twice":
        with metrics.aggregate(new_root=True) as meters:
            log([[2, 1, 1, 1], [1, 1, 1, 1]], wanted=validated)
        report.after_validation("valid", meters, 3)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == is_told
    assert all(
        "decoder: --moe-capacity-factor drops 75% of what tokens choose while it trains, and 0%" in each
        and "--moe-eval-capacity-factor" in each
        for each in said
    )


def test_records_of_an_earlier_run_give_way(tmp_path: Path) -> None:
    file, loads = tmp_path / FILE, {"layers": {"decoder.layers.1": numbers(stats([3, 0, 1]))}}
    for update in (10, 20, 30):
        write_records(file, update, {"valid": loads})
        write_records(file, update, {"valid1": loads})
    write_records(file, 20, {"valid": loads})  # resumed from 10
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(r["updates"], r["set"]) for r in records] == [
        (10, "valid"), (10, "valid1"), (20, "valid1"), (20, "valid")
    ]  # fmt: skip
    assert records[-1]["layers"]["decoder.layers.1"] == {
        "tokens": 4, "rows": [3, 0, 1], "first_choices": [3, 0, 1], "active_experts": 3, "dead_experts": 1,
        "max_violation": 1.25, "load_cv": 0.9354,
    }  # fmt: skip


def test_a_damaged_file_does_not_end_the_training(report: LoadReport, tmp_path: Path, caplog: Any) -> None:
    (tmp_path / FILE).write_text("{\n")
    with metrics.aggregate(new_root=True) as meters:
        log([[1, 0, 0, 0], [1, 0, 0, 0]])
    report.after_validation("valid", meters, 3)
    assert f"{tmp_path / FILE} is not written: " in caplog.text
    assert (tmp_path / FILE).read_text() == "{\n"


def test_activated_parameters_by_hand() -> None:
    for flags, text in (
        ({"moe_router": "topk", "moe_topk": 2}, "{two} ({shared} shared + 2 x {one})"),
        (
            {"moe_router": "topk", "moe_topk": 2, "moe_zero_experts": 1},
            "at most {two} ({shared} shared + 2 x {one})",
        ),
        ({"moe_router": "hash"}, "{alone} ({shared} shared + 1 x {one})"),
        ({"moe_target_experts_per_token": 1.5}, "about {most} ({shared} shared + 1.5 x {one})"),
        (
            {"moe_target_experts_per_token": 2.5, "moe_shared_experts": 1},
            "about {most} ({shared} shared + 1.5 x {one})",
        ),
        ({}, "about {alone} ({shared} shared + 1 x {one})"),
        (
            {"moe_threshold": 0.5, "moe_max_experts_per_token": 2},
            "at most {two} ({shared} shared + 2 x {one})",
        ),
        (
            {"moe_threshold": 0.5, "moe_max_experts_per_token": 0},
            "at most {all} ({shared} shared + 8 x {one})",
        ),
        ({"moe_router": "of somebody's own"}, "{shared} shared + experts per token x {one}"),
    ):
        built = {name: value for name, value in flags.items() if value != "of somebody's own"}
        model = translation_model(**built)
        one = SIZE * len(moe_layers(model))
        shared = sum(p.numel() for p in model.parameters()) - 8 * one
        sizes = {"alone": shared + one, "two": shared + 2 * one, "most": shared + one * 3 // 2}
        sizes |= {"all": shared + 8 * one, "shared": shared, "one": one}
        expected = text.format(**{name: f"{size:,}" for name, size in sizes.items()})
        line = describe_model(model, Namespace(**{"moe_num_experts": 8, "moe_ffn_split": 2, **flags}))
        assert line == f"activated parameters per token: {expected}, of {shared + 8 * one:,}"


@pytest.fixture(scope="module")
def trained(corpus: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Four updates and two validations, in half an epoch."""
    folder = tmp_path_factory.mktemp("load")
    flags = (*TINY_MT, *TRAIN, "--max-update", 4, "--update-freq", 2, "--validate-interval-updates", 2)
    flags = (*flags, "--moe-router", "topk", "--moe-topk", 1, "--tensorboard-logdir", folder / "tb")
    return folder, run("fairseq-train", corpus[0], *flags, "--save-dir", folder)


def test_a_training_writes_what_it_logs(trained: tuple[Path, str]) -> None:
    folder, output = trained
    records = [json.loads(line) for line in (folder / FILE).read_text().splitlines()]
    assert [(r["updates"], r["set"]) for r in records] == [
        (2, "training"), (2, "valid"), (4, "training"), (4, "valid")
    ]  # fmt: skip
    shown = [*logged(output, "train")[-1:], *logged(output, "valid")[-1:]]
    for record, prefix, values in zip(records[2:], ("train", "valid"), shown, strict=True):
        of_moe = {key for key in values if key.startswith(f"{prefix}_moe_")}
        assert {f"{prefix}_{key}" for key in record if key.startswith("moe_")} == of_moe
        for side in ("encoder", "decoder"):
            layers = [own for name, own in record["layers"].items() if name.startswith(side)]
            assert all(sum(own["rows"]) == own["tokens"] > 0 for own in layers)  # top-1
            assert values[f"{prefix}_moe_{side}_dead_experts"] == sum(own["dead_experts"] for own in layers)
    before, after = (r["layers"]["encoder.layers.1"]["tokens"] for r in records if r["set"] == "training")
    assert 1.5 * before < after < 3 * before


def test_tensorboard_has_the_load_of_each_expert(trained: tuple[Path, str]) -> None:
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    (file,) = (trained[0] / "tb" / "valid").iterdir()
    written, drawn = file.read_bytes(), {}
    while written:  # records: a length, its checksum, an event, its checksum
        length = int.from_bytes(written[:8], "little")
        event, written = Event.FromString(written[12 : 12 + length]), written[16 + length :]
        histograms = {value.tag: value.histo for value in event.summary.value if value.HasField("histo")}
        drawn |= {(event.step, tag): histogram for tag, histogram in histograms.items()}
    last = json.loads((trained[0] / FILE).read_text().splitlines()[-1])
    assert {tag for _, tag in drawn} == {f"moe_load/{name}" for name in last["layers"]}
    assert {step for step, _ in drawn} == {2, 4}
    for name, own in last["layers"].items():
        histogram = drawn[4, f"moe_load/{name}"]
        assert list(histogram.bucket) == own["rows"] and histogram.num == own["tokens"]
        assert list(histogram.bucket_limit) == [number + 0.5 for number in range(8)]


def test_two_ranks_write_what_one_process_does(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    flags = (
        corpus[1],
        *TINY_LM,
        *TRAIN,
        "--max-update",
        2,
        "--dropout",
        0,
        "--required-batch-size-multiple",
        1,
    )
    flags = (*flags, "--no-last-checkpoints", "--save-dir")
    run("fairseq-train", *flags, tmp_path / "one", "--update-freq", 2)
    run_as_torchrun(2, "fairseq-train", *flags, tmp_path / "two", "--distributed-backend", "gloo")
    for one, two in zip(*((tmp_path / name / FILE).read_text().splitlines() for name in ("one", "two")),
                        strict=True):  # fmt: skip
        first, second = json.loads(one), json.loads(two)
        assert second.pop("layers") == first.pop("layers")
        assert second == pytest.approx(first, abs=2e-4)  # rounded to 1e-4
