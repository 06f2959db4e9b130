"""XMoE for fairseq: `--user-dir xmoe_fairseq` registers the models and criterions.

`xmoe_fairseq.moe` is plain torch and works without fairseq.
"""

from xmoe_fairseq import _register  # noqa: F401
