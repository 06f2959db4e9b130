"""The sentences that are looked into: of a set of binarised data, or of the user's own text."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq.data import LanguagePairDataset
from fairseq.data.data_utils import collate_tokens
from torch import Tensor, nn

from xmoe_fairseq_compat.errors import FlagError, UserError

SPM = "--sentencepiece-model"


def of_set(task: Any, split: str, number: int) -> Any:
    """A batch of so many sentences (or blocks), spread over a set that is loaded.

    Raises:
        UserError: they are too long.
    """
    dataset = task.dataset(split)
    number = min(number, len(dataset))
    ids = np.array([len(dataset) * (2 * i + 1) // (2 * number) for i in range(number)])
    if task.max_positions() is not None:  # else they are blocks, which fit
        ids = task.filter_indices_by_size(ids, dataset, task.max_positions(), ignore_invalid_inputs=True)
    if len(ids) == 0:
        raise UserError(f"{split!r}: the sentences are longer than the model reads; take more (--sentences)")
    return dataset.collater([dataset[i] for i in ids])


def of_text(model: Any, task: Any, cfg: Any, texts: Sequence[str], spm: Path | None, data: Path) -> Any:
    """A batch of these texts; of a translation model with the translations that it finds.

    Args:
        cfg: fairseq's configuration, with the settings of a beam search.
        spm: sentencepiece model; None = that of the folder `data`.

    Raises:
        UserError: there is none, or a text cannot be read by the model.
    """
    processor, dictionary = open_pieces(spm, data), task.source_dictionary
    limit = model.max_positions()
    limit = limit[0] if isinstance(limit, tuple) else limit
    ids = [encode(text, processor, dictionary, limit) for text in texts]
    if not hasattr(model, "encoder"):
        start = dictionary.bos() if cfg.task.add_bos_token else dictionary.eos()
        sources = [torch.cat([torch.tensor([start]), each[:-1]]) for each in ids]  # what predicts each piece
        read = {"src_tokens": collate_tokens(sources, dictionary.pad())}
        return {"id": torch.arange(len(ids)), "net_input": read}
    return translated(model, task, cfg.generation, ids)


def translated(model: nn.Module, task: Any, generation: Any, ids: list[Tensor]) -> Any:
    device = next(model.parameters()).device

    def pairs(targets: list[Tensor] | None) -> Any:
        sizes = [] if targets is None else [targets, list(map(len, targets)), task.target_dictionary]
        return LanguagePairDataset(ids, list(map(len, ids)), task.source_dictionary, *sizes)

    generator, sources, targets = task.build_generator([model], generation), pairs(None), []
    for each in range(len(ids)):
        net_input = sources.collater([sources[each]])["net_input"]
        net_input = {name: tensor.to(device) for name, tensor in net_input.items()}
        best = task.inference_step(generator, [model], {"net_input": net_input})[0][0]
        targets.append(best["tokens"].cpu())
    both = pairs(targets)
    return both.collater([both[each] for each in range(len(ids))])


def open_pieces(spm: Path | None, data: Path) -> Any:
    """Raises UserError."""
    import sentencepiece

    path = next((p for p in (spm, data / "spm.model", data.parent / "spm.model") if p and p.is_file()), None)
    if spm and path != spm:
        raise FlagError(f"{SPM} {spm}: no such file")
    if path is None:
        asked = f"name it with {SPM}, or binarise the text and use --data alone"
        raise FlagError(f"--text needs the sentencepiece model of {data}, and there is no spm.model: {asked}")
    try:
        model = path.read_bytes() or b"-"  # an empty one is for sentencepiece none that was given
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError:
        raise UserError(f"{path}: not a sentencepiece model; make one with train_spm.py") from None


def encode(text: str, processor: Any, dictionary: Any, limit: int) -> Tensor:
    """(L,) ids of a text that is normalised as data-prep does, and EOS.

    Raises:
        FlagError: it is empty, too long, no text, or of pieces that the dictionary does not know.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise FlagError(f"--text must be Unicode text, got {ascii(text)}") from None
    pieces = processor.encode(" ".join(unicodedata.normalize("NFC", text).split()), out_type=str)
    if not pieces:
        raise FlagError("--text must hold a word, got nothing")
    ids = [dictionary.index(piece) for piece in pieces]
    unknown = [piece for piece, i in zip(pieces, ids, strict=True) if i == dictionary.unk()]
    if 2 * len(unknown) >= len(pieces):  # a text of other words has single ones
        many = f"{len(unknown)} of its {len(pieces)} pieces ({' '.join(unknown[:5])})"
        raise FlagError(f"--text: the dictionary does not know {many}; is {SPM} of other data?")
    if len(ids) >= limit:
        raise FlagError(f"--text: the model reads {limit - 1} pieces at most, and it has {len(ids)}")
    return torch.tensor([*ids, dictionary.eos()])
