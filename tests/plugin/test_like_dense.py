"""fairseq's flags reach an MoE layer as a dense one: with one expert, whose weight is 1, it is dense."""

from typing import Any

import pytest
import torch
from fairseq.modules import FairseqDropout
from tolerances import assert_same
from torch import Tensor, nn
from toy import language_model, sentences, shift_right, translation_model

from xmoe_fairseq_compat.errors import FlagError

ONE_EXPERT = {"moe_freq": 1, "moe_num_experts": 1, "moe_ffn_split": 1, "moe_router": "topk", "moe_topk": 1}
MODELS = {"language": language_model, "translation": translation_model}
FLAGS: dict[str, dict[str, Any]] = {
    "none": {},
    "dropout": {"dropout": 0.3},
    "attention-dropout": {"attention_dropout": 0.3},
    "activation-dropout": {"activation_dropout": 0.3},
    "relu-dropout": {"relu_dropout": 0.3},
    "both-dropouts": {"activation_dropout": 0.3, "relu_dropout": 0.1},
    **{f"activation-{name}": {"activation_fn": name} for name in ("gelu", "gelu_fast", "tanh", "linear")},
    "norms-first": {"encoder_normalize_before": True, "decoder_normalize_before": True},
    "norms-last": {"encoder_normalize_before": False, "decoder_normalize_before": False},
    "layernorm-embedding": {"layernorm_embedding": True},
    "layerdrop": {"encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5},
    "recomputed": {"checkpoint_activations": True, "activation_dropout": 0.3},
    "offloaded": {"checkpoint_activations": True, "offload_activations": True},
    "export": {"export": True},
    "scaled": {"scale_attn": True, "scale_heads": True, "scale_resids": True},
    "learned-positions": {"encoder_learned_pos": True, "decoder_learned_pos": True},
    "no-cross-attention": {"no_cross_attention": True},
    "cross-self-attention": {"cross_self_attention": True, "no_cross_attention": True},
}
CASES = [
    pytest.param(kind, flags, id=f"{name}-{kind}")
    for name, flags in FLAGS.items()
    for kind in MODELS
    if kind == "translation" or "cross" not in name and "encoder" not in str(flags)
]


def pair(kind: str, **flags: Any) -> tuple[nn.Module, nn.Module]:
    """A dense model, and one of one expert a layer that holds the same weights."""
    torch.manual_seed(2)
    dense, sparse = MODELS[kind](moe_freq=0, **flags), MODELS[kind](**ONE_EXPERT, **flags)
    copies, state = ("in_proj_", "out_proj_", "fc1_", "fc2_"), {}
    for name, value in dense.state_dict().items():
        stem, _, last = name.rpartition(".")
        if last.startswith(copies):  # the encoder's, for a fast path of its own
            continue
        for ffn in ("fc1", "fc2"):
            if stem.endswith(f".{ffn}"):
                name, value = f"{stem.removesuffix(ffn)}moe.experts.{ffn}_{last}", value.unsqueeze(0)
        state[name] = value
    missing, unexpected = sparse.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("router.weight") for name in missing)
    return dense, sparse


def inputs(kind: str) -> dict[str, Tensor]:
    torch.manual_seed(3)
    tokens = sentences([7, 7])  # without padding, so that dropout draws as many numbers
    if kind == "language":
        return {"src_tokens": tokens}
    source = sentences([5, 5])
    return {
        "src_tokens": source,
        "src_lengths": torch.tensor([5, 5]),
        "prev_output_tokens": shift_right(tokens),
    }


def run(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(4)
    output: Tensor = model(**batch)[0]
    return output


@pytest.mark.parametrize(("kind", "flags"), CASES)
def test_outputs_and_gradients_are_a_dense_models(kind: str, flags: dict[str, Any]) -> None:
    models, batch = pair(kind, **flags), inputs(kind)
    in_training = [run(model.train(), batch) for model in models]
    assert_same(in_training[1], in_training[0])
    for output in in_training:
        output.square().sum().backward()
    expected = {name: p.grad for name, p in models[0].named_parameters()}
    got = {name: p.grad for name, p in models[1].named_parameters() if expected.get(name) is not None}
    assert_same(got, {name: expected[name] for name in got}, what="gradient of")
    with torch.no_grad():
        in_evaluation = [run(model.eval(), batch) for model in models]
    assert_same(in_evaluation[1], in_evaluation[0])


DROPOUTS = {"dropout": 0.2, "attention_dropout": 0.2, "activation_dropout": 0.3}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("names", ["all", "layers", "one", "others"])
def test_dropout_is_retained_where_a_dense_model_retains_it(kind: str, names: str) -> None:
    models, batch = pair(kind, **DROPOUTS), inputs(kind)
    layers = {"TransformerEncoderLayerBase", "TransformerDecoderLayerBase"}
    known = {m.module_name for m in models[0].modules() if isinstance(m, FairseqDropout)}
    asked = {
        "all": None,
        "layers": sorted(layers & known),
        "one": "TransformerDecoderLayerBase",
        "others": ", ".join(known - layers),
    }[names]
    for model in models:
        model.make_generation_fast_(retain_dropout=True, retain_dropout_modules=asked)
    with torch.no_grad():
        dense, sparse = (run(model, batch) for model in models)
    assert_same(sparse, dense)


def test_experts_of_gshard_retain_their_dropout_too() -> None:
    model, x = language_model(moe_router="gshard", activation_dropout=0.5).eval(), torch.randn(6, 32)
    expert = model.decoder.layers[1].moe.gshard.experts[0]
    assert torch.equal(expert(x), expert(x))
    model.make_generation_fast_(retain_dropout=True)
    assert not torch.equal(expert(x), expert(x))


def test_misspelt_modules_are_refused() -> None:
    known = "MultiheadAttention, TransformerDecoder, TransformerDecoderLayerBase"
    with pytest.raises(FlagError) as error:
        language_model().make_generation_fast_(retain_dropout=True, retain_dropout_modules="Transformer")
    assert str(error.value) == f"--retain-dropout-modules must name some of {known}, got Transformer"
