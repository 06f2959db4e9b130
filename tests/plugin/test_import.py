"""The plugin registers itself in whatever order it and fairseq are imported; the core needs no fairseq."""

import subprocess
import sys

import pytest
from commands import PLUGIN

LOAD_USER_DIR = (
    f"from argparse import Namespace; fairseq.utils.import_user_module(Namespace(user_dir={PLUGIN[1]!r}))"
)


def python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    "order",
    [
        "import xmoe_fairseq, fairseq",
        f"import fairseq.utils; {LOAD_USER_DIR}",
        f"import xmoe_fairseq, fairseq.utils; {LOAD_USER_DIR}",
        f"import fairseq.utils; {LOAD_USER_DIR}; import xmoe_fairseq",
    ],
)
def test_models_and_criterions_are_registered(order: str) -> None:
    output = python(
        f"{order}\n"
        "from fairseq.models import ARCH_MODEL_REGISTRY\n"
        "from fairseq.criterions import CRITERION_REGISTRY\n"
        "print(sorted(n for n in (*ARCH_MODEL_REGISTRY, *CRITERION_REGISTRY) if 'moe' in n))"
    )
    assert output.strip().splitlines()[-1] == str(
        sorted(
            [
                "moe_cross_entropy",
                "moe_label_smoothed_cross_entropy",
                "xmoe_transformer",
                "xmoe_transformer_lm",
            ]
            + [f"xmoe_transformer_{size}" for size in ("tiny", "iwslt_de_en", "wmt_en_de", "wmt_en_de_big")]
            + [f"xmoe_transformer_lm_{size}" for size in ("tiny", "gpt2_small", "gpt2_medium")]
        )
    )


# As if fairseq were not installed: neither its files nor its metadata are found.
WITHOUT_FAIRSEQ = (
    "import sys, importlib.util as util, importlib.metadata as metadata\n"
    "find, version = util.find_spec, metadata.version\n"
    "util.find_spec = lambda name, *rest: None if name == 'fairseq' else find(name, *rest)\n"
    "metadata.version = lambda name: version('no-such-package' if name == 'fairseq' else name)\n"
)


@pytest.mark.parametrize("module", ["models", "criterions"])
def test_what_needs_fairseq_says_so_in_one_line(module: str) -> None:
    code = f"{WITHOUT_FAIRSEQ}import xmoe_fairseq.{module}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert "fairseq 0.12.2" in last and "pip install --no-deps fairseq==0.12.2" in last, last


def test_the_core_works_without_fairseq() -> None:
    python(
        f"{WITHOUT_FAIRSEQ}"
        "import torch\n"
        "from xmoe_fairseq.moe import MoELayer, ThresholdRouter\n"
        "y, routing = MoELayer(8, 4, 6, ThresholdRouter(8, 6))(torch.randn(2, 3, 8))\n"
        "assert y.shape == (2, 3, 8) and routing.experts_per_token >= 1\n"
        "assert 'fairseq' not in sys.modules"
    )
