"""What stock fairseq 0.12 needs on today's Python, torch, numpy and hydra.

A line in site-packages (a .pth file) imports this module when Python starts, because fairseq's commands
import fairseq before they read --user-dir. It costs next to nothing then: each mend below runs when fairseq
imports the one module that it mends, and only for the versions that have the defect.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # not typing's, whose import would cost more than this whole module
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from importlib.machinery import ModuleSpec
    from typing import Any

    When = Callable[[], bool]
    Mend = Callable[[Any], None]  # takes the module
    MendAround = Callable[[Any], Iterator[None]]

# The mends by module: to run after it, or around it (what is before a mend's `yield` runs before the module).
_after: dict[str, list[tuple[When, Mend]]] = {}
_around: dict[str, list[tuple[When, MendAround]]] = {}


def is_active() -> bool:
    """Whether the mends were in place before fairseq was imported."""
    return any(getattr(finder, "mends_fairseq", False) for finder in sys.meta_path)


def _has(package: str, *version: int) -> bool:
    """Whether this version of a package, or a later one, is installed."""
    import re
    from importlib import metadata

    try:
        installed = metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return tuple(int(part) for part in re.findall(r"\d+", installed)[: len(version)]) >= version


def _mend(*modules: str, when: When = lambda: True) -> Callable[[Mend], Mend]:
    def register(mend: Mend) -> Mend:
        for module in modules:
            _after.setdefault(module, []).append((when, mend))
        return mend

    return register


def _mend_around(module: str, when: When = lambda: True) -> Callable[[MendAround], MendAround]:
    def register(mend: MendAround) -> MendAround:
        _around.setdefault(module, []).append((when, mend))
        return mend

    return register


class _Finder:
    """Finds the modules to be mended where the other finders do, and runs their mends with them."""

    mends_fairseq = True

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in _after and name not in _around:
            return None
        if not _has("fairseq", 0, 12) or _has("fairseq", 0, 13):
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec: Any = find(name, path, target) if find and finder is not cls else None
            if spec is not None:
                spec.loader.exec_module = _mended(name, spec.loader.exec_module)
                return spec  # type: ignore[no-any-return]
        return None


def _mended(name: str, exec_module: Callable[[Any], None]) -> Callable[[Any], None]:
    def exec_mended_module(module: Any) -> None:
        import contextlib

        with contextlib.ExitStack() as stack:
            for when, mend_around in _around.get(name, []):
                if when():
                    stack.enter_context(contextlib.contextmanager(mend_around)(module))
            exec_module(module)
        for when, mend in _after.get(name, []):
            if when():
                mend(module)

    return exec_mended_module


def _with(library: Any, **replaced: Any) -> Any:
    """A stand-in for a library within one of fairseq's modules: the same but for the names given."""
    stand_in = type(sys)(library.__name__)
    stand_in.__dict__.update(replaced, __getattr__=lambda name: getattr(library, name))
    return stand_in


@_mend_around("fairseq")
def _quiet_deprecations(module: Any) -> Iterator[None]:
    """hydra >= 1.1, torch >= 2 and fairscale warn of fairseq's old style, some 20 lines at each start.

    Some of hydra's begin with "H", as the hypotheses that fairseq-generate prints do.
    """
    import warnings

    for category, message in (
        (UserWarning, r"(?s).*(hydra|package header|strict flag)"),
        (UserWarning, "'pin_memory' argument is set as true but no accelerator is found"),
        (UserWarning, "Support for mismatched key_padding_mask and attn_mask is deprecated"),
        (FutureWarning, "`(torch.cuda.amp.*|broadcast_buffers)` is deprecated"),
    ):
        warnings.filterwarnings("ignore", message, category)
    yield


@_mend_around("fairseq.dataclass.configs", when=lambda: sys.version_info >= (3, 11))
def _hashable_configs(module: Any) -> Iterator[None]:
    """Python >= 3.11 refuses `field: Config = Config()` where Config has no hash, as none of fairseq's has.

    @dataclass keeps a __hash__ that it finds in the class body, so each subclass of FairseqDataclass gets
    one. (A default_factory would not do: fairseq reads the fields' `.default`.)
    """
    import dataclasses

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


