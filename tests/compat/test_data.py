"""One test per patch of fairseq's data sets and their numbers."""

from types import SimpleNamespace

import numpy as np
import torch
from fairseq.data import LanguagePairDataset, TokenBlockDataset, data_utils
from fairseq.modules.dynamic_crf_layer import DynamicCRF


def test_old_numpy_names() -> None:
    assert data_utils.get_buckets(np.array([1, 2, 3, 9]), 2).tolist() == [2, 9]
    mask = data_utils.compute_mask_indices((2, 20), None, 0.3, 4, no_overlap=True, min_masks=1)
    assert mask.shape == (2, 20)
    lines = [torch.tensor([4, 2]), torch.tensor([5, 6, 2])]
    blocks = TokenBlockDataset(lines, [2, 3], None, pad=1, eos=2, break_mode="eos")
    assert blocks[1].tolist() == [5, 6, 2]
    words = SimpleNamespace(pad=lambda: 1, eos=lambda: 2, unk=lambda: 3)
    sizes = np.array([2, 3])
    pairs = LanguagePairDataset(lines, sizes, words, lines, sizes, words, num_buckets=1)
    assert pairs.bucketed_num_tokens.tolist() == [3, 3]
    crf = DynamicCRF(num_embedding=5, low_rank=2, beam_size=3)
    targets = torch.tensor([[1, 2]])
    assert crf(torch.zeros(1, 2, 5), targets, torch.ones(1, 2, dtype=torch.bool)).isfinite().all()
