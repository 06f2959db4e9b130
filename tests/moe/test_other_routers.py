"""Routers of other methods, for comparison: hash, expert choice, and fairscale's GShard layer."""

import copy
from collections import Counter

import pytest
import torch
from tolerances import assert_same

from xmoe_fairseq.moe import (
    BaseRouter,
    ExpertChoiceRouter,
    HashRouter,
    MoELayer,
    RoutingStats,
    SeqTopKRouter,
    ThresholdRouter,
    TopKRouter,
    balanced_table,
    random_table,
)
from xmoe_fairseq.moe.losses import load_balance_loss
from xmoe_fairseq.moe.routers.gshard import GShardLayer, fill_up


def test_balanced_table_evens_out_frequencies() -> None:
    counts = [5, 100, 40, 30, 30, 1]  # 100 + 5 to expert 0, 40 + 30 + 30 + 1 to expert 1
    assert balanced_table(counts, 2).tolist() == [0, 0, 1, 1, 1, 1]
    assert balanced_table([1] * 7, 3).tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_random_table_follows_the_seed_and_uses_all_experts() -> None:
    torch.manual_seed(3)
    first = random_table(1000, 8)
    torch.manual_seed(3)
    assert torch.equal(first, random_table(1000, 8))
    assert set(Counter(first.tolist())) == set(range(8))


def test_hash_goes_by_the_id_alone_and_computes_one_expert_with_weight_one() -> None:
    layer = MoELayer(6, 4, 5, HashRouter(6, 5, balanced_table([1] * 20, 5)))
    ids, mask = torch.randint(20, (3, 7)), torch.zeros(3, 7, dtype=torch.bool)
    mask[1, 4:] = True
    x = torch.randn(3, 7, 6)
    y, routing = layer(x, mask, ids)
    assert torch.equal(routing.expert_R[routing.token_R.argsort()], ids[~mask] % 5)
    assert (routing.weight_R == 1).all()
    assert (y[mask] == 0).all()
    assert_same(y[2], layer(x[2], None, ids[2])[0])  # whatever else is in the batch
    assert layer.router_flops == 0
    stats = RoutingStats.of(routing)
    assert (stats.entropy, stats.rows_kept) == (0, 18)
    share_E = (ids[~mask] % 5).bincount(minlength=5) / 18
    assert_same(stats.load_balance_loss.float(), 5 * (share_E * share_E).sum())  # logged, though not trained


def test_hash_table_is_saved() -> None:
    saved = MoELayer(6, 4, 5, HashRouter(6, 5, random_table(20, 5))).state_dict()
    layer = MoELayer(6, 4, 5, HashRouter(6, 5, torch.zeros(20, dtype=torch.long)))
    layer.load_state_dict(saved)
    assert torch.equal(layer.router.table_V, saved["router.table_V"])
    assert layer.half().router.table_V.dtype == torch.long


def test_experts_choose_equally_many_tokens() -> None:
    router = ExpertChoiceRouter(6, 4, 1.5)
    routing = router(torch.randn(10, 6))
    assert routing.rows_per_expert().tolist() == [4] * 4  # ceil(10 x 1.5 / 4)
    assert routing.experts_per_token == 1.6
    assert routing.load_balance_loss == 0
    assert router(torch.randn(0, 6)).token_R.numel() == 0


def test_tokens_compete_for_experts() -> None:
    """One more token, and another one loses its expert: what makes expert choice unfit for a decoder."""
    router = ExpertChoiceRouter(2, 2, 1.0)
    with torch.no_grad():
        router.weight.copy_(torch.eye(2))
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert router(x).combine_weights().bool().tolist() == [[True, False], [False, True]]
    stronger = torch.tensor([[9.0, 0.0], [0.0, 9.0]])
    assert not router(torch.cat([x, stronger])).combine_weights()[:2].all(dim=1).any()


