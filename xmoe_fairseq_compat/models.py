"""What fairseq's models need."""

from __future__ import annotations

import re
from importlib import metadata
from typing import Any

from xmoe_fairseq_compat.registry import has, mend, stand_in


def development_build() -> bool:

    return has("torch") and not metadata.version("torch").split("+")[0].replace(".", "").isdigit()


@mend(
    "fairseq.modules.transformer_layer",
    "fairseq.models.transformer.transformer_encoder",
    when=development_build,
)
def read_development_versions(module: Any) -> None:
    """Every torch: fairseq reads the parts of its version as numbers, and a build 2.14.0a0 has none last."""
    import torch

    numbers = re.match(r"\d+\.\d+\.\d+", torch.__version__)
    module.torch = stand_in(torch, __version__=numbers[0] if numbers else "2.0.0")


@mend("fairseq.models.ema.ema")
def average_floats_only(module: Any) -> None:
    """--store-ema averages every entry of a state dict, tables of whole numbers too, which torch refuses."""
    plain_init = module.EMA.__init__

    def init(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        plain_init(self, model, *args, **kwargs)
        entries = model.state_dict().items()
        whole_numbers = {name for name, value in entries if not value.dtype.is_floating_point}
        self.skip_keys = {*self.skip_keys, *whole_numbers}

    module.EMA.__init__ = init


@mend("fairseq.modules.transformer_layer", when=lambda: has("torch", 2))
def no_encoder_fast_path(module: Any) -> None:
    """In evaluation the encoder layer calls a private torch operation whose arguments changed in torch 2."""
    plain_init = module.TransformerEncoderLayerBase.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        plain_init(self, *args, **kwargs)
        self.can_use_fastpath = False

    module.TransformerEncoderLayerBase.__init__ = __init__
