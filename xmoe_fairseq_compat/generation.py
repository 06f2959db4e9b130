"""What fairseq's generation needs: flags that do what they say, or are refused."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from xmoe_fairseq_compat.errors import FlagError, flag
from xmoe_fairseq_compat.registry import patch, wrap
from xmoe_fairseq_compat.settings import configuration

if TYPE_CHECKING:
    from torch import Tensor


@patch("fairseq.ngram_repeat_block")
def block_repeated_ngrams(module: Any) -> None:
    """Every torch: --no-repeat-ngram-size compares with the end of the padded row, so it bans nothing.

    And n = 1 would ban the first entry, which is EOS. Where nothing else is left, as with a prefix that is
    forced, a token is not banned.
    """
    import torch

    def _no_repeat_ngram(
        self: Any, tokens: Tensor, lprobs: Tensor, bsz: int, beam_size: int, step: int
    ) -> Tensor:
        n: int = self.no_repeat_ngram_size
        if step + 1 < n:
            return lprobs
        gram_BPN = tokens[:, : step + 1].unfold(1, n, 1)  # those at P places
        latest_B1N = tokens[:, step + 2 - n : step + 1].unsqueeze(1)
        follows_BP = (gram_BPN[:, :, : n - 1] == latest_B1N).all(dim=2)
        if n == 1:
            follows_BP[:, 0] = False
        row_R, place_R = torch.where(follows_BP)
        banned_BV = torch.zeros_like(lprobs, dtype=torch.bool)
        banned_BV[row_R, gram_BPN[row_R, place_R, n - 1]] = True
        others_B1 = (lprobs.isfinite() & ~banned_BV).any(dim=1, keepdim=True)
        return lprobs.masked_fill_(banned_BV & others_B1, float("-inf"))

    module.NGramRepeatBlock._no_repeat_ngram = _no_repeat_ngram


@patch("fairseq.search")
def match_the_source_length(module: Any) -> None:
    """Every torch: --match-source-len gives EOS a log-probability of 0, and longer sentences go on."""

    def step(self: Any, step: int, lprobs_BKV: Tensor, scores: Tensor, *_: Any) -> Any:
        early_B = step < self.min_len_a * self.src_lengths + self.min_len_b
        late_B = step >= self.max_len_a * self.src_lengths + self.max_len_b
        lprobs_BKV[early_B, :, self.eos] = float("-inf")
        if step == 0:  # of an empty source, as in fairseq: the beam must be filled from one hypothesis
            lprobs_BKV[late_B, :, self.eos] = 0.0
        else:
            ends = lprobs_BKV[late_B, :, self.eos]
            lprobs_BKV[late_B] = float("-inf")
            lprobs_BKV[late_B, :, self.eos] = ends.masked_fill(ends.isinf(), 0.0)  # below --min-len
        return self.beam.step(step, lprobs_BKV, scores)

    module.LengthConstrainedBeamSearch.step = step


@patch("fairseq.sequence_generator")
def limit_each_sentence_by_its_own_length(module: Any) -> None:
    """Every torch: --max-len-a is multiplied by the length of a batch's longest sentence, for all of them.

    So a translation depends on what is translated along with it. Here each sentence ends at its own limit.
    """
    import torch

    @wrap(module.SequenceGenerator, "generate")  # not _generate, which is compiled to TorchScript
    def generate(plain: Any, self: Any, models: Any, sample: Any, **kwargs: Any) -> Any:
        source = sample["net_input"].get("src_tokens")
        # A search that decides by itself when a sentence may end would be left without a candidate.
        decides = self.match_source_len or self.search.supports_constraints or self.search.stop_on_max_len
        if source is None or not self.max_len_a or decides:
            return plain(self, models, sample, **kwargs)
        longest_B = (self.max_len_a * source.ne(self.pad).sum(dim=1) + self.max_len_b).long()
        ids = sample["id"].tolist() if isinstance(sample.get("id"), torch.Tensor) else range(len(source))
        limit_of = dict(zip(ids, longest_B.tolist(), strict=True))
        plain_step = self.search.step

        def step(step: int, lprobs_BKV: Any, scores: Any, tokens: Any, original_ids_B: Any) -> Any:
            due = [step >= limit_of[index] for index in original_ids_B.tolist()]
            ends_BK = lprobs_BKV[:, :, self.eos].isfinite()  # not in a prefix, or below --min-len
            due_BK = torch.tensor(due, device=lprobs_BKV.device).unsqueeze(1) & ends_BK
            others_V = torch.arange(lprobs_BKV.size(2), device=lprobs_BKV.device) != self.eos
            lprobs_BKV = lprobs_BKV.masked_fill(due_BK.unsqueeze(2) & others_V, float("-inf"))
            return plain_step(step, lprobs_BKV, scores, tokens, original_ids_B)

        self.search.step = step
        try:
            return plain(self, models, sample, **kwargs)
        finally:
            del self.search.step


def check_generation(g: Any) -> None:
    """Raises FlagError where flags of a search (a GenerationConfig) would not do what they say together."""
    searches = {
        "--sampling": g.sampling,
        "--diverse-beam-groups": g.diverse_beam_groups > 0,
        "--match-source-len": g.match_source_len,
        "--diversity-rate": g.diversity_rate > -1,
        "--constraints": bool(g.constraints),
    }
    asked = [name for name, given in searches.items() if given]
    if len(asked) > 1:
        raise FlagError(f"{' and '.join(asked)} are searches that exclude one another: leave one out")
    longest = float("inf") if g.max_len_a or g.match_source_len else g.max_len_b
    for name, value, rule, holds in (
        ("--nbest", g.nbest, f"must be --beam {g.beam} with --sampling", not g.sampling or g.nbest == g.beam),
        ("--min-len", g.min_len, f"must be at most --max-len-b {g.max_len_b}", g.min_len <= longest),
        ("--retain-dropout-modules", g.retain_dropout_modules, "needs --retain-dropout",
         not g.retain_dropout_modules or g.retain_dropout),
        ("--sampling-topk", g.sampling_topk, "needs --sampling", g.sampling_topk < 0 or g.sampling),
        ("--sampling-topp", g.sampling_topp, "needs --sampling", g.sampling_topp < 0 or g.sampling),
    ):  # fmt: skip
        if not holds:
            raise FlagError(f"{name} {rule}, got {value}")


@patch("fairseq.tasks.fairseq_task")
def refuse_steps_of_beam_search(module: Any) -> None:
    """Every torch: --print-step and --retain-iter-history are for models that refine a whole sentence; a beam
    search ends in a KeyError, after the first batch."""

    @wrap(module.FairseqTask, "build_generator")  # tasks of such models have one of their own
    def build_generator(plain: Any, self: Any, models: Any, args: Any, *rest: Any, **kwargs: Any) -> Any:
        for name in ("print_step", "retain_iter_history"):
            if getattr(args, name, False):
                raise FlagError(
                    f"{flag(name)} needs a model that refines its output (--task translation_lev)"
                )
        return plain(self, models, args, *rest, **kwargs)


@patch("fairseq.models.fairseq_model")
def retain_the_dropout_that_is_named(module: Any) -> None:
    """Every torch: --retain-dropout-modules is one string, in which any part of it is found as a name."""

    @wrap(module.BaseFairseqModel, "make_generation_fast_")
    def make_generation_fast_(plain: Any, self: Any, **kwargs: Any) -> None:
        given = kwargs.get("retain_dropout_modules")
        if given is not None:
            known = {m.module_name for m in self.modules() if hasattr(m, "apply_during_inference")} - {None}
            names = re.findall(r"\w+", given) if isinstance(given, str) else list(given)
            # As in fairseq's examples: older names of layers, and the model, which itself drops nothing
            names = [f"{name}Base" if f"{name}Base" in known else name for name in names]
            names = [name for name in names if name not in {of.__name__ for of in type(self).__mro__}]
            if unknown := sorted({*names} - known):
                raise FlagError(
                    f"--retain-dropout-modules must name some of {', '.join(sorted(known))},"
                    f" got {', '.join(unknown)}"
                )
            kwargs["retain_dropout_modules"] = names
        plain(self, **kwargs)


@patch("fairseq_cli.generate", "fairseq_cli.interactive")
def check_flags_of_generation(module: Any) -> None:
    """Every torch: flags that exclude or need one another are passed over, or end in a traceback.

    So are those that one of the two commands does not read.
    """
    interactive = module.__name__.endswith("interactive")

    @wrap(module, "main")
    def main(plain: Any, cfg: Any) -> Any:
        cfg = configuration(cfg)
        g = cfg.generation
        check_generation(g)
        other, unread = "fairseq-interactive", {"--constraints": g.constraints}
        if interactive:
            other, unread = (
                "fairseq-generate",
                {
                    "--score-reference": g.score_reference,
                    "--lm-path": g.lm_path,
                    "--print-alignment soft": g.print_alignment == "soft",
                },
            )
            if g.prefix_size > 0:  # there is no reference that it could be the beginning of
                module.logger.warning("--prefix-size is read by fairseq-generate alone: nothing is forced")
        for name in [name for name, given in unread.items() if given]:
            raise FlagError(f"{name} is read by {other} alone: leave it out, or use that")
        if g.lm_path and not g.lm_weight:
            raise FlagError(f"--lm-path needs --lm-weight, what its scores count, got {g.lm_weight}")
        return plain(cfg)
