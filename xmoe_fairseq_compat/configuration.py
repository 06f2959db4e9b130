"""What fairseq's configurations and messages need."""

from __future__ import annotations

import dataclasses
import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from xmoe_fairseq_compat.errors import FlagError, one_line
from xmoe_fairseq_compat.plugins import models
from xmoe_fairseq_compat.registry import patch, patch_around, wrap
from xmoe_fairseq_compat.settings import when_parsed


@patch_around("fairseq")
def quiet_deprecations(module: Any) -> Iterator[None]:
    """hydra >= 1.1, torch >= 2 and fairscale warn of fairseq's old style, some 20 lines at each start.

    Some of hydra's begin with "H", as the hypotheses that fairseq-generate prints do.
    """
    for category, message in (
        (UserWarning, r"(?s).*(hydra|package header|strict flag)"),
        (UserWarning, "'pin_memory' argument is set as true but no accelerator is found"),
        (UserWarning, "Support for mismatched key_padding_mask and attn_mask is deprecated"),
        (FutureWarning, "`(torch.cuda.amp.*|broadcast_buffers)` is deprecated"),
    ):
        warnings.filterwarnings("ignore", message, category)
    yield


@patch("fairseq")
def end_with_one_line(module: Any) -> None:
    """Every torch: a wrong flag, path or checkpoint, or numbers that overflow, end a command with a page of
    where fairseq was just then."""

    @wrap(sys, "excepthook")
    def excepthook(plain: Any, kind: Any, error: BaseException, traceback: Any) -> None:
        line = one_line(error)
        if line:
            print(f"{os.path.basename(sys.argv[0]) or 'fairseq'}: error: {line}", file=sys.stderr)
        else:
            plain(kind, error, traceback)


@patch_around("fairseq.dataclass.configs", when=lambda: sys.version_info >= (3, 11))
def hashable_configs(module: Any) -> Iterator[None]:
    """Python >= 3.11 refuses `field: Config = Config()` where Config has no hash, as none of fairseq's has.

    @dataclass keeps a __hash__ that it finds in the class body, so each subclass of FairseqDataclass gets
    one. (A default_factory would not do: fairseq reads the fields' `.default`.)
    """
    plain_dataclass = dataclasses.dataclass

    def dataclass(cls: Any = None, /, **options: Any) -> Any:
        if cls is not None and cls.__name__ == "FairseqDataclass":

            def give_hash(subclass: Any, /, **kwargs: Any) -> None:
                super(cls, subclass).__init_subclass__(**kwargs)
                if "__hash__" not in subclass.__dict__:
                    subclass.__hash__ = object.__hash__

            cls.__init_subclass__ = classmethod(give_hash)
        return plain_dataclass(cls, **options)

    dataclasses.dataclass = dataclass
    try:
        yield
    finally:
        dataclasses.dataclass = plain_dataclass


@patch("fairseq.utils")
def user_dir_may_be_installed(module: Any) -> None:
    """Every torch: --user-dir takes a folder, so the name of an installed package does not do elsewhere."""

    @wrap(module, "import_user_module")
    def import_user_module(plain: Any, args: Any) -> Any:
        name = getattr(args, "user_dir", None)
        if name and name.isidentifier() and not os.path.exists(name):
            package = find_spec(name)
            if package is not None and package.submodule_search_locations:
                args.user_dir = package.submodule_search_locations[0]
        return plain(args)


@patch("fairseq.options")
def bf16_without_tpu(module: Any) -> None:
    """Every torch: --bf16 turns --tpu on, and so needs torch_xla also on a CPU or GPU; beside --fp16 it ends
    in advice about TPUs."""

    @wrap(module, "parse_args_and_arch")
    def parse_args_and_arch(plain: Any, parser: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return plain(parser, *args, **kwargs)
        except ValueError as error:
            if "--fp16 and --tpu" not in str(error):
                raise
            raise FlagError("--fp16 cannot be combined with --bf16 or --tpu: leave one out") from error

    def see(namespace: Namespace, parser: Any) -> None:
        if getattr(namespace, "bf16", False) and find_spec("torch_xla") is None:
            namespace.tpu = False

    when_parsed(module, see)


@patch("fairseq.options")
def help_with_all_flags(module: Any) -> None:
    """Every torch: --help ends the command before the flags of the --arch, --task, ... given are known, and
    without --arch fairseq-train ends with a RuntimeError that says nothing."""

    @wrap(module, "parse_args_and_arch")
    def parse_args_and_arch(plain: Any, parser: Any, *args: Any, **kwargs: Any) -> Any:
        plain_known = parser.parse_known_args

        def first_pass(arguments: Any = None, namespace: Any = None) -> Any:
            """Which --arch and the like there are; the second pass, with all flags known, answers --help."""
            parser.parse_known_args = plain_known
            arguments = sys.argv[1:] if arguments is None else arguments
            known, rest = plain_known([a for a in arguments if a not in ("-h", "--help")], namespace)
            if getattr(known, "arch", "") is None:
                plain_known(arguments, namespace)  # --help ends here: of no model's flags
                archs = " or --arch ".join(models() or ["transformer", "transformer_lm"])
                parser.error(f"--arch must be given, such as --arch {archs}")
            return known, rest

        parser.parse_known_args = first_pass
        return plain(parser, *args, **kwargs)
