"""What fairseq's alignments need, and what stands on them: unknown words replaced by aligned source words."""

from __future__ import annotations

from typing import Any

from xmoe_fairseq_compat.errors import FlagError, UserError
from xmoe_fairseq_compat.registry import patch, wrap


class Alignment(list[Any]):
    """(source, target) pairs of positions, and what source they are of."""

    source_length = 0  # in tokens, without EOS
    written: list[str] | None = None  # the source's tokens as they were read, where that is known


@patch("fairseq.sequence_generator")
def align_what_was_found(module: Any) -> None:
    """Every torch: alignments fail for print_alignment=True, and for hypotheses less than the beam."""
    kind = module.SequenceGeneratorWithAlignment

    @wrap(kind, "__init__")
    def init(
        plain: Any, self: Any, models: Any, *args: Any, print_alignment: Any = "hard", **kwargs: Any
    ) -> None:
        print_alignment = "hard" if print_alignment is True else print_alignment
        if print_alignment not in ("hard", "soft"):
            raise FlagError(f"--print-alignment must be hard or soft, got {print_alignment}")
        plain(self, models, *args, print_alignment=print_alignment, **kwargs)
        if not self.model.has_encoder():
            raise FlagError("--print-alignment and --replace-unk need a model with an encoder")

    @wrap(kind, "generate")
    def generate(plain: Any, self: Any, models: Any, sample: Any, **kwargs: Any) -> Any:
        if any(getattr(model, "full_context_alignment", False) for model in self.model.models):
            return plain(self, models, sample, **kwargs)
        found = module.SequenceGenerator.generate(self, models, sample, **kwargs)
        for row, source in enumerate(sample["net_input"]["src_tokens"].cpu()):
            for hypothesis in found[row]:
                tokens, attention = hypothesis["tokens"].cpu(), hypothesis["attention"].cpu().t()
                pairs = Alignment(self.extract_alignment(attention, source, tokens, self.pad, self.eos))
                pairs.source_length = int((source.ne(self.pad) & source.ne(self.eos)).sum())
                pairs.written = self.written[row] if self.written else None
                hypothesis["alignment"] = pairs
        return found

    kind.written = None


@patch("fairseq_cli.interactive")
def keep_unknown_source_words(module: Any) -> None:
    """Every torch: of a source word that is unknown nothing is left by the time it could be copied."""

    @wrap(module, "make_batches")
    def make_batches(plain: Any, lines: Any, cfg: Any, task: Any, max_positions: Any, encode_fn: Any) -> Any:
        from fairseq.sequence_generator import SequenceGeneratorWithAlignment

        try:
            for batch in plain(lines, cfg, task, max_positions, encode_fn):
                # It is translated before the next one is asked for.
                written = [encode_fn(lines[index]).split() for index in batch.ids.tolist()]
                SequenceGeneratorWithAlignment.written = written
                yield batch
        finally:  # whatever is translated next in this process was not read here
            SequenceGeneratorWithAlignment.written = None


@patch("fairseq.tasks.fairseq_task")
def align_to_replace_unknown_words(module: Any) -> None:
    """Every torch: --replace-unk asks for no alignment, and fails for want of it."""

    @wrap(module.FairseqTask, "build_generator")
    def build_generator(plain: Any, self: Any, models: Any, args: Any, *rest: Any, **kwargs: Any) -> Any:
        if getattr(args, "replace_unk", None) is not None:
            from fairseq.sequence_generator import SequenceGeneratorWithAlignment

            for flag, given in (
                ("--score-reference", getattr(args, "score_reference", False)),
                ("--print-alignment soft", getattr(args, "print_alignment", None) == "soft"),
            ):
                if given:
                    raise FlagError(f"--replace-unk cannot be combined with {flag}")
            if not rest:
                kwargs["seq_gen_cls"] = kwargs.get("seq_gen_cls") or SequenceGeneratorWithAlignment
        return plain(self, models, args, *rest, **kwargs)