@_mend("fairseq.checkpoint_utils", when=lambda: _has("torch", 2, 6))
def _allow_plain_types_in_checkpoints(module: Any) -> None:
    """torch >= 2.6 loads tensors and a few builtins only; fairseq saves these plain types too."""
    import argparse
    import collections
    import typing

    import numpy as np
    import omegaconf as oc
    import torch
    from fairseq.distributed.utils import _TensorPlaceholder

    multiarray = (getattr(np, "_core", None) or np.core).multiarray
    numpy_makers = (multiarray._reconstruct, multiarray.scalar)
    types: list[Any] = [argparse.Namespace, np.ndarray, np.dtype]
    types += [type(np.dtype(name)) for name in ("bool", "i4", "i8", "f4", "f8")]
    # by the names that numpy 1 and numpy 2 write
    for core in ("core", "_core"):
        types += [(make, f"numpy.{core}.multiarray.{make.__name__}") for make in numpy_makers]
    # what rank 0 sends to the others when a distributed run resumes
    types += [_TensorPlaceholder, oc.DictConfig, oc.ListConfig, oc.base.ContainerMetadata, oc.base.Metadata]
    types += [oc.nodes.AnyNode, typing.Any, collections.defaultdict, dict, list, int, float, str, bool]
    torch.serialization.add_safe_globals(types)


class CheckpointError(RuntimeError, SystemExit):
    """An unusable checkpoint: a command ends with this one line, a library may catch it as a RuntimeError."""

    def __init__(self, file: Any, problem: str) -> None:
        message = f"cannot load checkpoint {getattr(file, 'name', file)}: {problem}"
        super().__init__(message)
        self.code = message  # what Python prints when this ends it; the exit status is then 1


@_mend("fairseq.checkpoint_utils", when=lambda: _has("torch", 2, 6))
def _say_why_a_checkpoint_is_refused(module: Any) -> None:
    """torch >= 2.6 reports a refused type in a page of advice, and a damaged file without its name."""
    import re

    import torch

    def load(file: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            # Said here, no environment variable can turn it off.
            state = torch.load(file, *args, **{**kwargs, "weights_only": True})
        except MemoryError:
            raise
        except Exception as error:
            refused = re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", str(error))
            if refused:
                problem = (
                    f"it holds {refused[1]}, which is not on the list of types that are safe to load; save it"
                    " again without, or if you trust it allow the type in a --user-dir with"
                    " torch.serialization.add_safe_globals"
                )
            else:
                reason = " ".join(str(error).rpartition("WeightsUnpickler error:")[2].split())
                reason = reason.split(" Check the documentation")[0] or "it ends too early"
                problem = f"it is damaged or no checkpoint ({reason[:80]}); copy it again or use another"
            raise CheckpointError(file, problem) from None
        if not isinstance(state, dict) or "model" not in state:
            raise CheckpointError(file, "it has no entry 'model'; name a file that fairseq-train saved")
        return state

    module.torch = _with(torch, load=load)


@_mend(
    "fairseq.models.fconv",
    "fairseq.models.fconv_lm",
    "fairseq.models.fconv_self_att",
    "fairseq.models.hubert.hubert",
    "fairseq.models.lightconv_lm",
    "fairseq.models.speech_to_text.s2t_wav_transformer",
    "fairseq.models.transformer_lm",
    "fairseq.models.wav2vec.wav2vec",
    "fairseq.models.wav2vec.wav2vec2",
    "fairseq.utils",
)
def _evaluate_literals_only(module: Any) -> None:
    """Every torch: fairseq calls eval on strings of a model's configuration, which a checkpoint brings along.

    A name in the module hides the builtin. Sums and products of literals stay, as in `[(512, 3)] * 20`.
    """
    import ast
    import operator

    operators: dict[type, Any] = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}

    def value(node: ast.AST) -> Any:
        if isinstance(node, ast.BinOp) and type(node.op) in operators:
            return operators[type(node.op)](value(node.left), value(node.right))
        return ast.literal_eval(node)

    module.eval = lambda text: value(ast.parse(text.strip(), mode="eval").body)


def _development_build() -> bool:
    from importlib import metadata

    return _has("torch") and not metadata.version("torch").split("+")[0].replace(".", "").isdigit()


