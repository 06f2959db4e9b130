"""Registered models. fairseq imports every file in this folder."""

from xmoe_fairseq._requirements import check_requirements

check_requirements()  # before fairseq is imported, to name what is missing

from xmoe_fairseq import hooks  # noqa: E402, F401
from xmoe_fairseq.models.language_model import XMoETransformerLanguageModel  # noqa: E402
from xmoe_fairseq.models.translation import XMoETransformerModel  # noqa: E402

__all__ = ["XMoETransformerLanguageModel", "XMoETransformerModel"]
