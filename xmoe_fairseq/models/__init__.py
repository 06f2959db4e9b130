"""Registered models. fairseq imports every file in this folder."""

from xmoe_fairseq import hooks  # noqa: F401
from xmoe_fairseq.models.language_model import XMoETransformerLanguageModel
from xmoe_fairseq.models.translation import XMoETransformerModel

__all__ = ["XMoETransformerLanguageModel", "XMoETransformerModel"]
