"""Whole models with the routers of other methods: token ids reach hash layers, and all of them train."""

import copy
from pathlib import Path

import pytest
import torch
from commands import TRAIN
from fairseq import checkpoint_utils, metrics
from fairseq.sequence_generator import SequenceGenerator
from parallel_runs import EXACT, LM, MT, UNUSED, assert_same_training, put_together, train
from tolerances import assert_same, printed
from torch import nn
from toy import (
    PAD,
    language_model,
    language_sample,
    sentences,
    task,
    translation_model,
    translation_sample,
)

from xmoe_fairseq.build_moe import build_router
from xmoe_fairseq.config import MoEConfig
from xmoe_fairseq.criterions import MoECrossEntropyCriterion
from xmoe_fairseq.moe import HashRouter, moe_layers, record_routing
from xmoe_fairseq.moe.routers.registry import Place
from xmoe_fairseq_compat.errors import FlagError

HASH = {"moe_router": "hash", "moe_hash_table": "random"}


def tables(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: m.table_V for name, m in model.named_modules() if isinstance(m, HashRouter)}
    assert found
    return found


def test_each_side_routes_by_its_own_input_ids() -> None:
    model = translation_model(**HASH, share_all_embeddings=True)
    batch = translation_sample(sentences([5, 8], left_pad=True), sentences([6, 4]))["net_input"]
    with record_routing(model) as records:
        model(**batch)
    assert len({tuple(table.tolist()) for table in tables(model).values()}) == 3  # drawn for each layer
    for layer, routing in records:
        side = "src_tokens" if layer.name.startswith("encoder") else "prev_output_tokens"
        tokens_LB = batch[side].T
        assert torch.equal(
            routing.expert_R[routing.token_R.argsort()], layer.router.table_V[tokens_LB[tokens_LB != PAD]]
        )


def test_balanced_tables_follow_the_dictionary() -> None:
    table = next(iter(tables(language_model(moe_router="hash", moe_num_experts=4)).values()))
    assert torch.bincount(table).tolist() == [10] * 4  # 40 symbols, seen once each


@pytest.mark.parametrize("kind, prefix", [("translation", 0), ("translation", 3), ("language", 3)])
def test_generated_tokens_have_the_scores_of_a_full_forward(kind: str, prefix: int) -> None:
    """fairseq's own generator, which calls the decoder's forward itself, step by step and beam by beam."""
    target = sentences([8, 8])
    prefix_tokens = target[:, :prefix] if prefix else None
    if kind == "language":
        model, net_input = language_model(**HASH).eval(), {"src_tokens": target[:, :prefix]}
    else:
        model = translation_model(**HASH).eval()
        net_input = translation_sample(sentences([5, 8], left_pad=True), target)["net_input"]
        del net_input["prev_output_tokens"]
    generator = SequenceGenerator([model], task().target_dictionary, beam_size=3, max_len_b=10)
    with torch.no_grad():
        found = generator.generate([model], {"net_input": net_input}, prefix_tokens=prefix_tokens)
        for sentence, beams in enumerate(found):
            for beam in beams:
                tokens = beam["tokens"].unsqueeze(0)
                previous = torch.cat([torch.tensor([[2]]), tokens[:, :-1]], dim=1)
                inputs = {"src_tokens": previous}
                if kind == "translation":
                    inputs = {k: v[sentence : sentence + 1] for k, v in net_input.items()}
                    inputs["prev_output_tokens"] = previous
                full = model.get_normalized_probs(model(**inputs), log_probs=True)
                expected = full.gather(2, tokens.unsqueeze(2)).flatten()
                assert_same(beam["positional_scores"], expected)
                if prefix:
                    assert torch.equal(tokens[0, :prefix], target[sentence, :prefix])


@pytest.mark.parametrize("router", [HASH, {"moe_router": "gshard"}], ids=["hash", "gshard"])
def test_recomputed_layers_get_the_same_ids_and_draw_the_same_noise(router: dict) -> None:
    """In the backward pass, long after the decoder has read other ids than the encoder."""
    sample = translation_sample(sentences([7, 4], left_pad=True), sentences([6, 9]))
    criterion = MoECrossEntropyCriterion(task(), False).weigh(0.5, 0.1)
    results = []
    for recompute in (False, True):
        torch.manual_seed(3)
        model = translation_model(checkpoint_activations=recompute, **router).train()
        torch.manual_seed(4)
        loss, _, _ = criterion(model, sample)
        loss.backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_same(results[1], results[0])


