"""Train a tokenizer on the training captions of a caption table: SentencePiece BPE, saved for `AutoTokenizer`.

    python -m data_scripts.train_tokenizer data/flickr8k --output_dir data/flickr8k_tokenizer --vocab_size 8000

What is saved is a `tokenizer.json` that gives SentencePiece's ids and needs neither sentencepiece nor protobuf to load.
"""

import argparse
import io
from collections.abc import Iterable

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from data_scripts.load import load_captions
from system.errors import UserError, one_line_errors
from system.files import atomic_folder

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
MAX_CAPTION_BYTES = 2**20  # SentencePiece would leave longer captions out in silence; its own limit is 4,192
SPACE = "▁"  # U+2581, SentencePiece's mark for a space


def train_tokenizer(
    captions: Iterable[str], vocab_size: int = 8000, model_max_length: int | None = None
) -> PreTrainedTokenizerFast:
    """Train a SentencePiece BPE model and return it as a fast tokenizer with the same ids.

    It ends every caption with EOS, under truncation too, and begins none with BOS: the captioner's first slot carries
    the image.

    Args:
        captions: Training captions only; a validation caption would leak its words.
        vocab_size: Tokens at most, the four special ones included. Fewer where the captions have no more.
        model_max_length: Tokens of a caption, EOS included, that `truncation=True` keeps.

    Raises:
        ValueError: There is no caption, or `vocab_size` is too small for the captions' characters.
    """
    if model_max_length is not None and model_max_length < 2:
        raise UserError(f"a longest caption of {model_max_length} tokens has no room for a word and its end")
    return as_fast_tokenizer(train_sentencepiece(captions, vocab_size), model_max_length)


def train_sentencepiece(captions: Iterable[str], vocab_size: int) -> bytes:
    """Train SentencePiece's BPE and return its serialized model.

    Raises:
        ValueError: There is no caption, or `vocab_size` is too small for the captions' characters.
    """
    captions = list(captions)
    if not any(caption.strip() for caption in captions):
        raise UserError("there is no caption to train a tokenizer on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(captions),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,  # fewer tokens, where the text has no more, instead of an error
            character_coverage=1.0,  # no character of the training captions is unknown
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
        raise UserError(f"no tokenizer of {vocab_size} tokens can be trained on these captions: {error}") from error
    return model.getvalue()


def as_fast_tokenizer(sentencepiece_model: bytes, model_max_length: int | None = None) -> PreTrainedTokenizerFast:
    """Rewrite a SentencePiece BPE model as a `tokenizers` one that gives the same ids and the same decoded text."""
    model = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_model)
    vocabulary = {piece.piece: token_id for token_id, piece in enumerate(model.pieces)}
    tokenizer = Tokenizer(
        # SentencePiece gives one UNK for several unknown characters in a row.
        models.BPE(vocab=vocabulary, merges=find_merges(vocabulary), unk_token=UNK, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [
            # SentencePiece's own table is looked up for single characters only; the composing that it does, too, of
            # accents, kana and Hangul is done before, and after it for what it makes of half-width kana.
            normalizers.NFC(),
            normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap),
            normalizers.NFC(),
            normalizers.Replace(Regex(f"[ {SPACE}]+"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
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
        clean_up_tokenization_spaces=False,  # it would draw " ," together where the captions have it apart
        split_special_tokens=True,  # "</s>" in a caption is four characters, not its end
        **({} if model_max_length is None else {"model_max_length": model_max_length}),
    )


def check_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """See to it that a tokenizer somebody names can begin, end and pad a caption.

    Raises:
        ValueError: It lacks a token for that.
    """
    for name in ("bos_token", "eos_token", "pad_token"):
        if getattr(tokenizer, name) is None:
            raise UserError(
                f"--tokenizer_name {tokenizer.name_or_path}: it has no {name}, so that no caption can be made of its tokens; "
                "give another one, or add the token"
            )


def find_merges(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Return BPE's merges from the pieces that they made; SentencePiece numbers pieces in the order of its merges."""
    merges = []
    for piece in sorted(vocabulary, key=vocabulary.get):
        if piece in (PAD, BOS, EOS, UNK):
            continue
        # SentencePiece joins any two pieces that make a piece, not only the two it was first made of.
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((left, right))
    return merges


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="caption table saved by a command of data_scripts, other data set, or scenes")
    parser.add_argument("--output_dir", required=True, help="where the tokenizer is saved")
    parser.add_argument("--vocab_size", type=int, default=8000, help="tokens at most")
    parser.add_argument("--max_length", type=int, help="tokens of a caption, EOS included, kept under truncation")
    arguments = parser.parse_args(argv)
    with one_line_errors():
        dataset = load_captions(arguments.source)
        if "train" not in dataset:
            raise UserError(f"{arguments.source} has no training captions")
        captions = [caption for captions in dataset["train"]["captions"] for caption in captions]
        tokenizer = train_tokenizer(captions, arguments.vocab_size, arguments.max_length)
        with atomic_folder(arguments.output_dir) as (folder, _):
            tokenizer.save_pretrained(folder)
        print(f"{arguments.output_dir}: {len(tokenizer):,} tokens, trained on {len(captions):,} captions")
        if len(tokenizer) < arguments.vocab_size:
            print(f"fewer than {arguments.vocab_size:,} tokens: the captions have no more")


if __name__ == "__main__":
    main()
