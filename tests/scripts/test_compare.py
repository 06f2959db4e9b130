"""compare.py, plot_training.py, plots.py: tables and pictures of runs, made up here."""

import json
import math
import sys
from pathlib import Path

import pytest
from commands import refusal
from matplotlib.text import Text

from experiments import compare, plot_training, plots
from experiments.plot_runs import styles_of
from experiments.runs import FFN_SECONDS, Run, changes, load


def made_up_run(
    folder: Path, model: str, seed: int, perplexity: float, data: str = "data", preset: str = "tiny"
) -> Path:
    folder.mkdir(parents=True)
    about = {"task": "lm", "preset": preset, "model": model, "data": data, "seed": seed, "flags": []}
    (folder / "run.json").write_text(json.dumps(about))
    sides = {} if model.startswith("dense") else {"decoder": {"experts": 2.5, "flops": 0.75}}
    result = {"perplexity": perplexity, "perplexity_per_word": 2 * perplexity, "routing": sides}
    (folder / "scores.best.json").write_text(json.dumps({"splits": {"valid": result, "test": result}}))
    log = [
        "| num. shared model params: 1,500,000 (num. trained: 1)",
        "| num. expert model params: 500,000 (x)",
    ]
    log += [f'| train_inner | {{"num_updates": "{n}", "ups": "4", "ppl": "9"}}' for n in (50, 100)]
    log += [f'| valid | {{"valid_num_updates": "{n}", "valid_ppl": "{900 / n}"}}' for n in (50, 100)]
    (folder / "train.log").write_text("\n".join(log) + "\n")
    return folder


def test_compare_takes_seeds_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [
        made_up_run(tmp_path / "a", "xmoe-s2", 1, 20.0),
        made_up_run(tmp_path / "b", "xmoe-s2", 2, 22.0),
        made_up_run(tmp_path / "c", "dense", 1, 30.0),
    ]
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, runs), "--out", str(tmp_path / "out")])
    compare.main()
    table = (tmp_path / "out/compare.md").read_text().splitlines()
    cells = {row.split(" | ")[0][2:]: row.strip("| ").split(" | ") for row in table}
    titles = cells["model"]
    dense, xmoe = (dict(zip(titles, cells[name], strict=True)) for name in ("dense", "xmoe-s2"))
    assert list(cells)[2:] == ["dense", "xmoe-s2"]
    assert (xmoe["runs"], xmoe["test ppl"]) == ("2", "21.00 ± 1.41")
    assert (dense["experts/token"], dense["MoE FLOPs / dense FFN"]) == ("-", "1.00")
    assert (xmoe["experts/token"], xmoe["MoE FLOPs / dense FFN"]) == ("2.50", "0.75")
    assert (xmoe["s/update"], xmoe["training seconds"], xmoe["parameters (M)"]) == ("0.250", "25", "2.0")
    assert FFN_SECONDS not in titles
    (runs[0] / "seconds.json").write_text('{"ratio": 0.5}')
    compare.main()
    (row,) = (line for line in (tmp_path / "out/compare.md").read_text().splitlines() if "dense" in line[:8])
    assert FFN_SECONDS in (tmp_path / "out/compare.md").read_text() and " | - | " in row
    assert (tmp_path / "out/compare.png").read_bytes().startswith(b"\x89PNG")
    said = refusal(compare.main, monkeypatch, *runs, "--out", tmp_path / "out", "--quality", "BLEU")
    assert said.startswith("--quality must be one of valid ppl, valid ppl/word, test ppl")


def test_rows_with_further_flags_look_different() -> None:
    flags = [[], ["--moe-threshold", "0.8"], ["--moe-threshold", "0.7"]]
    rows = {str(given): [Run(Path(), {"model": "xmoe-s4", "flags": given}, {})] for given in flags}
    rows["dense"] = [Run(Path(), {"model": "dense", "flags": []}, {})]
    plain, *with_flags, dense = styles_of(rows).values()
    assert dense["color"] != plain["color"] and "markerfacecolor" not in plain
    assert all(style["color"] == plain["color"] for style in with_flags)
    assert len({style["marker"] for style in (plain, *with_flags)}) == 3
    assert len({style.get("linestyle") for style in (plain, *with_flags)}) == 3


