"""Train a tokenizer on the training captions of a caption table: SentencePiece BPE, saved for `AutoTokenizer`.

    python -m data_scripts.train_tokenizer data/flickr8k --output_dir data/flickr8k_tokenizer --vocab_size 8000

Saves a `tokenizer.json` that encodes to SentencePiece's token IDs and loads without sentencepiece and protobuf.
"""

import argparse
import io
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from system.errors import UserError, one_line_errors
from system.files import atomic_folder

if TYPE_CHECKING:  # transformers and datasets are imported late, so that --help need not wait for them
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
MAX_CAPTION_BYTES = 2**20  # SentencePiece silently drops longer captions; its own limit is 4,192
MAX_CAPTIONS = 5_000_000  # SentencePiece keeps in memory what it trains on
SPACE = "▁"  # U+2581, SentencePiece's mark for a space
# Runs of spaces, line ends and control characters; not those that join or part words within a script.
BLANKS = f"[\x00-\x20\x7f-\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000{SPACE}]+"


def train_tokenizer(
    captions: Iterable[str], vocab_size: int = 8000, model_max_length: int | None = None
) -> "PreTrainedTokenizerFast":
    """Train a SentencePiece BPE model and return it as a fast tokenizer with the same token IDs.

    It appends EOS to every caption, under truncation too, and prepends no BOS: the captioner's first position carries the
    image.

    Args:
        captions: Training captions only; those of other splits would leak their words.
        vocab_size: Maximum vocabulary size, the four special tokens included; smaller if the captions do not yield as many.
        model_max_length: Maximum caption length in tokens, EOS included, under `truncation=True`.

    Raises:
        UserError: There is no caption, or `vocab_size` is too small for the captions' characters.
    """
    if model_max_length is not None and model_max_length < 2:
        raise UserError(f"--max_length {model_max_length} has no room for a token and EOS: give 2 or more")
    return as_fast_tokenizer(train_sentencepiece(captions, vocab_size), model_max_length)


def normalize(text: str) -> str:
    """The text as the tokenizer encodes it: Unicode's composed form (NFC), as in caption tables, and single spaces.

    Nothing else may change, because captions are scored as they are written: SentencePiece's default (NFKC and more) would turn
    "½" into "1⁄2" and full-width digits into others, take Thai's sara am apart, and drop the joiners of Persian and Hindi.
    """
    return re.sub(BLANKS, " ", unicodedata.normalize("NFC", text)).strip(" ")


def train_sentencepiece(captions: Iterable[str], vocab_size: int) -> bytes:
    """Train SentencePiece's BPE and return its serialized model.

    Raises:
        UserError: There is no caption, or `vocab_size` is too small for the captions' characters.
    """
    counts = {"captions": 0, "texts": 0}

    def sentences() -> Iterator[str]:
        for caption in captions:
            counts["captions"] += 1
            counts["texts"] += bool(caption.strip())
            if counts["captions"] <= MAX_CAPTIONS:
                yield normalize(caption)

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,  # a smaller vocabulary instead of an error where the captions do not yield as many tokens
            character_coverage=1.0,  # no character of the training captions is unknown
            normalization_rule_name="identity",  # `normalize` does it; the default, NFKC, changes what scripts need
            max_sentence_length=MAX_CAPTION_BYTES,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            pad_piece=PAD,
            bos_piece=BOS,
            eos_piece=EOS,
            unk_piece=UNK,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if not counts["texts"]:
            raise UserError("no captions to train a tokenizer on") from error
        raise UserError(f"a tokenizer of {vocab_size} tokens cannot be trained on these captions: {error}") from error
    if counts["captions"] > MAX_CAPTIONS:
        print(f"the tokenizer is trained on the first {MAX_CAPTIONS:,} of {counts['captions']:,} captions")
    return model.getvalue()


def as_fast_tokenizer(sentencepiece_model: bytes, model_max_length: int | None = None) -> "PreTrainedTokenizerFast":
    """Rewrite a SentencePiece BPE model as a `tokenizers` one, with `normalize` in front.

    It encodes to the same token IDs and decodes to the same text, " ⁇ " for an unknown token; `skip_special_tokens` drops it.
    """
    from transformers import PreTrainedTokenizerFast

    model = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_model)
    vocabulary = {piece.piece: token_id for token_id, piece in enumerate(model.pieces)}
    tokenizer = Tokenizer(
        # SentencePiece encodes several unknown characters in a row as one UNK.
        models.BPE(vocab=vocabulary, merges=find_merges(vocabulary), unk_token=UNK, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(BLANKS), " "), normalizers.Replace(Regex("^ | $"), "")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(UNK, " ⁇ "), decoders.Metaspace(replacement=SPACE, prepend_scheme="always")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, vocabulary[EOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="right",
        clean_up_tokenization_spaces=False,  # would join " ," where the captions have it apart
        split_special_tokens=True,  # "</s>" in a caption is text, not EOS
        **({} if model_max_length is None else {"model_max_length": model_max_length}),
    )


def check_special_tokens(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Check that a user's tokenizer has the special tokens that captions need.

    Raises:
        UserError: It lacks BOS, EOS or the padding token.
    """
    for name in ("bos_token", "eos_token", "pad_token"):
        if getattr(tokenizer, name) is None:
            raise UserError(
                f"--tokenizer_name {tokenizer.name_or_path}: it has no {name}, which captions need; add one, or choose another "
                "tokenizer"
            )


def find_merges(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Recover BPE's merges from their results: SentencePiece numbers pieces in the order of its merges."""
    merges = []
    for piece in sorted(vocabulary, key=vocabulary.get):
        if piece in (PAD, BOS, EOS, UNK):
            continue
        # SentencePiece merges any two pieces that form a piece, not only the pair it was learned from.
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((left, right))
    return merges


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="caption table saved by a command of data_scripts, any other dataset, or scenes")
    parser.add_argument("--output_dir", required=True, help="folder for the tokenizer; must be new or empty")
    parser.add_argument(
        "--vocab_size",
        type=int,
        default=8000,
        help="maximum vocabulary size in tokens, special tokens included (default: %(default)s)",
    )
    parser.add_argument(
        "--max_length",
        type=int,
        help="maximum caption length in tokens, EOS included, under truncation (default: none)",
    )
    arguments = parser.parse_args(argv)
    with one_line_errors():
        from data_scripts.caption_texts import CaptionTexts
        from data_scripts.load import load_captions

        dataset = load_captions(arguments.source)
        if "train" not in dataset:
            raise UserError(f"{arguments.source} has no training captions")
        captions = CaptionTexts(dataset["train"])
        tokenizer = train_tokenizer(captions, arguments.vocab_size, arguments.max_length)
        with atomic_folder(arguments.output_dir) as (folder, _):
            tokenizer.save_pretrained(folder)
        print(f"{arguments.output_dir}: {len(tokenizer):,} tokens, trained on {len(captions):,} captions")
        if len(tokenizer) < arguments.vocab_size:
            print(f"fewer than {arguments.vocab_size:,} tokens: the captions do not yield more")


if __name__ == "__main__":
    main()
