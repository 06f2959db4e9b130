"""Which experts each token took, and what all tokens of a set made of each expert."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from fairseq.utils import apply_to_sample
from torch import Tensor, nn

from xmoe_fairseq.explain.pieces import in_words, pieces_of
from xmoe_fairseq.moe import RoutedLayer, Routing, RoutingStats, check_finite, moe_layers, record_routing
from xmoe_fairseq.moe.routers.cheap_flags import KINDS
from xmoe_fairseq.moe.routing import count


class Choice(NamedTuple):
    """One expert of one token."""

    expert: int  # from E on a cheap one
    probability: float  # of all experts, cheap ones too
    weight: float  # which its output is multiplied by


@dataclass(frozen=True)
class Sentence:
    """Or a block of a language model's text."""

    pieces: dict[str, list[str]]  # by side, what it reads
    choices: list[list[list[Choice]]]  # of each MoE layer: of each piece of its side: its experts

    @property
    def title(self) -> str:
        """What the first side reads: of a translation the source."""
        return in_words(next(iter(self.pieces.values())))


@dataclass(frozen=True)
class Layer:
    """One MoE layer, and what all tokens of a set made of it."""

    name: str
    side: str
    experts: list[str]  # their names: E, then Z cheap ones
    routed: int  # E
    unused: list[str]  # of E: those that the router has not in use
    shared: int  # experts that every token has beside those that it chooses
    rows: list[int]  # that each of E + Z computed
    tokens: int
    computed: int  # rows of all experts, shared ones too
    flops: float  # router included
    flops_dense_ffn: float
    router: dict[str, float]  # what it logs, such as its threshold

    def computing(self, choices: Sequence[Choice]) -> int:
        """How many experts compute a token that has these: cheap ones do not, shared ones do."""
        return sum(choice.expert < self.routed for choice in choices) + self.shared

    @property
    def loads(self) -> list[float]:
        """Of each expert, over an even load of those in use."""
        used = len(self.experts) - len(self.unused)
        return [used * rows / max(sum(self.rows), 1) for rows in self.rows]

    @property
    def dead(self) -> list[str]:
        """Experts in use that no token took; of no tokens none."""
        idle = [name for name, rows in zip(self.experts, self.rows, strict=True) if self.tokens and not rows]
        return [name for name in idle if name not in self.unused]


def cost(layers: Sequence[Layer]) -> tuple[float, float]:
    """Experts per token of some layers, shared ones too, and their FLOPs over the dense FFNs'."""
    tokens, dense = sum(layer.tokens for layer in layers), sum(layer.flops_dense_ffn for layer in layers)
    flops = sum(layer.flops for layer in layers)
    return sum(layer.computed for layer in layers) / max(tokens, 1), flops / max(dense, 1.0)


