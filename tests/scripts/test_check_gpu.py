"""scripts/check_gpu.sh: on a CPU all passes that can run there, and what is wrong is found."""

import json
import re
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run, run_as_torchrun, script

from benchmarks.gpu import FLOOR, OURS
from gpu_check import check, commands, costs, layers, machine, ranks, training
from gpu_check.outcomes import Case, Check, Failed, Found, Skip, outcome_of

SMALL = ("--tokens", "24", "--model-dim", "16", "--experts", "4", "--expert-dim", "8", "--per-token", "2")
SKIPPED = {"cost memory", "cost rate"}


@pytest.fixture
def _with_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """fairseq's commands are forks, which need not import torch again."""

    def execute(words: list[str], log: Path) -> int:
        succeeds = not any("train_and_die" in word for word in words)
        if Path(words[0]).name == "torchrun":
            log.write_text(run_as_torchrun(commands.RANKS, *words[3:], succeeds=succeeds))
        else:
            log.write_text(run(*words))
        return int(not succeeds)

    monkeypatch.setattr(commands, "execute", execute)


def checked(capsys: pytest.CaptureFixture[str], folder: Path, *flags: str) -> tuple[int, dict[str, str]]:
    """Exit status, and the line of each check by its name."""
    with pytest.raises(SystemExit) as ended:
        check.main(["--device", "cpu", "--out", str(folder), *flags])
    lines = capsys.readouterr().out.splitlines()
    found = [re.fullmatch(r"((?:PASS|FAIL|SKIP) (.*?): .*) \(\d+\.\d s\)", line) for line in lines[:-1]]
    return int(str(ended.value)), {line[2]: line[1] for line in found if line}


@pytest.mark.usefixtures("_with_forks")
def test_on_a_cpu_all_passes_that_can_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, lines = checked(capsys, tmp_path, "--updates", "6")
    assert not [line for line in lines.values() if line.startswith("FAIL")]
    assert status == 0
    assert {name for name, line in lines.items() if line.startswith("SKIP")} == SKIPPED
    report = json.loads((tmp_path / "report.json").read_text())
    assert [one["name"] for one in report["checks"]] == [*lines]
    assert report["versions"]["torch"] == torch.__version__
    assert len(report["checks"]) > 40 and not any(one["traceback"] for one in report["checks"])