def test_compare_refuses_what_cannot_be_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = (made_up_run(tmp_path / name, "dense", 1, 30.0, data=name) for name in ("here", "there"))
    out = ("--out", tmp_path / "out")
    assert "runs must be of the same data" in refusal(compare.main, monkeypatch, here, there, *out)
    missing = refusal(compare.main, monkeypatch, here, *out, "--scores", "average3")
    assert "scores.average3.json: No such file" in missing and "train and score each run first" in missing
    part = made_up_run(tmp_path / "part", "dense", 1, 30.0)
    scores = json.loads((part / "scores.best.json").read_text())
    del scores["splits"]["test"]
    (part / "scores.best.json").write_text(json.dumps(scores))
    message = refusal(compare.main, monkeypatch, part, *out)
    assert "scores.best.json: holds no test; score the run again without --splits" in message
    assert not (tmp_path / "out").exists()
    scores = json.loads((here / "scores.best.json").read_text())
    del scores["splits"]["valid"]  # as grid.py scores: the columns are those that all runs have
    (here / "scores.best.json").write_text(json.dumps(scores))
    more = made_up_run(tmp_path / "more", "switch", 1, 30.0, data="here")
    monkeypatch.setattr(sys, "argv", ["compare", str(more), str(here), *map(str, out)])
    compare.main()
    head = (tmp_path / "out/compare.md").read_text().splitlines()[0]
    assert "test ppl" in head and "valid ppl" not in head
    assert math.isnan(load(here, "best").values["experts/token"])


def test_runs_shorter_than_the_log_interval_can_be_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fairseq then logs what an epoch took, or not even that."""
    run = made_up_run(tmp_path / "run", "dense", 1, 30.0)
    log = "| num. shared model params: 1,500,000\n"
    (run / "train.log").write_text(log + '| train | {"train_num_updates": "8", "train_ups": "2"}\n')
    values = load(run, "best").values
    assert (values["updates"], values["s/update"]) == (8, 0.5)
    (run / "train.log").write_text(log)
    monkeypatch.setattr(sys, "argv", ["compare", str(run), "--out", str(tmp_path / "out")])
    compare.main()
    assert "| dense | 1 | 30.00 |" in (tmp_path / "out/compare.md").read_text()


def test_wide_dense_models_compute_more(tmp_path: Path) -> None:
    wide = made_up_run(tmp_path / "wide", "dense-wide", 1, 30.0, preset="claims")
    assert load(wide, "best").values["MoE FLOPs / dense FFN"] == 2304 / 512


def with_flags(run: Path, *flags: str) -> Path:
    about = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(about | {"flags": flags}))
    return run


def test_against_one_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of seeds, loads of the last validation, seconds of one seed; a dense model has no loads."""
    loads = {"max_violation": 0.5, "dead_experts": 4, "rows": [0, 0, 0, 0, 1, 1, 1, 1]}
    records = [{"layers": {"decoder.layers.1": loads | {"dead_experts": n}}} for n in (8, 4)]
    runs = []
    for name, flags, qualities in (
        ("topk-s4", ["--moe-topk", "2"], (20.0, 40.0)), ("relu-s4", [], (21.0, 40.0)), ("dense", [], (19.0,)),
    ):  # fmt: skip
        for seed, perplexity in enumerate(qualities):
            run = with_flags(made_up_run(tmp_path / f"{name}-{seed}", name, seed, perplexity), *flags)
            if name != "dense":
                (run / "moe_load.jsonl").write_text("\n".join(map(json.dumps, records)))
            runs.append(run)
    speed = {"update": {"ratio": 0.9, "milliseconds": 80}, "decoding": {"ratio": 1.1, "milliseconds": 64}}
    (tmp_path / "relu-s4-0/speed.json").write_text(json.dumps(speed | {"tokens decoded": 128}))
    arguments = ("--against", "topk-s4 --moe-topk 2", "--out", tmp_path / "out")
    monkeypatch.setattr(compare, "write_page_of", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, [*runs, *arguments])])
    compare.main()
    rows = [line.strip("| ").split(" | ") for line in (tmp_path / "out/compare.md").read_text().splitlines()]
    table = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}
    assert list(table) == ["dense", "topk-s4 --moe-topk 2", "relu-s4"]
    title = "test ppl against topk-s4 --moe-topk 2, %"
    assert [row[title] for row in table.values()] == ["-5.00", "0.00", "2.50 ± 3.54"]
    relu, dense = table["relu-s4"], table["dense"]
    assert (relu["dead experts, %"], relu["max violation"]) == ("50.00", "0.50")
    timings = ("update / the first's", "decoded token / the first's", "ms/update", "ms/decoded token")
    assert [relu[name] for name in timings] == ["0.90", "1.10", "80.00", "0.500"]
    assert {dense[name] for name in ("dead experts, %", "max violation", *timings)} == {"-"}
    assert len(json.loads((tmp_path / "out/compare.json").read_text())) == 5
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--columns", "ms/update", "test ppl", "--plot", "relu-s4"])
    compare.main()
    head = (tmp_path / "out/compare.md").read_text().splitlines()[0]
    assert head == f"| model | runs | {title} | ms/update | test ppl |"
    message = refusal(compare.main, monkeypatch, runs[2], *arguments)
    assert message.startswith("--against must be one of relu-s4, got topk-s4 --moe-topk 2")