@_mend(
    "fairseq.modules.transformer_layer",
    "fairseq.models.transformer.transformer_encoder",
    when=_development_build,
)
def _read_development_versions(module: Any) -> None:
    """Every torch: fairseq reads the parts of its version as numbers, and a build 2.14.0a0 has none last."""
    import re

    import torch

    numbers = re.match(r"\d+\.\d+\.\d+", torch.__version__)
    module.torch = _with(torch, __version__=numbers[0] if numbers else "2.0.0")


@_mend("fairseq.checkpoint_utils")
def _read_experts_whole(module: Any) -> None:
    """Every torch: fairseq reads a checkpoint from one file; experts may lie in files of their own.

    And it builds the model as the training run had it; here every process that only reads holds all experts.
    """
    plain_load = module.load_checkpoint_to_cpu

    def load_checkpoint_to_cpu(path: Any, *args: Any, **kwargs: Any) -> Any:
        state = plain_load(path, *args, **kwargs)
        model_cfg: Any = (state.get("cfg") or {}).get("model")
        if hasattr(model_cfg, "keys") and "moe_expert_parallel_size" in model_cfg:
            model_cfg["moe_expert_parallel_size"] = 1
        if "expert_shards" not in state:
            return state
        from xmoe_fairseq.parallel.shards import join_shards

        return join_shards(state, path)

    module.load_checkpoint_to_cpu = load_checkpoint_to_cpu


