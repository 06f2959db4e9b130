"""Stock fairseq checkpoints, as `fairseq-train` would write them, of models with random weights."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import OmegaConf

SIZES = ("--decoder-layers", "2", "--decoder-embed-dim", "16", "--decoder-ffn-embed-dim", "64",
         "--decoder-attention-heads", "2")  # fmt: skip
LM = ("--task", "language_modeling", "--arch", "transformer_lm", "--tokens-per-sample", "16", *SIZES,
      "--decoder-output-dim", "16", "--decoder-input-dim", "16", "--criterion", "cross_entropy")  # fmt: skip
MT = ("--task", "translation", "-s", "en", "-t", "de", "--arch", "transformer_iwslt_de_en", *SIZES,
      "--encoder-layers", "2", "--encoder-embed-dim", "16", "--encoder-ffn-embed-dim", "64",
      "--encoder-attention-heads", "2", "--encoder-normalize-before",
      "--criterion", "label_smoothed_cross_entropy")  # fmt: skip


@pytest.fixture(scope="session")
def stock(
    tmp_path_factory: pytest.TempPathFactory, corpus: tuple[Path, Path]
) -> Callable[..., tuple[Path, Path]]:
    """stock("lm" or "mt", flags ...) -> (checkpoint, binarised data)."""

    @cache
    def make(kind: str, *flags: str) -> tuple[Path, Path]:
        torch.manual_seed(1)  # whichever test asks first
        data = corpus[kind == "lm"]
        words = [str(data), *(LM if kind == "lm" else MT), "--cpu", "--dropout", "0", *flags]
        arguments = options.parse_args_and_arch(options.get_training_parser(), words)
        cfg = convert_namespace_to_omegaconf(arguments)
        model = tasks.setup_task(cfg.task).build_model(cfg.model)
        for name, parameter in model.named_parameters():
            if "fc" in name or "bias" in name:  # fairseq's biases are 0
                torch.nn.init.normal_(parameter, std=0.3)
        container = OmegaConf.to_container(cfg, enum_to_str=True)
        container["model"] = cfg.model
        if OmegaConf.is_config(cfg.model):
            container["model"] = OmegaConf.to_container(cfg.model, enum_to_str=True)
        state = {
            "args": None, "cfg": container, "model": model.state_dict(), "criterion": None,
            "optimizer_history": [{"num_updates": 1, "optimizer_name": "FairseqAdam",
                                   "criterion_name": "CrossEntropyCriterion", "lr_scheduler_state": {}}],
            "task_state": {}, "extra_state": {}, "last_optimizer_state": None,
        }  # fmt: skip
        path = tmp_path_factory.mktemp("stock") / "dense.pt"
        torch.save(state, path)
        return path, data

    return make
