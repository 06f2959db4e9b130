"""One checkpoint for any number of ranks: whoever wrote it, anyone continues with the same curve."""

from pathlib import Path
from typing import Any

import pytest
from parallel_checkpoints import assert_continues, load
from parallel_runs import (
    UNUSED,
)
from tolerances import assert_same

LAYOUTS = [(1, 1), (2, 2), (4, 2), (4, 4)]  # ranks, ranks that share out the experts


@pytest.mark.parametrize(
    "before, after",
    [((4, 4), (1, 1)), ((4, 2), (2, 2)), ((1, 1), (4, 2))],
)
def test_any_layout_continues_any_other(
    before: tuple[int, int], after: tuple[int, int], written: Any, corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    assert_continues(written(*before)[0] / "checkpoint_last.pt", after, written, corpus, tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_the_file_is_what_one_process_writes(layout: tuple[int, int], written: Any) -> None:
    """Names, shapes, weights, optimizer state, scheduler, place in the data; nothing tells of ranks."""
    got, expected = (load(written(*which)[0] / "checkpoint_last.pt") for which in (layout, (1, 1)))
    assert got.keys() == expected.keys()
    assert list(got["model"]) == list(expected["model"])
    used = [name for name in expected["model"] if not UNUSED.search(name)]
    assert_same(*({name: state["model"][name] for name in used} for state in (got, expected)), what="weight")
    slots, expected_slots = (state["last_optimizer_state"]["state"] for state in (got, expected))
    trained = [index for index, slot in expected_slots.items() if slot["step"]]
    for moment in ("exp_avg", "exp_avg_sq"):
        mine, theirs = ({i: state[i][moment] for i in trained} for state in (slots, expected_slots))
        assert_same(mine, theirs, what=moment)
    assert got["optimizer_history"] == expected["optimizer_history"]
    assert got["cfg"]["model"]["moe_expert_parallel_size"] == 1


def test_averaged_weights_are_gathered_too(written: Any) -> None:
    got, expected = (
        load(written(*layout, "--store-ema", "--ema-decay", "0.9")[0] / "checkpoint_last.pt")
        for layout in ((2, 2), (1, 1))
    )
    used = [name for name in expected["model"] if not UNUSED.search(name)]
    averages = ({name: state["extra_state"]["ema"][name] for name in used} for state in (got, expected))
    assert_same(*averages, what="average")