class Records:
    """What the MoE layers of a model make of batches."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.layers = model, moe_layers(model)
        self.device = next(model.parameters()).device
        self.sums: list[dict[str, Tensor]] = [{} for _ in self.layers]

    @torch.no_grad()
    def run(self, sample: Any) -> list[tuple[Routing, Routing]]:
        """Of each layer what it computed, and what its router chose: cheap experts are in the latter only."""
        sample = apply_to_sample(lambda tensor: tensor.to(self.device), sample)
        with record_routing(self.model) as records, choices_with_cheap(self.layers) as chosen:
            self.model(**sample["net_input"])
        check_finite(self.model)
        ran = {id(layer): routing for layer, routing in records}
        return [(ran[id(layer)], chosen.get(id(layer), ran[id(layer)])) for layer in self.layers]

    def count(self, sample: Any) -> None:
        """Add the batch to what `totals` says."""
        for layer, sums, (routing, chosen) in zip(self.layers, self.sums, self.run(sample), strict=True):
            stats, num_all = RoutingStats.of(routing), routing.num_experts + routing.num_cheap
            cheap_Z = count(chosen.expert_R, num_all)[routing.num_experts :]
            for name, value in {**vars(stats), **layer.flops(stats), "cheap_Z": cheap_Z}.items():
                sums[name] = sums[name] + value if name in sums else value

    def totals(self) -> list[Layer]:
        """Of what was counted, one batch at least."""
        return [describe(layer, sums) for layer, sums in zip(self.layers, self.sums, strict=True)]

    def sentences(self, sample: Any, dictionaries: Mapping[str, Any], most: int) -> list[Sentence]:
        """Of a batch, in the order of its ids.

        Args:
            dictionaries: fairseq's, of each side.
            most: pieces of a side that are kept.
        """
        ids = {side: ids_BL.cpu() for side, ids_BL in read_by(sample).items()}
        found: list[list[list[list[Choice]]]] = [[] for _ in sample["id"]]
        for layer, both in zip(self.layers, self.run(sample), strict=True):
            ids_BL, pad = ids[layer.side], dictionaries[layer.side].pad()
            _, sentence_T = ids_BL.ne(pad).t().nonzero(as_tuple=True)  # an MoE layer gets (length, batch, D)
            own: list[list[list[Choice]]] = [[] for _ in found]
            for sentence, choices in zip(sentence_T.tolist(), choices_of(*both), strict=True):
                own[sentence].append(choices)
            for each, of_layer in zip(found, own, strict=True):
                each.append(of_layer[:most])
        pieces = [
            {side: pieces_of(ids_BL[row], dictionaries[side])[:most] for side, ids_BL in ids.items()}
            for row in range(len(found))
        ]
        return [Sentence(pieces[row], found[row]) for row in sample["id"].argsort().tolist()]


@contextmanager
def choices_with_cheap(layers: Sequence[RoutedLayer]) -> Iterator[dict[int, Routing]]:
    """By the id of a layer with cheap experts what its router gives, before those are taken out of it."""
    chosen: dict[int, Routing] = {}

    def keep_for(layer: RoutedLayer) -> Any:
        def keep(router: nn.Module, _: Any, routing: Routing) -> None:
            chosen[id(layer)] = routing

        return keep

    cheap: list[Any] = [layer for layer in layers if layer.num_cheap]
    handles = [layer.router.register_forward_hook(keep_for(layer)) for layer in cheap]
    try:
        yield chosen
    finally:
        for handle in handles:
            handle.remove()


def choices_of(routing: Routing, chosen: Routing) -> list[list[Choice]]:
    """Of each of T tokens, the most probable expert first.

    Args:
        routing: what was computed, within a capacity.
        chosen: by the router; of it the rows of cheap experts, which `routing` has no more.
    """
    (cheap_R,) = (chosen.expert_R >= routing.num_experts).nonzero(as_tuple=True)
    token_R = torch.cat([routing.token_R, chosen.token_R[cheap_R]])
    expert_R = torch.cat([routing.expert_R, chosen.expert_R[cheap_R]])
    weight_R = torch.cat([routing.weight_R, chosen.weight_R[cheap_R]])
    rows = zip(
        token_R.tolist(), expert_R.tolist(), routing.probs_TE[token_R, expert_R].tolist(), weight_R.tolist(),
        strict=True,
    )  # fmt: skip
    found: list[list[Choice]] = [[] for _ in range(routing.num_tokens)]
    for token, *choice in rows:
        found[token].append(Choice(*choice))
    return [sorted(choices, key=lambda c: (-c.probability, c.expert)) for choices in found]


def describe(layer: Any, sums: dict[str, Tensor]) -> Layer:
    stats = RoutingStats(**{f.name: sums[f.name] for f in fields(RoutingStats)})
    kinds = layer.cheap.numbers if layer.num_cheap else ()
    cheap = [f"{kind} {i}" for kind, many in zip(KINDS, kinds, strict=False) for i in range(many)]
    tokens = int(stats.tokens)
    return Layer(
        name=title_of(layer.name),
        side=layer.side,
        experts=[*map(str, range(layer.num_experts)), *cheap],
        routed=layer.num_experts,
        unused=[str(expert) for expert in (~stats.active_E).nonzero().flatten().tolist()],
        shared=round(float(stats.rows_shared) / max(tokens, 1)),
        rows=[*stats.rows_kept_E.long().tolist(), *sums["cheap_Z"].tolist()],
        tokens=tokens,
        computed=int(stats.rows_computed),
        flops=float(sums["flops"]),
        flops_dense_ffn=float(sums["flops_dense_ffn"]),
        router={name: float(value) for name, value in layer.to_log().items()},
    )


def title_of(name: str) -> str:
    """Of a layer, such as "encoder layer 2" for encoder.layers.1."""
    side, _, number = name.split(".")
    return f"{side} layer {int(number) + 1}"


def read_by(sample: Any) -> dict[str, Tensor]:
    """(sentences, length) ids that each side reads: of a language model the decoder alone."""
    net_input = sample["net_input"]
    if "prev_output_tokens" in net_input:
        return {"encoder": net_input["src_tokens"], "decoder": net_input["prev_output_tokens"]}
    return {"decoder": net_input["src_tokens"]}