@_mend("fairseq.checkpoint_utils")
def _copy_checkpoints_whole(module: Any) -> None:
    """Every torch: checkpoint_last.pt is a plain copy, so a kill at that moment leaves half a checkpoint."""
    plain = module.PathManager

    class PathManager(plain):  # type: ignore[misc, valid-type]
        @staticmethod
        def copy(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
            if not plain.supports_rename(dst_path):
                return bool(plain.copy(src_path, dst_path, overwrite))
            copied = plain.copy(src_path, dst_path + ".tmp", overwrite=True)
            plain.rename(dst_path + ".tmp", dst_path)
            return bool(copied)

    module.PathManager = PathManager


@_mend("fairseq.models.ema.ema")
def _average_floats_only(module: Any) -> None:
    """--store-ema averages every entry of a state dict, tables of whole numbers too, which torch refuses."""
    plain_init = module.EMA.__init__

    def init(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        plain_init(self, model, *args, **kwargs)
        entries = model.state_dict().items()
        whole_numbers = {name for name, value in entries if not value.dtype.is_floating_point}
        self.skip_keys = {*self.skip_keys, *whole_numbers}

    module.EMA.__init__ = init


@_mend("fairseq.modules.transformer_layer", when=lambda: _has("torch", 2))
def _no_encoder_fast_path(module: Any) -> None:
    """In evaluation the encoder layer calls a private torch operation whose arguments changed in torch 2."""
    plain_init = module.TransformerEncoderLayerBase.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        plain_init(self, *args, **kwargs)
        self.can_use_fastpath = False

    module.TransformerEncoderLayerBase.__init__ = __init__


@_mend("fairseq.models.distributed_fairseq_model")
def _torch_ddp(module: Any) -> None:
    """Every torch: pytorch_ddp refuses device_ids on CPU, and its second update waits for unused weights.

    These are the fast path's copies of the encoder's weights. They are frozen only while DDP notes which
    gradients to wait for: the optimizer must go on counting them, as its saved states do.
    """
    plain_ddp = module.DistributedDataParallel
    parts = ("in_proj", "out_proj", "fc1", "fc2")
    copies = [f"{part}_{kind}" for part in parts for kind in ("weight", "bias")]

    def ddp(module: Any, device_ids: Any = None, output_device: Any = None, **kwargs: Any) -> Any:
        from fairseq.modules.transformer_layer import TransformerEncoderLayerBase

        if next(module.parameters()).device.type == "cpu":
            device_ids = output_device = None
        layers = [layer for layer in module.modules() if isinstance(layer, TransformerEncoderLayerBase)]
        found = [getattr(layer, name, None) for layer in layers for name in copies]
        unused = [parameter for parameter in found if parameter is not None and parameter.requires_grad]
        for parameter in unused:
            parameter.requires_grad_(False)
        try:
            return plain_ddp(module, device_ids=device_ids, output_device=output_device, **kwargs)
        finally:
            for parameter in unused:
                parameter.requires_grad_(True)

    module.DistributedDataParallel = ddp


@_mend(
    "fairseq.data.data_utils",
    "fairseq.data.language_pair_dataset",
    "fairseq.data.token_block_dataset",
    "fairseq.modules.dynamic_crf_layer",
    when=lambda: _has("numpy", 1, 24),
)
def _old_numpy_names(module: Any) -> None:
    """np.int and np.float went in numpy 1.24, np.compat in 2.0, percentile(interpolation=) in 2.4."""
    import numpy

    class compat:
        long = int

    def percentile(a: Any, q: Any, interpolation: Any = "linear", **kwargs: Any) -> Any:
        return numpy.percentile(a, q, method=interpolation, **kwargs)

    module.np = _with(numpy, int=int, float=float, compat=compat, percentile=percentile)


@_mend("fairseq.data.iterators")
def _resume_on_another_number_of_ranks(module: Any) -> None:
    """Every torch: a checkpoint's place in the epoch counts one rank's batches, so with fewer or more ranks
    a resumed run would read some of the epoch's batches again, or leave some out."""
    iterator = module.EpochBatchIterator
    plain_state, plain_load = iterator.state_dict, iterator.load_state_dict

    def state_dict(self: Any) -> dict[str, Any]:
        return {**plain_state(self), "num_shards": self.num_shards}

    def load_state_dict(self: Any, state: dict[str, Any]) -> None:
        read = state.get("iterations_in_epoch", 0) * state.get("num_shards", self.num_shards)
        plain_load(self, {**state, "iterations_in_epoch": read // self.num_shards})

    iterator.state_dict, iterator.load_state_dict = state_dict, load_state_dict


@_mend("fairseq.options")
def _bf16_without_tpu(module: Any) -> None:
    """Every torch: --bf16 turns --tpu on, and so needs torch_xla also on a CPU or GPU."""
    from importlib.util import find_spec

    plain_parse = module.parse_args_and_arch

    def parse_args_and_arch(*args: Any, **kwargs: Any) -> Any:
        parsed = plain_parse(*args, **kwargs)
        namespace = parsed[0] if isinstance(parsed, tuple) else parsed
        if getattr(namespace, "bf16", False) and find_spec("torch_xla") is None:
            namespace.tpu = False
        return parsed

    module.parse_args_and_arch = parse_args_and_arch


@_mend("fairseq.distributed.utils", when=lambda: _has("torch", 2))
def _restart_among_the_living(module: Any) -> None:
    """torchrun --max-restarts keeps its store: restarted ranks may read the addresses of the dead, and wait
    for them. (pytorch issue 167288 looks alike.) On one node the number of restarts keeps them apart; on
    several nodes may count differently: there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes torchrun do it."""
    import os

    import torch.distributed as dist

    def init_process_group(backend: Any, init_method: Any, world_size: int, rank: int) -> None:
        env = os.environ
        if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or env.get("GROUP_WORLD_SIZE") != "1":
            dist.init_process_group(backend, init_method, world_size=world_size, rank=rank)
            return
        store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), world_size, is_master=False)
        attempt = dist.PrefixStore(f"restart {env['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group(backend, store=attempt, world_size=world_size, rank=rank)

    module.dist = _with(dist, init_process_group=init_process_group)


@_mend("fairseq.distributed.utils")
def _gather_on_cpu(module: Any) -> None:
    """Every torch: all_gather_list packs its data into CUDA tensors, also for gloo on CPU."""
    import torch.distributed as dist

    plain_gather = module.all_gather_list

    def all_gather_list(data: Any, group: Any = None, max_size: int = 16384) -> Any:
        group = module.get_global_group() if group is None else group
        if dist.get_backend(group) != "gloo":
            return plain_gather(data, group, max_size)
        gathered = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, data, group=group)
        return gathered

    module.all_gather_list = all_gather_list


@_mend("fairseq.trainer")
def _model_may_bring_its_trainer(module: Any) -> None:
    """Every torch: the trainer takes it that all ranks hold the same parameters, and leaves a model no say.

    Its gradient norm, checkpoints and recovery from errors are wrong for experts that lie on some ranks.
    """

    def __new__(cls: Any, cfg: Any, task: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(getattr(model, "trainer_class", cls))

    module.Trainer.__new__ = __new__


@_mend("fairseq.trainer")
def _skip_an_overflow_on_cpu(module: Any) -> None:
    """Every torch: where --fp16 skips an update whose gradients overflowed, the norm is put on a GPU."""
    import torch

    class OnHost(torch.Tensor):
        def cuda(self, *args: Any, **kwargs: Any) -> Any:
            return self.as_subclass(torch.Tensor)

    if not torch.cuda.is_available():
        module.torch = _with(torch, tensor=lambda *args, **kw: torch.tensor(*args, **kw).as_subclass(OnHost))


@_mend("fairseq.trainer")
def _count_what_came_before_a_dummy_batch(module: Any) -> None:
    """Every torch: a rank whose last micro-batch of an update is a dummy loses the size of its real ones.

    So with --update-freq > 1 the last update of an epoch divides the gradient by too small a number. With the
    dummies first, and counted as nothing, the sum is right.
    """
    import torch

    plain_step = module.Trainer.train_step

    def nothing(value: Any) -> Any:
        return torch.zeros_like(value) if torch.is_tensor(value) else 0

    def train_step(self: Any, samples: Any, raise_oom: bool = False) -> Any:
        real = [sample for sample in samples if sample]
        dummies = [sample for sample in samples if not sample]
        if not (real and dummies):
            return plain_step(self, samples, raise_oom)
        plain_task_step = self.task.train_step

        def task_step(*args: Any, ignore_grad: bool = False, **kwargs: Any) -> Any:
            loss, size, log = plain_task_step(*args, ignore_grad=ignore_grad, **kwargs)
            if ignore_grad:
                size, log = nothing(size), {key: nothing(value) for key, value in log.items()}
            return loss, size, log

        self.task.train_step = task_step
        try:
            return plain_step(self, dummies + real, raise_oom)
        finally:
            del self.task.train_step

    module.Trainer.train_step = train_step


@_mend("fairseq_cli.generate")
def _generate_on_several_ranks(module: Any) -> None:
    """Every torch: under torchrun fairseq-generate joins no ranks, so each of them translates everything.

    Each takes its share, and with --results-path writes into a folder of its own there (rank0, rank1, ...).
    """
    import os

    plain_main = module.main

    def shared_out(cfg: Any) -> Any:
        rank, results = cfg.distributed_training.distributed_rank, cfg.common_eval.results_path
        if results is not None:
            cfg.common_eval.results_path = os.path.join(results, f"rank{rank}")
        return plain_main(cfg)

    def main(cfg: Any) -> Any:
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return plain_main(cfg)
        from argparse import Namespace

        from fairseq.dataclass.utils import convert_namespace_to_omegaconf
        from fairseq.distributed import utils

        cfg = convert_namespace_to_omegaconf(cfg) if isinstance(cfg, Namespace) else cfg
        return utils.call_main(cfg, shared_out)

    module.main = main


@_mend("fairseq_cli.score", when=lambda: _has("sacrebleu", 2))
def _score_with_sacrebleu_2(module: Any) -> None:
    """fairseq-score --sacrebleu hands over open files, where sacrebleu >= 2 wants lists of lines."""
    import sacrebleu

    plain_bleu = sacrebleu.corpus_bleu

    def corpus_bleu(hypotheses: Any, references: Any, *args: Any, **kwargs: Any) -> Any:
        return plain_bleu(list(hypotheses), [list(lines) for lines in references], *args, **kwargs)

    sacrebleu.corpus_bleu = corpus_bleu


@_mend("fairseq_cli.score")
def _score_sentences(module: Any) -> None:
    """Every torch: fairseq-score --sentence-bleu makes its scorer of three numbers, not of one config."""
    from fairseq.scoring import bleu

    def scorer(*args: Any) -> Any:
        return bleu.Scorer(*args) if len(args) == 1 else bleu.Scorer(bleu.BleuConfig(*args))

    module.bleu = _with(bleu, Scorer=scorer)


if not is_active() and "fairseq" not in sys.modules:
    sys.meta_path.insert(0, _Finder)