def test_a_sentence_s_tokens_share_their_choices() -> None:
    """Four pairs of the first sentence's two tokens, two of the second's one; of equals the lower expert."""
    router = SeqTopKRouter(3, 3, 2)
    with torch.no_grad():
        router.weight.copy_(torch.eye(3))
    probs_TE = torch.tensor([[0.4, 0.35, 0.25], [0.98, 0.01, 0.01], [0.3, 0.3, 0.4]])
    routing = router(probs_TE.log(), torch.tensor([7, 7, 2]))
    taken = [[True, True, True], [True, False, False], [True, False, True]]
    assert routing.combine_weights().bool().tolist() == taken
    assert routing.rank_R.tolist() == [0, 0, 1, 1, 2, 0]  # in order of expert
    assert_same(routing.combine_weights(), probs_TE * torch.tensor(taken))
    with pytest.raises(ValueError, match="a seq_topk router needs each token's sentence"):
        router(probs_TE)


def test_padding_takes_no_part_in_the_choice() -> None:
    layer = MoELayer(6, 4, 5, ExpertChoiceRouter(6, 5, 2.0))
    x, mask = torch.randn(3, 7, 6), torch.rand(3, 7) < 0.4
    x[mask] = float("nan")
    y, routing = layer(x, mask)
    assert_same(y[~mask], layer(x[~mask])[0])
    assert (y[mask] == 0).all()
    assert routing.rows_per_expert().unique().numel() == 1


def gshard(num_experts: int = 4) -> GShardLayer:
    return GShardLayer(6, 5, num_experts, torch.nn.functional.gelu, dense_ffn_dim=10, name="encoder.layers.1")


def test_gshard_is_fairscales_own_on_whole_multiples() -> None:
    layer, x = gshard(), torch.randn(12, 6)
    torch.manual_seed(2)
    y, routing = layer(x)
    torch.manual_seed(2)
    assert torch.equal(y, layer.gshard(x.unsqueeze(1)).squeeze(1))
    assert_same(routing.load_balance_loss, layer.gshard.l_aux * 16)


