import pytest
import torch

from xmoe_fairseq.interop import convert_authors_state_dict


def expert(number: int, part: str = "fc1.weight") -> str:
    return f"decoder.layers.1.experts.yyh_local_experts.{number}.{part}"


def test_experts_are_stacked_by_number_and_the_rest_is_kept() -> None:
    given = {expert(e): torch.full((2, 3), float(e)) for e in (10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9)}
    given |= {
        "decoder.layers.1.gate.wg.weight": torch.ones(11, 3),
        "decoder.layers.0.fc1.weight": torch.zeros(1),
    }
    converted = convert_authors_state_dict(given)
    assert set(converted) == {
        "decoder.layers.1.moe.experts.fc1_weight",
        "decoder.layers.1.moe.router.weight",
        "decoder.layers.0.fc1.weight",
    }
    assert converted["decoder.layers.1.moe.experts.fc1_weight"][:, 0, 0].tolist() == list(range(11))


def test_a_missing_expert_is_named() -> None:
    with pytest.raises(ValueError, match=r"fc2_bias: experts must be numbered 0 to 1, got \[0, 2\]"):
        convert_authors_state_dict({expert(e, "fc2.bias"): torch.zeros(1) for e in (0, 2)})
