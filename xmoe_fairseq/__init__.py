"""XMoE for fairseq: `--user-dir xmoe_fairseq` registers the models and criterions.

`xmoe_fairseq.moe` is plain torch and works without fairseq.
"""

from xmoe_fairseq._requirements import check_requirements, fairseq_installed

if fairseq_installed():
    check_requirements()
    # fairseq auto-imports models/ but never criterions/, and neither when this package was imported first.
    from xmoe_fairseq import criterions, models  # noqa: F401
