"""How many experts each layer's tokens take: runs a checkpoint over one split and counts.

    python scripts/run.py experiments.count_experts DATA --path checkpoint_last.pt --out experts.json

Writes {layer: [tokens that took 0 experts, 1 expert, ...]}.
"""

import argparse
from pathlib import Path

import torch
from fairseq import checkpoint_utils
from torch import Tensor

from experiments.results import check_output, write_json
from xmoe_fairseq.moe import Routing, record_routing

MAX_TOKENS = 4000


def experts_taken(routing: Routing) -> Tensor:
    """(E + 1,) number of tokens by number of experts."""
    per_token = torch.bincount(routing.token_R, minlength=routing.num_tokens)
    return torch.bincount(per_token, minlength=routing.num_experts + 1)


@torch.no_grad()
def count(path: str, data: str, subset: str) -> dict[str, list[int]]:
    models, _, task = checkpoint_utils.load_model_ensemble_and_task([path], arg_overrides={"data": data})
    model = models[0].eval()
    task.load_dataset(subset)
    dataset, positions = task.dataset(subset), model.max_positions()
    batches = task.get_batch_iterator(dataset, max_tokens=MAX_TOKENS, max_positions=positions)
    totals: dict[str, Tensor] = {}
    for sample in batches.next_epoch_itr(shuffle=False):
        with record_routing(model) as records:
            model(**sample["net_input"])
        for layer, routing in records:
            totals[layer.name] = totals.get(layer.name, 0) + experts_taken(routing)
    return {name: total.tolist() for name, total in totals.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="binarised folder")
    parser.add_argument("--path", required=True, help="checkpoint")
    parser.add_argument("--subset", default="test")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    check_output(args.out, Path(args.path))
    write_json(args.out, count(args.path, args.data, args.subset))


if __name__ == "__main__":
    main()
