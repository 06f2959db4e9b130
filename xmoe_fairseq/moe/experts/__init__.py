"""The small FFNs, and the kernels that compute them: each file in here that registers one."""

from importlib import import_module
from pkgutil import iter_modules

from xmoe_fairseq.moe.dispatch.rows import ExpertRows
from xmoe_fairseq.moe.experts.kernels import Activation, Call, Stacks, register_kernel, use_kernel

__all__ = ["Activation", "Call", "ExpertRows", "Stacks", "register_kernel", "use_kernel"]

for file in iter_modules(__path__):
    import_module(f"{__name__}.{file.name}")
