"""benchmark_checkpoints.sh times a dense model's FFNs where the sparse models have experts."""

import json
from pathlib import Path

import pytest
import torch
from commands import script
from tolerances import assert_same
from toy import language_model, translation_model

from benchmarks.trained_layers import every_of, feed_forward, places


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("settings", [{}, {"no_moe_decoder": True}, {"no_moe_encoder": True}, None], ids=str)
def test_the_same_places_in_dense_and_sparse_models(settings: dict[str, bool] | None, every: int) -> None:
    """Of the sides that have experts, which a dense model's configuration tells."""
    found = []
    for freq in (0, every):
        if settings is None:
            model = language_model(decoder_layers=4, moe_freq=freq)
        else:
            model = translation_model(encoder_layers=4, decoder_layers=2, moe_freq=freq, **settings)
        names = {module: name for name, module in model.named_modules()}
        found.append([names[layer] for layer in places(model, settings or {}, every)])
    assert found[0] == found[1]
    assert len(found[0]) == sum(
        {"encoder": 4, "decoder": 4 if settings is None else 2}[side] // every
        for side in ("encoder", "decoder")
        if hasattr(model, side) and f"no_moe_{side}" not in (settings or {})
    )


def test_the_preset_says_which_layers_have_experts(tmp_path: Path) -> None:
    about = {"task": "wmt", "preset": "claims", "model": "dense", "data": "", "seed": 1, "flags": []}
    for preset, every in (("claims", 1), ("paper", 2)):
        (tmp_path / "run.json").write_text(json.dumps(about | {"preset": preset}))
        assert every_of(tmp_path) == every


def test_a_dense_ffn_is_that_of_fairseq() -> None:
    model = language_model(moe_freq=0)
    layer = model.decoder.layers[0]
    x = torch.randn(3, 2, 32)
    _, ffn = feed_forward(layer)
    assert_same(ffn(x), layer.fc2(torch.relu(layer.fc1(x))))


@pytest.mark.parametrize("name", ["benchmark_checkpoints.sh", "sweep_threshold.sh"])
def test_the_scripts_find_the_tools(name: str, tmp_path: Path) -> None:
    """Which pytest has on its path anyway."""
    assert "none/run.json: No such file" in script(name, tmp_path / "none", succeeds=False)