def test_a_deep_copy_reads_its_own_ids() -> None:
    model, tokens = language_model(**HASH).eval(), sentences([6, 6])
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for table in tables(model).values():
            table.zero_()
        with record_routing(copied) as records:
            copied(src_tokens=tokens)
        for layer, routing in records:
            assert torch.equal(
                routing.expert_R[routing.token_R.argsort()], layer.router.table_V[tokens.T.flatten()]
            )
            assert routing.expert_R.any()


def test_expert_choice_depends_on_the_batch_but_not_on_padding() -> None:
    model = translation_model(moe_router="expert_choice", moe_topk=1, no_moe_decoder=True).eval()
    source = sentences([4, 6], left_pad=True)

    def encode(tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model.encoder(tokens, tokens.ne(PAD).sum(dim=1))["encoder_out"][0].transpose(0, 1)

    together = encode(source)
    wide = encode(torch.cat([torch.full((2, 5), PAD), source], dim=1))
    assert_same(wide[:, 5:][source != PAD], together[source != PAD])
    assert not torch.allclose(encode(source[1:]), together[1:], atol=1e-3)


def test_seq_topk_depends_on_its_own_sentence_alone() -> None:
    """Whatever else is in the batch, and however much padding; its tokens take k experts on average."""
    model = translation_model(moe_router="seq_topk", moe_topk=2, no_moe_decoder=True).eval()
    source = sentences([4, 6], left_pad=True)

    def encode(tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), record_routing(model) as records:
            encoded = model.encoder(tokens, tokens.ne(PAD).sum(dim=1))["encoder_out"][0].transpose(0, 1)
        assert [routing.rows_wanted for _, routing in records] == [2 * int(tokens.ne(PAD).sum())] * 2
        return encoded

    together = encode(source)
    wide = encode(torch.cat([torch.full((2, 5), PAD), source], dim=1))
    assert_same(wide[:, 5:][source != PAD], together[source != PAD])
    assert_same(encode(source[1:])[0], together[1])
    assert_same(encode(source[:1, 2:])[0], together[0, 2:])


def test_gshard_losses_and_statistics_are_logged() -> None:
    model = language_model(moe_router="gshard")
    criterion = MoECrossEntropyCriterion(task(), False).weigh(0.3, 0.0)
    batch = language_sample(sentences([9, 7]))
    loss, size, logged = criterion(model, batch)
    with metrics.aggregate(new_root=True) as meters:
        criterion.reduce_metrics([logged])
    balance = meters.get_smoothed_value("moe_decoder_load_balance_loss")
    assert (loss - logged["loss"]).item() == printed(0.3 * size * balance, 3)
    tokens, per_row, router = 16, 4 * 32 * 24, 2 * 32 * 8
    assert logged["moe_decoder_flops"] == tokens * router + 2 * 16 * per_row  # slots, whatever lies in them
    assert logged["moe_decoder_rows_wanted"] == 2 * tokens
    assert logged["moe_decoder_rows_kept_E"].sum() <= 2 * tokens


ET = ("--moe-router", "expert_threshold", "--moe-topk", 1)
ROUTERS = {
    "hash": ("--moe-router", "hash"),
    "hash-random": ("--moe-router", "hash", "--moe-hash-table", "random"),
    "base": ("--moe-router", "base"),
    "expert_choice": ("--moe-router", "expert_choice", "--no-moe-decoder"),
    "expert_threshold": (
        "--moe-router",
        "expert_threshold",
        "--moe-topk",
        1,
        "--moe-expert-choice-updates",
        3,
    ),
    "gshard": ("--moe-router", "gshard"),
    "seq_topk": ("--moe-router", "seq_topk", "--moe-topk", 2, "--no-moe-decoder"),
    "relu": ("--moe-router", "relu"),
    "topany": ("--moe-router", "topany"),
    "topany-pool": (
        "--moe-router",
        "topany",
        "--moe-adapt-experts-every",
        4,
        "--moe-initial-experts",
        3,
    ),
}


@pytest.mark.parametrize("router", ROUTERS)
def test_trains_through_the_criterion(router: str, corpus: tuple[Path, Path]) -> None:
    flags = (corpus[0], *MT, *EXACT, "--lr", "1e-2", *ROUTERS[router], "--store-ema", "--no-save")
    (run,) = train(1, *flags, "--max-update", 15)
    losses = [log["nll_loss"] / log["ntokens"] for log in run["logs"]]
    assert sum(losses[-3:]) / 3 < losses[0] - 0.8
    assert run["valid"]["moe_encoder_tokens 0"] > 0


def test_hash_experts_are_shared_out_among_ranks(corpus: tuple[Path, Path]) -> None:
    flags = (corpus[1], *LM, *EXACT, *ROUTERS["hash-random"], "--no-save", "--max-update", 2)
    runs = train(2, *flags, "--moe-expert-parallel-size", 2)
    assert_same_training(runs, train(1, *flags, "--update-freq", 2)[0], 2)


def test_ranks_train_seq_topk_as_one_process(corpus: tuple[Path, Path]) -> None:
    flags = (corpus[0], *MT, *EXACT, *ROUTERS["seq_topk"], "--no-save", "--max-update", 2)
    runs = train(2, *flags, "--moe-expert-parallel-size", 2)
    assert_same_training(runs, train(1, *flags, "--update-freq", 2)[0], 2)


def test_gshard_ranks_hold_the_same_experts(corpus: tuple[Path, Path]) -> None:
    flags = (corpus[1], *LM, *EXACT, *ROUTERS["gshard"], "--no-save", "--max-update", 3)
    runs = train(2, *flags, "--ddp-backend", "legacy_ddp")
    put_together([run["weights"] for run in runs], set(), 1)


def steered(checkpoint: Path) -> dict[str, torch.Tensor]:
    state = torch.load(checkpoint, weights_only=True)["model"]
    return {name: value for name, value in state.items() if ".thresholds." in name}


@pytest.mark.parametrize("first", [0, 2])
def test_ranks_steer_expert_thresholds_as_one_process(first: int, corpus: tuple[Path, Path]) -> None:
    """By all ranks' tokens, and not by those of a dummy batch; with and without expert choice."""
    flags = (corpus[0], *MT, *EXACT, "--no-save", "--batch-size", 7, "--max-epoch", 1)
    flags = (*flags, *ET, "--moe-expert-choice-updates", first)
    runs = train(4, *flags, "--update-freq", 3, "--moe-expert-parallel-size", 2)
    reference = train(1, *flags, "--update-freq", 12)[0]
    assert_same_training(runs, reference, 2)
    used = [log["moe_decoder_threshold 0"] / log["moe_decoder_tokens 0"] for log in reference["logs"]]
    assert len(set(used)) == len(used) > 1


def test_expert_thresholds_are_saved_and_resumed_bit_for_bit(
    corpus: tuple[Path, Path], tmp_path: Path
) -> None:
    flags = (corpus[1], *LM, *TRAIN, *ET, "--moe-expert-choice-updates", 3, "--save-interval-updates", 2)
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train(1, *flags, "--max-update", 5, "--save-dir", straight)
    (middle,) = straight.glob("checkpoint_*_2.pt")
    train(1, *flags, "--max-update", 5, "--save-dir", resumed, "--restore-file", middle)
    expected = torch.load(straight / "checkpoint_last.pt", weights_only=True)["model"]
    got = torch.load(resumed / "checkpoint_last.pt", weights_only=True)["model"]
    assert all(torch.equal(got[name], value) for name, value in expected.items() if not UNUSED.search(name))
    thresholds = steered(straight / "checkpoint_last.pt")
    assert {value.dtype for value in thresholds.values()} == {torch.float32}
    assert thresholds.keys() == steered(middle).keys()
    assert not all(torch.equal(value, steered(middle)[name]) for name, value in thresholds.items())
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(straight / "checkpoint_last.pt")])
    (layer,) = moe_layers(model)
    assert layer.router.thresholds.updates == 5


def test_an_unknown_name_builds_no_router() -> None:
    """Also where the flags were not checked, as in a program of one's own."""
    with pytest.raises(FlagError, match="--moe-router must be one of threshold, .*, got treshold"):
        build_router(Place(8, 4, MoEConfig(moe_router="treshold")))
