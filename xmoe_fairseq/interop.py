"""Other implementations' checkpoints."""

import re
from collections import defaultdict

import torch
from torch import Tensor

_ROUTER = re.compile(r"(?P<layer>.+)\.gate\.wg\.weight")
_EXPERT = re.compile(
    r"(?P<layer>.+)\.experts\.yyh_local_experts\.(?P<expert>\d+)\.(?P<part>fc[12])\.(?P<kind>weight|bias)"
)


def convert_authors_state_dict(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename and stack the parameters of the XMoE authors' implementation; other names stay.

    `<layer>.gate.wg.weight` becomes `<layer>.moe.router.weight`, and the experts'
    `<layer>.experts.yyh_local_experts.<e>.fc1.weight` become rows e of `<layer>.moe.experts.fc1_weight`.

    Raises:
        ValueError: a layer's experts are not numbered 0, 1, 2, ... without a gap.
    """
    converted: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for name, value in state_dict.items():
        if match := _ROUTER.fullmatch(name):
            converted[f"{match['layer']}.moe.router.weight"] = value
        elif match := _EXPERT.fullmatch(name):
            stack = f"{match['layer']}.moe.experts.{match['part']}_{match['kind']}"
            experts[stack][int(match["expert"])] = value
        else:
            converted[name] = value
    for name, by_id in experts.items():
        if sorted(by_id) != list(range(len(by_id))):
            raise ValueError(f"{name}: experts must be numbered 0 to {len(by_id) - 1}, got {sorted(by_id)}")
        converted[name] = torch.stack([by_id[expert] for expert in range(len(by_id))])
    return converted