@patch("fairseq.utils")
def read_alignment_dictionaries(module: Any) -> None:
    """Every torch: --replace-unk without a file looks for one called "@@ "; a bad line has no number."""

    def load_align_dict(replace_unk: str | None) -> dict[str, str] | None:
        if replace_unk is None or replace_unk in ("", "@@ "):  # "@@ " stands for no value given
            return None if replace_unk is None else {}
        try:
            with open(replace_unk, encoding="utf-8") as lines:
                pairs = [line.split() for line in lines]
        except (OSError, UnicodeError) as error:
            raise UserError(f"--replace-unk {replace_unk}: {error}") from None
        for number, pair in enumerate(pairs, 1):
            if len(pair) < 2:
                rule = "must hold a word and its translation, separated by a space"
                raise UserError(f"--replace-unk {replace_unk}: line {number} {rule}")
        return {pair[0]: pair[1] for pair in pairs}

    module.load_align_dict = load_align_dict


@patch("fairseq.utils")
def replace_unknown_words(module: Any) -> None:
    """Every torch: pairs of an alignment are taken for positions, so --replace-unk fails."""

    @wrap(module, "post_process_prediction")
    def post_process_prediction(
        plain: Any, hypo_tokens: Any, src_str: str, alignment: Any, align_dict: Any, tgt_dict: Any,
        remove_bpe: Any = None, extra_symbols_to_ignore: Any = None,
    ) -> Any:  # fmt: skip
        if align_dict is None:
            rest = (align_dict, tgt_dict, remove_bpe, extra_symbols_to_ignore)
            return plain(hypo_tokens, src_str, alignment, *rest)
        from fairseq.data import data_utils

        tokens = [token for token in hypo_tokens.tolist() if token not in (tgt_dict.pad(), tgt_dict.eos())]
        words, source = [tgt_dict[token] for token in tokens], alignment.written or src_str.split()
        before = alignment.source_length - len(source)  # tokens of no word, such as a language's
        for place, target in alignment:
            if tokens[target] == tgt_dict.unk() and 0 <= place - before < len(source):
                word = source[place - before]
                words[target] = align_dict.get(word, word)
        left_out = {tgt_dict.bos(), *(extra_symbols_to_ignore or ())}
        kept = [word for token, word in zip(tokens, words, strict=True) if token not in left_out]
        text = data_utils.post_process(" ".join(kept), remove_bpe)
        return tgt_dict.encode_line(text, add_if_not_exist=True), text, alignment


@patch("fairseq.data.base_wrapper_dataset")
def original_text_through_wrappers(module: Any) -> None:
    """Every torch: a data set that is cut or prefixed does not give the text as it was written."""
    module.BaseWrapperDataset.get_original_text = lambda self, index: self.dataset.get_original_text(index)


@patch("fairseq_cli.generate", "fairseq_cli.interactive")
def check_what_words_are_replaced_by(module: Any) -> None:
    """Every torch: --replace-unk with what turns pieces into words puts wrong words in their place."""
    interactive = module.__name__.endswith("interactive")

    @wrap(module, "main")
    def main(plain: Any, cfg: Any) -> Any:
        if hasattr(cfg, "generation") and cfg.generation.replace_unk is not None:
            pieces = {"--bpe": cfg.bpe, "--tokenizer": cfg.tokenizer}
            if interactive:
                pieces["--post-process"] = cfg.common_eval.post_process
            elif cfg.dataset.dataset_impl != "raw":
                raise FlagError(
                    "--replace-unk needs the words as they were written: binarise with fairseq-preprocess"
                    f" --dataset-impl raw and give that here too, got {cfg.dataset.dataset_impl}"
                )
            for flag in [flag for flag, given in pieces.items() if given is not None]:
                raise FlagError(f"--replace-unk cannot be combined with {flag}: it copies words, not pieces")
        return plain(cfg)
