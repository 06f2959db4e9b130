"""fairseq's trainer for a model whose experts are spread over the ranks."""

import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from fairseq import utils
from torch import Tensor, nn

from xmoe_fairseq.config import read_field
from xmoe_fairseq.parallel import shards
from xmoe_fairseq.parallel.check import check_optimizer, check_training
from xmoe_fairseq.parallel.checkpoint import gather_model, gather_optimizer, slice_optimizer
from xmoe_fairseq.parallel.gradients import norm_with_experts, reduce_expert_gradients
from xmoe_fairseq.parallel.groups import ExpertParallel, expert_names
from xmoe_fairseq.parallel.whole import damage
from xmoe_fairseq.trainer import MoETrainer
from xmoe_fairseq_compat import folder_lock
from xmoe_fairseq_compat.errors import CheckpointError, FlagError, UserError
from xmoe_fairseq_compat.files import WriteError, from_all_ranks, raise_on_all_ranks
from xmoe_fairseq_compat.reading import without_sums

logger = logging.getLogger(__name__)


class ExpertParallelTrainer(MoETrainer):
    """Overrides what fairseq does on one rank alone, or as if all ranks held the same parameters.

    Every rank must enter the same collectives in the same order, whatever its data; what one rank alone
    would do after an error (retry, save a crash checkpoint) would leave the others waiting.
    """

    def __init__(self, cfg: Any, task: Any, model: nn.Module, criterion: Any, quantizer: Any = None) -> None:
        check_training(cfg, model)
        self._parallel: ExpertParallel = model.expert_parallel  # type: ignore[assignment]
        self._whole: dict[str, Any] = {}  # while saving: what was gathered,
        self._shards: dict[str, Any] = {}  # or which files were written
        self._in_step = False  # also after an error in one
        super().__init__(cfg, task, model, criterion, quantizer)
        if read_field(cfg.model, "moe_sharded_checkpoints", False):
            # Only rank 0 makes this file; what is wrong should show now, not at the first checkpoint.
            sees = from_all_ranks(Path(cfg.checkpoint.save_dir, folder_lock.NAME).exists())
            if sees[0] and not all(sees[: self._parallel.size]):
                raise not_shared(cfg.checkpoint.save_dir, folder_lock.NAME, sees.index(False))

    def train_step(self, samples: list[Any], raise_oom: bool = False) -> Any:
        with self._in_one_step():
            return super().train_step(samples, raise_oom=True)

    def valid_step(self, sample: Any, raise_oom: bool = False) -> Any:
        with self._in_one_step():
            return super().valid_step(sample, raise_oom=True)

    @contextmanager
    def _in_one_step(self) -> Iterator[None]:
        self._in_step = True
        yield
        self._in_step = False

    def clip_grad_norm(self, clip_norm: float) -> Tensor:
        reduce_expert_gradients(self._model.parameters(), self._parallel)
        return self.optimizer.clip_grad_norm(
            clip_norm, lambda norm: norm_with_experts(norm, self.optimizer.params, self._parallel)
        )

    def _build_optimizer(self) -> None:
        super()._build_optimizer()
        check_optimizer(self._optimizer, self.cfg.optimizer)
        plain_load = self._optimizer.load_state_dict

        def load_slice(state: dict[str, Any], optimizer_overrides: dict[str, Any] | None = None) -> None:
            plain_load(slice_optimizer(state, self._optimizer.params, self._parallel), optimizer_overrides)

        self._optimizer.load_state_dict = load_slice

    def consolidate_optimizer(self) -> None:
        """fairseq calls this on every rank before rank 0 saves: the moment to gather, or to write shards."""
        super().consolidate_optimizer()
        if self._in_step:
            return
        with self.explained("saving after update", self.get_num_updates()):
            if read_field(self.cfg.model, "moe_sharded_checkpoints", False):
                self._shards = self._write_shards()
            else:
                self._whole = self._gather()

    def _gather(self) -> dict[str, Any]:
        whole = {"model": gather_model(self._model.state_dict(), self._model, self._parallel)}
        if self.cfg.ema.store_ema:
            ema = self.ema.get_model()
            whole["ema"] = gather_model(ema.state_dict(), ema, self._parallel)
        if not self.cfg.checkpoint.no_save_optimizer_state:
            whole["last_optimizer_state"] = gather_optimizer(
                self.optimizer.state_dict(), self.optimizer.params, self._parallel
            )
        return whole

    def _write_shards(self) -> dict[str, Any]:
        """Raises a UserError on all ranks where one cannot write, or rank 0 does not see what was written."""
        folder, count = Path(self.cfg.checkpoint.save_dir), self._parallel.size
        if dist.get_rank() == 0:  # first, while no rank has written a file that nothing names yet
            shards.remove_orphans(folder)
        identity = from_all_ranks(f"{self.get_num_updates()}-{secrets.token_hex(4)}")[0]
        files = shards.shard_names(identity, count)
        try:
            raise_on_all_ranks(self._write_shard(folder, identity))  # waits for all files
            unseen = [file for file in files if dist.get_rank() == 0 and not (folder / file).is_file()]
            raise_on_all_ranks(not_shared(folder, unseen[0]) if unseen else None)
        except UserError:
            for file in files[dist.get_rank() :][:1]:
                (folder / file).unlink(missing_ok=True)
            raise
        return {"id": identity, "files": files}

    def _write_shard(self, folder: Path, identity: str) -> WriteError | None:
        if self._parallel.in_first_group:
            _, experts = self._split(super().state_dict())
            experts, place = utils.move_to_cpu(experts), (dist.get_rank(), self._parallel.size)
            try:
                shards.write_shard(experts, folder, identity, *place)
            except WriteError as error:
                return error
        return None

    def _split(self, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        slots = [index for index, p in enumerate(self.optimizer.params) if hasattr(p, "expert")]
        return shards.split_experts(state, expert_names(self._model), slots)

    def state_dict(self) -> dict[str, Any]:
        """As one process with all experts would write it; so the configuration says that it is one."""
        whole, self._whole = self._whole, {}
        state = super().state_dict()
        if "ema" in whole:
            state["extra_state"]["ema"] = whole.pop("ema")
        # fairseq-generate and the like build the model from this: in one process, or whole on every rank.
        state["cfg"]["model"]["moe_expert_parallel_size"] = 1
        if self._shards:
            return {**self._split(state)[0], shards.KEY: self._shards}
        return {**state, **whole}

    def save_checkpoint(self, filename: str, extra_state: dict[str, Any]) -> None:
        if self._in_step:
            logger.error(f"{filename} is not written: its experts lie on several ranks")
            return
        super().save_checkpoint(filename, extra_state)

    def load_checkpoint(self, filename: str, *args: Any, **kwargs: Any) -> Any:
        with self.explained(f"loading {filename} after update", self.get_num_updates()):
            return self._load(filename, *args, **kwargs)

    def _load(self, filename: str, *args: Any, **kwargs: Any) -> Any:
        if not from_all_ranks(dist.get_rank() == 0 and _is_sharded(Path(filename)))[0]:
            return super().load_checkpoint(filename, *args, **kwargs)
        if not Path(filename).is_file():
            problem = f"rank {dist.get_rank()} does not see it; all ranks must share its folder"
            raise CheckpointError(filename, problem)
        # Each rank reads its own experts: no rank could hold them all, and send them to the others.
        self.cfg.checkpoint.load_checkpoint_on_all_dp_ranks = True
        share = dist.get_rank(self._parallel.expert_group), self._parallel.size
        raise_on_all_ranks(damage(Path(filename), *share) if self._parallel.in_first_group else None)
        with shards.reading_part(*share), without_sums():
            return super().load_checkpoint(filename, *args, **kwargs)


def not_shared(folder: str | Path, file: str, rank: int = 0) -> FlagError:
    """What to raise where one rank does not see what another has written."""
    return FlagError(
        f"--moe-sharded-checkpoints: rank {rank} does not see {file}, which another rank has written to"
        f" --save-dir {folder}; all ranks must share that folder"
    )


def _is_sharded(checkpoint: Path) -> bool:
    try:
        return checkpoint.is_file() and bool(shards.named_shards(checkpoint))
    except (CheckpointError, OSError):  # fairseq's own load says what is wrong with it
        return False