def test_points_of_scores_and_per_cent_of_perplexity() -> None:
    def run(seed: int, value: float) -> Run:
        return Run(Path(), {"seed": seed}, {"test BLEU": value, "test ppl": value})

    own, base = [run(1, 11.0), run(2, 22.0), run(3, 9.0)], [run(2, 20.0), run(1, 10.0)]
    assert changes(own, base, "test BLEU") == [1, 2]  # seed 3 has no pair
    assert changes(own, base, "test ppl") == pytest.approx([10, 10])


def log_of(run: Path, qualities: dict[int, float], experts: dict[int, float]) -> None:
    found = [
        f'| valid | {{"valid_num_updates": "{n}", "valid_ppl": "{ppl}"}}' for n, ppl in qualities.items()
    ]
    for side in ("encoder", "decoder") if experts else ():
        found += [
            f'| train_inner | {{"num_updates": "{n}", "moe_{side}_experts_per_token": "{value}", '
            f'"moe_{side}_router_entropy": "{value / 2}", "moe_{side}_flops_vs_dense_ffn": "9"}}'
            for n, value in experts.items()
        ]
    (run / "train.log").write_text("\n".join(found) + "\n")


def test_how_models_come_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed by seed against the one that is named; a run need be neither scored nor at its end."""
    runs = [made_up_run(tmp_path / f"{name}-{seed}", name, seed, 9.0)
            for name in ("dense", "xmoe-s2", "xmoe-s4") for seed in (1, 2)]  # fmt: skip
    for number, run in enumerate(runs):
        (run / "scores.best.json").unlink()
        log_of(run, {50: 10.0 + number, 100: 5.0}, {10: 4.0 + number, 20: 2.0} if number > 1 else {})
    log_of(runs[3], {50: 13.0}, {10: 8.0})  # it has got no further
    words = (*runs, "--against", "dense", "--models", "dense", "xmoe-s2", "--out", tmp_path / "training.png")
    monkeypatch.setattr(sys, "argv", ["plot_training", *map(str, words)])
    plot_training.main()
    found = json.loads((tmp_path / "training.json").read_text())
    learning, experts, entropy = found.values()
    assert learning["dense"] == {"50.0": 0, "100.0": 0} and set(learning) == {"dense", "xmoe-s2"}
    assert learning["xmoe-s2"] == pytest.approx({"50.0": 100 * (12 / 10 + 13 / 11 - 2) / 2, "100.0": 0})
    assert experts == {"xmoe-s2": {"10.0": 7.0, "20.0": 2.0}}
    assert entropy == {"xmoe-s2": {"10.0": 3.5, "20.0": 1.0}}
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    assert "--out must end in .png" in refusal(
        plot_training.main, monkeypatch, *words[:-1], tmp_path / "a.jpg"
    )
    for run in runs:
        (run / "train.log").write_text("")
    assert "train.log: must have records" in refusal(plot_training.main, monkeypatch, *words)


def test_labels_do_not_overlap() -> None:
    figure, (panel, lines) = plots.panels(1, 2, 12, 4)
    points = [(0.5 + 0.01 * i, 1 + 0.002 * i, f"model number {i}", "black") for i in range(8)]
    panel.plot([0, 1], [0.5, 1.5], linestyle="none")
    plots.label_points(panel, points)
    lines.plot([0, 1], [0, 2])
    plots.label_ends(lines, [(1, 1 + 0.01 * i, f"model {i}\nwith flags", "black") for i in (3, 0, 1, 2)])
    figure.draw_without_rendering()
    for axes in (panel, lines):
        boxes = [Text.get_window_extent(text) for text in axes.texts if text.get_text()]  # without its line
        assert len(boxes) in (8, 4)
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    ends = sorted((Text.get_window_extent(text).y0, text.get_text()[6]) for text in lines.texts)
    assert [name for _, name in ends] == ["0", "1", "2", "3"]


def test_places_apart() -> None:
    assert plots.apart([0.0, 10.0, 30.0], [4, 4, 4]) == [0, 10, 30]
    assert plots.apart([5.0, 5.0, 5.0], [4, 4, 8]) == pytest.approx([0, 4, 10])
