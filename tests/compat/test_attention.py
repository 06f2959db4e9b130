"""The patches of attention: which of torch's kernels is allowed, seen by torch's own switch."""

from argparse import Namespace
from collections.abc import Iterator

import pytest
import torch
from fairseq import models, sequence_generator

from xmoe_fairseq_compat.attention import has_blocks_of_one_length


@pytest.fixture(autouse=True)
def torchs_choice() -> Iterator[None]:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize(
    ("settings", "is_left"),
    [
        ({"args": Namespace(sample_break_mode="none")}, False),
        ({"args": Namespace(sample_break_mode=None)}, False),
        ({"args": Namespace(sample_break_mode="eos")}, True),
        ({"args": Namespace(sample_break_mode="complete")}, True),
        ({"cfg": Namespace(source_lang="en")}, True),
        ({}, True),
    ],
)
def test_a_model_of_sentences_leaves_cudnns_attention(settings: dict[str, Namespace], is_left: bool) -> None:
    task = Namespace(**settings)
    assert has_blocks_of_one_length(task) is not is_left
    with pytest.raises(AssertionError, match="Requested model type: nothing"):  # by the plain function
        models.build_model(Namespace(arch="nothing", _name="nothing"), task)
    assert torch.backends.cuda.cudnn_sdp_enabled() is not is_left


def test_generation_leaves_cudnns_attention() -> None:
    with pytest.raises(TypeError):  # without arguments
        sequence_generator.SequenceGenerator()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
