"""MoELayer equals the token-by-token oracle: values and gradients, on random and on awkward shapes."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import reference_layer
from tolerances import TERMS, assert_same

from xmoe_fairseq.moe import (
    CheapExperts,
    ExpertChoiceRouter,
    ExpertThresholdRouter,
    HashRouter,
    MoELayer,
    ReLURouter,
    Router,
    SeqTopKRouter,
    ThresholdRouter,
    TopAnyRouter,
    TopKRouter,
)
from xmoe_fairseq.moe.balance import BALANCES
from xmoe_fairseq.moe.layer import COMBINE
from xmoe_fairseq.moe.rules import RULES


def layer_of(
    router: Router,
    expert_dim: int,
    capacity_factor: float = 0.0,
    logit_scale: float = 1.0,
    min_capacity: int = 4,
    combine: str = "probs",
    output_scale: float = 1.0,
    shared_experts: int = 0,
    cheap: CheapExperts | None = None,
) -> MoELayer:
    num_experts, model_dim = router.weight.shape
    num_experts -= len(cheap) if cheap else 0
    with torch.no_grad():
        router.weight.mul_(logit_scale)
    layer = MoELayer(
        model_dim,
        expert_dim,
        num_experts,
        router,
        capacity_factor,
        capacity_factor,
        min_capacity,
        activation="gelu",
        combine=combine,
        output_scale=output_scale,
        shared_experts=shared_experts,
        cheap=cheap,
    )
    for parameter in layer.parameters():  # an output bias starts at 0
        parameter.data.add_(0.0 if parameter.any() else torch.randn_like(parameter))
    return layer


def check_against_oracle(
    layer: MoELayer, x: torch.Tensor, ids: torch.Tensor | None = None, terms: int = TERMS
) -> None:
    expected = reference_layer(layer, x, ids)
    y, routing = layer(x, token_ids=ids)
    assert_same(y, expected.y_TD.to(y.dtype), terms=terms)
    assert_same(routing.combine_weights(), expected.weights_TE)
    assert_same(routing.load_balance_loss, expected.load_balance_loss.to(routing.load_balance_loss))
    assert routing.rows_wanted == expected.wanted
    inputs = [x, *layer.parameters()]
    direction = torch.randn_like(y)
    ours = torch.autograd.grad((y * direction).sum() + routing.load_balance_loss, inputs)
    theirs = torch.autograd.grad(
        (expected.y_TD * direction).sum() + expected.load_balance_loss, inputs, allow_unused=True
    )
    for mine, oracle in zip(ours, theirs, strict=True):
        oracle = torch.zeros_like(mine) if oracle is None else oracle
        # probabilities, and what is left of 1 for the others, are of numbers of size 1
        assert_same(mine, oracle.to(mine.dtype), terms=terms, scale=1.0)


routers = st.one_of(
    st.builds(
        lambda t, limit, rule: lambda d, e: ThresholdRouter(d, e, t, limit, rule=rule),
        st.sampled_from([0.0, 0.1, 0.3, 0.7, 0.9, 0.99, 1.0]),
        st.integers(0, 6),
        st.sampled_from([*RULES]),
    ),
    st.builds(lambda k: lambda d, e: TopKRouter(d, e, min(k, e)), st.integers(1, 5)),
)


@given(
    make_router=routers,
    num_tokens=st.integers(0, 24),
    num_experts=st.integers(1, 9),
    model_dim=st.integers(1, 8),
    expert_dim=st.integers(1, 8),
    capacity_factor=st.sampled_from([0.0, 0.5, 1.0, 1.3, 4.0]),
    min_capacity=st.integers(1, 6),
    logit_scale=st.sampled_from([0.1, 1.0, 10.0]),
    combine=st.sampled_from(COMBINE),
    output_scale=st.sampled_from([1.0, 5.0]),
    balance=st.sampled_from(BALANCES),
    shared=st.integers(0, 2),
    training=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=100)
def test_random_layers(
    make_router, num_tokens, num_experts, model_dim, expert_dim, capacity_factor, min_capacity, logit_scale,
    combine, output_scale, balance, shared, training, seed,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    layer = layer_of(
        make_router(model_dim, num_experts), expert_dim, capacity_factor, logit_scale, min_capacity, combine,
        output_scale, shared,
    )  # fmt: skip
    layer.router.balance_by(balance)
    for state_E in layer.router.buffers():  # a bias, or shares
        state_E.copy_(torch.rand_like(state_E))
    x = torch.randn(num_tokens, model_dim, requires_grad=True)
    assume(reference_layer(layer.train(training), x).margin > 1e-5)  # rounding may flip a closer decision
    check_against_oracle(layer, x)


@pytest.mark.parametrize("capacity_factor", [0.0, 0.7])
def test_hash(capacity_factor: float) -> None:
    layer = MoELayer(8, 5, 4, HashRouter(8, 4, torch.randint(4, (30,))), capacity_factor, min_capacity=1)
    x, ids = torch.randn(20, 8, requires_grad=True), torch.randint(30, (20,))
    check_against_oracle(layer, x, ids=ids)


@given(
    make_router=routers,
    num_tokens=st.integers(0, 24),
    num_experts=st.integers(1, 9),
    cheap=st.tuples(*[st.integers(0, 2)] * 3).filter(any),
    capacity_factor=st.sampled_from([0.0, 0.5]),
    tau=st.sampled_from([0.5, 1.0]),
    balance=st.sampled_from(BALANCES),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60)
def test_cheap_experts(
    make_router, num_tokens, num_experts, cheap, capacity_factor, tau, balance, seed
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    router, experts = make_router(6, num_experts + sum(cheap)), CheapExperts(6, *cheap, tau)
    layer = layer_of(router, 4, capacity_factor, 3.0, 1, output_scale=2.0, cheap=experts)
    layer.router.balance_by(balance)
    for state_E in layer.router.buffers():
        state_E.copy_(torch.rand_like(state_E))
    x = torch.randn(num_tokens, 6, requires_grad=True)
    assume(reference_layer(layer, x).margin > 1e-5)
    check_against_oracle(layer, x)


@given(
    num_tokens=st.integers(0, 24),
    num_experts=st.integers(1, 9),
    per_token=st.sampled_from([0.5, 1, 2.3, 4]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=30)
def test_expert_choice(num_tokens: int, num_experts: int, per_token: float, seed: int) -> None:
    torch.manual_seed(seed)
    layer = layer_of(ExpertChoiceRouter(6, num_experts, min(per_token, num_experts)), 4, logit_scale=3.0)
    x = torch.randn(num_tokens, 6, requires_grad=True)
    assume(reference_layer(layer, x).margin > 1e-5)
    check_against_oracle(layer, x)


@given(
    num_tokens=st.integers(0, 24),
    num_experts=st.integers(1, 9),
    per_token=st.sampled_from([0.5, 1, 2.3]),
    expert_choice=st.booleans(),
    training=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40)
def test_expert_threshold(
    num_tokens: int, num_experts: int, per_token: float, expert_choice: bool, training: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    router = ExpertThresholdRouter(6, num_experts, min(per_token, num_experts), 2 * expert_choice)
    layer = layer_of(router, 4, logit_scale=3.0).train(training)
    router.thresholds.updates.fill_(1)
    router.thresholds.threshold_E.normal_()
    x = torch.randn(num_tokens, 6, requires_grad=True)
    assume(reference_layer(layer, x).margin > 1e-5)
    check_against_oracle(layer, x)


@given(
    num_tokens=st.integers(0, 16),
    num_experts=st.integers(1, 6),
    k=st.integers(1, 4),
    capacity_factor=st.sampled_from([0.0, 0.7]),
    balance=st.sampled_from(["first", "all", "bias"]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40)
def test_seq_topk(
    num_tokens: int, num_experts: int, k: int, capacity_factor: float, balance: str, seed: int
) -> None:
    torch.manual_seed(seed)
    router = SeqTopKRouter(6, num_experts, min(k, num_experts))
    layer = layer_of(router, 4, capacity_factor, logit_scale=3.0, min_capacity=1)
    router.balance_by(balance)
    for bias_E in router.buffers():
        bias_E.normal_()
    x, ids = torch.randn(num_tokens, 6, requires_grad=True), torch.randint(-1, 3, (num_tokens,))
    assume(reference_layer(layer, x, ids).margin > 1e-5)
    check_against_oracle(layer, x, ids=ids)


@given(
    num_tokens=st.integers(0, 24),
    num_experts=st.integers(1, 9),
    per_token=st.sampled_from([0.5, 1.0]),
    capacity_factor=st.sampled_from([0.0, 0.5, 1.3]),
    training=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60)
def test_relu(num_tokens, num_experts, per_token, capacity_factor, training, seed) -> None:
    torch.manual_seed(seed)
    layer = layer_of(ReLURouter(6, num_experts, per_token), 4, capacity_factor, min_capacity=1)
    layer.router.sparsity.l1_coeff.fill_(0.7)
    x = torch.randn(num_tokens, 6, requires_grad=True)
    assume(reference_layer(layer.train(training), x).margin > 1e-5)
    check_against_oracle(layer, x)


@given(
    num_tokens=st.integers(0, 24),
    num_experts=st.integers(2, 9),
    limit=st.integers(0, 4),
    capacity_factor=st.sampled_from([0.0, 0.5, 1.3]),
    temperature=st.sampled_from([0.2, 1.0]),
    in_use=st.floats(0.1, 1.0),
    training=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60)
def test_topany(num_tokens, num_experts, limit, capacity_factor, temperature, in_use, training, seed) -> None:
    torch.manual_seed(seed)
    router = TopAnyRouter(6, num_experts, limit)
    router.pool.active_E.copy_(torch.rand(num_experts) < in_use)
    router.pool.active_E[seed % num_experts] = True
    torch.nn.init.normal_(
        router.weight
    )  # as it begins, its loss is 0 but for rounding, a root without gradient
    layer = layer_of(router, 4, capacity_factor, min_capacity=1)
    router.threshold_E.data.uniform_(-0.5, 0.8)
    router.temperature = temperature
    x = torch.randn(num_tokens, 6, requires_grad=True)
    assume(reference_layer(layer.train(training), x).margin > 1e-5)
    check_against_oracle(layer, x)


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("dtype, terms", [(torch.float64, TERMS), (torch.bfloat16, 1)])
def test_other_precisions(dtype: torch.dtype, terms: int, combine: str) -> None:
    how = {"combine": combine, "output_scale": 2.0, "shared_experts": 1}
    layer = layer_of(ThresholdRouter(8, 6, 0.7), 5, logit_scale=3.0, **how).to(dtype)
    check_against_oracle(layer, torch.randn(20, 8, dtype=dtype, requires_grad=True), terms=terms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind, setting", [(ThresholdRouter, 0.7), (ThresholdRouter, 1.0), (TopKRouter, 2)])
def test_ones_without_gradients(kind: type[Router], setting: float, dtype: torch.dtype) -> None:
    """The products with weights of 1 are left out; sums are in fp32 all the same."""
    layer = layer_of(kind(8, 6, setting), 5, combine="ones").to(dtype).eval()
    x = torch.randn(20, 8, dtype=dtype)
    with torch.no_grad():
        y, routing = layer(x)
        expected = reference_layer(layer, x)
    assert_same(y, expected.y_TD.to(dtype), terms=TERMS if dtype == torch.float32 else 1)
    assert_same(routing.combine_weights(), expected.weights_TE)
    assert routing.all_ones == (dtype == torch.float32)


def test_all_experts_with_ones_are_the_dense_ffn() -> None:
    layer = layer_of(ThresholdRouter(8, 6, 1.0), 5, combine="ones").eval()
    torch.nn.init.zeros_(layer.experts.fc2_bias)
    x, (w1, b1, w2, _) = torch.randn(20, 8), layer.experts.stacked()
    hidden = torch.nn.functional.gelu(x @ w1.flatten(0, 1).T + b1.flatten())
    dense = hidden @ w2.transpose(0, 1).flatten(1).T + layer.output_bias
    assert_same(layer(x)[0], dense)


@pytest.mark.parametrize("scale", [1e4, 1e18])
def test_extreme_logits(scale: float) -> None:
    layer = layer_of(ThresholdRouter(8, 6, 0.9), 5)
    x = torch.randn(12, 8) * scale
    expected = reference_layer(layer, x)
    y, routing = layer(x)
    assert_same(y, expected.y_TD)
    assert routing.experts_per_token == 1.0  # one expert has all the mass


def test_non_contiguous_input() -> None:
    layer = layer_of(ThresholdRouter(8, 6, 0.7), 5)
    x = torch.randn(8, 3, 7).transpose(0, 2)  # (7, 3, 8)
    y, _ = layer(x)
    assert_same(y, reference_layer(layer, x.reshape(-1, 8)).y_TD.view(7, 3, 8))


@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    left=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40)
def test_padding_takes_no_part(lengths: list[int], left: bool, seed: int) -> None:
    torch.manual_seed(seed)
    combine = COMBINE[seed % 3]
    layer = layer_of(ThresholdRouter(6, 5, 0.6), 4, capacity_factor=1.0, min_capacity=1, combine=combine)
    position = torch.arange(6).expand(len(lengths), 6)
    length = torch.tensor(lengths).unsqueeze(1)
    mask = position < 6 - length if left else position >= length
    x = torch.randn(len(lengths), 6, 6)
    x[mask] = float("nan")  # whatever padding holds
    y, routing = layer(x, mask)
    alone, routing_alone = layer(x[~mask])
    assert_same(y[~mask], alone)
    assert (y[mask] == 0).all()
    assert_same(routing.load_balance_loss, routing_alone.load_balance_loss)
    assert routing.num_tokens == sum(lengths)


def test_gradients_to_double_precision() -> None:
    layer = layer_of(ThresholdRouter(4, 5, 0.6), 3, logit_scale=2.0).double()
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    parameters = list(layer.parameters())

    def run(x: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y, routing = layer(x)
        return y, routing.load_balance_loss, routing.z_loss

    assert torch.autograd.gradcheck(run, (x, *parameters), eps=1e-7, atol=1e-5)
    # and those of the gradients, as a penalty on them needs
    assert torch.autograd.gradgradcheck(run, (x, *parameters), eps=1e-7, atol=1e-4)
    plain, with_graph = (torch.autograd.grad(layer(x)[0].sum(), x, create_graph=g)[0] for g in (False, True))
    assert_same(with_graph, plain)