@pytest.mark.parametrize("num_tokens", [1, 7, 32])
def test_gshard_reports_what_fairscale_computed(num_tokens: int) -> None:
    """The pairs and weights of the Routing, put together token by token, give the output; GShard, alg. 1."""
    layer, x = gshard(), torch.randn(num_tokens, 6)
    y, routing = layer(x)
    weights = routing.combine_weights()
    for t in range(num_tokens):
        experts = [e for e in range(4) if weights[t, e] > 0]
        expected = (
            sum(weights[t, e] * layer.gshard.experts[e](x[t]) for e in experts) if experts else 0 * x[t]
        )
        assert_same(y[t], expected)
        p = routing.probs_TE[t, experts]
        assert_same(weights[t, experts], p / p.sum())  # renormalised over the kept ones
    assert routing.rows_wanted == 2 * num_tokens
    assert routing.rows_per_expert().max() <= 2 * -(-num_tokens // 4)
    seen = fill_up(x, 4)
    probs = torch.softmax(layer.gshard.gate.wg(seen), dim=-1)
    assert_same(routing.load_balance_loss, load_balance_loss(probs, probs.argmax(dim=-1)))
    stats = RoutingStats.of(routing)
    assert layer.rows_computed(stats) == 2 * seen.size(0)
    assert stats.rows_kept <= layer.rows_computed(stats)


def test_gshard_drops_what_overflows() -> None:
    layer = gshard()
    _, routing = layer(torch.randn(1, 6).expand(16, 6))  # all want the same first expert, which takes 8
    assert routing.rows_per_expert().max() == 8
    assert routing.token_R.numel() < routing.rows_wanted


def test_gshard_leaves_padding_out_and_nothing_behind() -> None:
    layer, x, mask = gshard(), torch.randn(2, 8, 6), torch.zeros(2, 8, dtype=torch.bool)
    mask[0, 4:] = True
    x[mask] = float("nan")
    torch.manual_seed(4)
    y, routing = layer(x, mask)
    torch.manual_seed(4)
    assert_same(y[~mask], layer(x[~mask])[0])
    assert (y[mask] == 0).all() and routing.num_tokens == 12
    copied = copy.deepcopy(layer)  # as fairseq's EMA needs, also after a forward
    assert not hasattr(layer.gshard, "l_aux") and not layer.gshard.gate._forward_hooks
    assert not any(hasattr(p, "expert") for p in copied.parameters())  # for DDP they are like any other


def test_gshard_without_tokens_has_finite_gradients() -> None:
    layer = gshard()
    y, routing = layer(torch.randn(2, 3, 6), torch.ones(2, 3, dtype=torch.bool))
    (y.sum() + routing.load_balance_loss + routing.z_loss).backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None and not parameter.grad.any()


@pytest.mark.parametrize("half", ["autocast", "weights"])
def test_gshard_in_half_precision(half: str) -> None:
    layer, x = gshard(), torch.randn(8, 6)
    layer, x = (layer.bfloat16(), x.bfloat16()) if half == "weights" else (layer, x)
    with torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"):
        y, routing = layer(x)
    (y.float().sum() + routing.load_balance_loss).backward()
    assert y.dtype == x.dtype
    assert routing.weight_R.dtype == routing.probs_TE.dtype == torch.float32
    assert layer.gshard.gate.wg.weight.grad.isfinite().all()


def hash_ids(one: int, x: float = 1.0) -> None:
    layer = MoELayer(4, 3, 2, HashRouter(4, 2, torch.zeros(9)))
    layer(torch.full((2, 4), x), token_ids=torch.tensor([3, one]))


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: ExpertChoiceRouter(4, 4, 5), ValueError, r"experts_per_token must be in .* = 4\], got 5"),
        (lambda: ExpertChoiceRouter(4, 4, 0), ValueError, "experts_per_token must be in"),
        (lambda: HashRouter(4, 3, torch.tensor([0, 3])), ValueError, "must hold expert ids from 0 to 2"),
        (lambda: gshard(1), ValueError, "num_experts must be at least 2 for GShard, got 1"),
        (
            lambda: MoELayer(4, 3, 2, HashRouter(4, 2, torch.zeros(9)))(torch.randn(5, 4)),
            ValueError,
            "a hash router needs the tokens' ids",
        ),
        (
            lambda: MoELayer(4, 3, 2, HashRouter(4, 2, torch.zeros(9)))(
                torch.randn(2, 3, 4), token_ids=torch.zeros(3, 2, dtype=torch.long)
            ),
            ValueError,
            r"token_ids must be of shape \(2, 3\), got \(3, 2\)",
        ),
        (lambda: hash_ids(-1), ValueError, "token_ids must be from 0 to 8, got -1 to 3"),
        (lambda: hash_ids(9), ValueError, "token_ids must be from 0 to 8, got 3 to 9"),
        (
            lambda: hash_ids(1, float("inf")),
            FloatingPointError,
            "layer: router input holds NaN or inf in 2 of 2 tokens",
        ),
        (
            lambda: gshard()(torch.full((8, 6), float("nan"))),
            FloatingPointError,
            r"encoder.layers.1: router input holds NaN or inf in 8 of 8 tokens",
        ),
    ],
)
def test_bad_arguments_get_one_clear_line(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("make", [ThresholdRouter, TopKRouter, BaseRouter, ExpertChoiceRouter, None])
@pytest.mark.parametrize("padded", [False, True])
def test_a_layer_takes_ids_whatever_its_router(make, padded: bool) -> None:
    """So that a model may hand them to all its layers; None is fairscale's layer."""
    k = (2,) if make in (TopKRouter, ExpertChoiceRouter) else ()
    layer = (MoELayer(6, 5, 4, make(6, 4, *k)) if make else gshard()).eval()
    x, ids = torch.randn(2, 8, 6), torch.arange(16).view(2, 8)
    mask = torch.arange(16).view(2, 8) > 11 if padded else None
    outputs = []
    for token_ids in (ids, None):
        torch.manual_seed(2)  # fairscale's router draws noise
        outputs.append(layer(x, mask, token_ids)[0])
    assert torch.equal(*outputs)
