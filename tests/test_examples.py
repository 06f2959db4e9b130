"""What examples/ shows is so."""

import runpy
from pathlib import Path

import pytest

from xmoe_fairseq.moe.routers import registry

LOOP = Path(__file__).parents[1] / "examples/training_loop.py"


def test_the_layer_in_a_loop_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ROUTERS", dict(registry._ROUTERS))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(tmp_path)
    done = runpy.run_path(str(LOOP))
    losses, experts = zip(*done["history"], strict=True)
    assert losses[-1] < 0.25 * losses[0]
    assert all(1.2 < taken < 3 for taken in experts), "the budget holds from the first update on"
    assert sum(experts[-50:]) / 50 == pytest.approx(done["budget"], abs=0.1)
    assert done["hard"] > 1.3 * done["easy"]
    assert done["in_bf16"] == pytest.approx(done["in_fp32"], rel=0.1)
    own_losses, own_experts = zip(*done["own_history"], strict=True)
    assert own_losses[-1] < 0.5 * own_losses[0] and own_experts[-1] > 1
    assert (tmp_path / "training_loop.png").read_bytes().startswith(b"\x89PNG")
