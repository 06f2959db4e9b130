"""The mean of several checkpoints' parameters, as a checkpoint for fairseq-generate and the like.

    python scripts/tools/average_checkpoints.py --inputs a.pt b.pt --output mean.pt

What fairseq's scripts/average_checkpoints.py does, which pip does not install: floats are averaged in fp32
and kept in the parameter's type; whole numbers, such as hash tables, must agree. The optimizer's state is
left out. Checkpoints are read with weights_only.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils

import xmoe_fairseq  # noqa: F401  (what a checkpoint of its models holds)


def load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise SystemExit(f"average: there is no file {path}")
    state: dict[str, Any] = checkpoint_utils.load_checkpoint_to_cpu(str(path))
    return state


def average(paths: list[Path]) -> dict[str, Any]:
    state = load(paths[0])
    sums = {
        name: value.float() if value.is_floating_point() else value for name, value in state["model"].items()
    }
    for path in paths[1:]:
        model = load(path)["model"]
        if model.keys() != sums.keys():
            raise SystemExit(f"average: {path} and {paths[0]} are checkpoints of different models")
        for name, value in model.items():
            if value.shape != sums[name].shape:
                raise SystemExit(f"average: {name} has another shape in {path} than in {paths[0]}")
            if value.is_floating_point():
                sums[name] = sums[name] + value
            elif not torch.equal(value, sums[name]):
                raise SystemExit(f"average: {name} differs between {path} and {paths[0]}, and is no float")
    mean = {
        name: (total / len(paths)).to(state["model"][name].dtype) if total.is_floating_point() else total
        for name, total in sums.items()
    }
    return {key: value for key, value in state.items() if key != "last_optimizer_state"} | {"model": mean}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=Path, nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    partial = args.output.with_suffix(".partial")
    torch.save(average(args.inputs), partial)
    partial.rename(args.output)


if __name__ == "__main__":
    main()
