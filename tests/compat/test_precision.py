"""The patches of mixed precision."""

import pytest
import torch
from fairseq.dataclass.configs import FairseqConfig
from fairseq.optim.amp_optimizer import AMPOptimizer
from omegaconf import OmegaConf, open_dict
from torch import nn


def test_amp_unscales_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a scaler that is on, as on a GPU: SGD's step is the gradient times the learning rate."""
    monkeypatch.setattr(torch.cuda.amp, "GradScaler", lambda **kw: torch.amp.GradScaler("cpu", **kw))
    cfg = OmegaConf.structured(FairseqConfig())
    with open_dict(cfg):
        cfg.optimizer = {"_name": "sgd", "momentum": 0.0, "weight_decay": 0.0, "lr": [0.5]}
    weight = nn.Parameter(torch.ones(3))
    optimizer = AMPOptimizer.build_optimizer(cfg, [weight])
    optimizer.backward((weight * torch.tensor([1.0, 2.0, 2.0])).sum())
    assert optimizer.scaler.get_scale() > 1
    assert optimizer.clip_grad_norm(0.0) == 3
    optimizer.step()
    assert weight.tolist() == [0.5, 0.0, 0.0]
