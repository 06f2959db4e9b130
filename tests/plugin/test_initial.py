"""--init-std: the paper's initial weights of a language model."""

import pytest
import torch
from toy import PAD, language_model


def test_all_weights_are_drawn_with_this_width() -> None:
    model = language_model(init_std=0.5, vocab_size=400, share_decoder_input_output_embed=True)
    for name, parameter in model.named_parameters():
        if "layer_norm" in name:
            assert set(parameter.tolist()) <= {0.0, 1.0}
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert 0.4 < parameter.std() < 0.6, name
            assert abs(parameter.mean()) < 0.1, name
    assert not model.decoder.embed_tokens.weight[PAD].any()
    experts = model.decoder.layers[1].moe.experts.fc1_weight
    assert not torch.equal(experts[0], experts[1])


@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_a_width_must_be_a_width(value: float) -> None:
    with pytest.raises(ValueError, match=r"--init-std must be 0 \(as fairseq does\) or more, got"):
        language_model(init_std=value)