def test_what_is_wrong_is_found(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One number in bf16; and the other checks go on."""
    plain = layers.tensors_of

    def tensors_of(layer: Any, x_TD: torch.Tensor, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        found = plain(layer, x_TD, *args, **kwargs)
        if x_TD.dtype == torch.bfloat16:
            found["gradient of experts.fc1_bias"] *= 0.98
        return found

    monkeypatch.setattr(layers, "tensors_of", tensors_of)
    status, lines = checked(capsys, tmp_path, "--only", "layer padding", "layer no tokens", "layer dropout")
    limit = f"{layers.LIMITS[torch.bfloat16]:.0e}"
    said = f"bf16: gradient of experts.fc1_bias is off by 2.0e-02 of its norm, limit {limit}"
    assert status == 1
    assert [*lines] == ["layer no tokens", "layer padding", "layer dropout"]
    assert lines["layer padding"] == f"FAIL layer padding: {said}"
    assert lines["layer no tokens"].startswith("PASS")
    numbers = json.loads((tmp_path / "report.json").read_text())["checks"][1]["numbers"]
    assert numbers["bf16"]["gradient of experts.fc1_bias"] == pytest.approx(0.02, rel=0.1)


def test_another_choice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = layers.decided

    def decided(*args: Any) -> Any:
        layer, x_TD = plain(*args)
        router = layer.router
        choose = router.forward
        layer.router.forward = lambda x, ids=None: choose(x if x.dtype == torch.float64 else -x, ids)
        return layer, x_TD

    monkeypatch.setattr(layers, "decided", decided)
    with pytest.raises(Failed, match=r"^\d+ of 300 tokens chose other experts than in fp64$"):
        layers.errors(layers.SHAPES["balanced"], torch.device("cpu"), torch.float32, None)


def done(text: str) -> "Future[str]":
    future: Future[str] = Future()
    future.set_result(text)
    return future


def log(gnorm: list[float], loss: list[float], dtype: str = "float32") -> str:
    """As fairseq-train prints it."""
    records = [{"gnorm": str(g), "loss": str(each)} for g, each in zip(gnorm, loss, strict=True)]
    inner = "".join(f"2026 | INFO | train_inner | {json.dumps(one)}\n" for one in records)
    return f"experts are computed by kernel native (cpu, torch.{dtype})\n{inner}"


@pytest.mark.parametrize(
    "output, problem",
    [
        (log([1, 2, 3, 4], [9, 8, 7, 6], "bfloat16"), ""),
        (
            log([1, 2, 3, 4], [9, 8, 7, 6]),
            "experts must compute in bfloat16, log says [('native', 'float32')]",
        ),
        (log([1, 2, 3], [9, 8, 7], "bfloat16"), "3 of 4 updates were logged: did the loss scale overflow?"),
        (
            log([1, 2.1, 3.3, 4.4], [9, 8, 7, 6], "bfloat16"),
            "norm differs from fp32's by 7.50%, loss by 0.00%, limit 1%",
        ),
        (
            log([1, 2, 3, 4], [9, 9, 9, 9], "bfloat16"),
            "norm differs from fp32's by 0.00%, loss by 20.54%, limit 1%",
        ),
    ],
)
def test_a_training_that_is_not_as_in_fp32(output: str, problem: str) -> None:
    case = Case(device=torch.device("cpu"), updates=4)
    runs = {"fp32": done(log([1, 2, 3, 4], [9, 8, 7, 6])), "bf16": done(output)}
    try:
        training.against_fp32(case, runs, "bf16")
        assert not problem
    except Failed as failure:
        assert str(failure) == problem


def test_the_rate_is_compared_with_the_least() -> None:
    device = torch.device("cpu")
    found = costs.share_of_dense(device, 0.0, *SMALL)
    assert set(found.numbers) == {FLOOR, OURS}
    with pytest.raises(Failed, match="of the dense products' rate, at least 10000%$"):
        costs.share_of_dense(device, 100.0, *SMALL)


CUDA = Case(device=torch.device("cuda"), only=None, updates=4, work=Path())


def test_the_peak_is_compared_with_the_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "passes", lambda device: {FLOOR: (10, 0), OURS: (33, 1)})
    monkeypatch.setattr(costs, "peak", lambda used, more: used + more)
    with pytest.raises(Failed, match=r"^peak is 3\.40 of the dense products', at most 3\.3$"):
        costs.memory(CUDA)
    monkeypatch.setattr(costs, "peak", lambda used, more: used)
    assert costs.memory(CUDA).note == "peak is 3.30 of the dense products'"


def test_a_gpu_must_take_the_grouped_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    call = machine.call_of(torch.device("cpu"), "fp16")
    monkeypatch.setattr(machine, "call_of", lambda device, **what: call)
    with pytest.raises(
        Failed, match="^must be grouped on a GPU, is plain; native needs .*, got torch.float16$"
    ):
        machine.way(CUDA.device, precision="fp16")
    with pytest.raises(Failed, match=r"^experts must compute in float32 by grouped, log says \[\('native', "):
        training.check_kernels(CUDA, "fp32", log([], []))


def test_one_gpu_is_not_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    outcomes = [outcome_of(each) for each in ranks.checks(CUDA)]
    assert len(outcomes) == 5
    assert {(one.result, one.note) for one in outcomes} == {("SKIP", "needs 2 GPUs, found 1")}


def test_whatever_is_raised_is_one_line() -> None:
    def breaks() -> Found:
        raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")

    def waits() -> Found:
        raise Skip("needs 2 GPUs, found 1")

    failed, skipped = outcome_of(Check("a", breaks)), outcome_of(Check("b", waits))
    assert (failed.result, failed.note) == ("FAIL", "RuntimeError: CUDA error: an illegal memory access")
    assert "in breaks" in failed.traceback
    assert (skipped.result, skipped.note, skipped.traceback) == ("SKIP", "needs 2 GPUs, found 1", "")


def test_without_a_gpu_one_line_says_so() -> None:
    output = script("check_gpu.sh", succeeds=False)
    assert output == "check_gpu: there is no GPU that torch can use; what can run on a CPU: --device cpu\n"


def test_a_name_that_no_check_begins_with(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check.main(["--device", "cpu", "--only", "layers"])
    assert (
        capsys.readouterr()
        .err.strip()
        .splitlines()[-1]
        .endswith(
            "--only must begin with one of machine, kernel, layer, cost, train, generate, ranks, got layers"
        )
    )
