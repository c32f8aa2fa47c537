"""Small random models of Hugging Face in the layouts that its classes read, with SentencePiece models made here."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import sentencepiece
import torch
import transformers

_GERMAN = "der die das kleine grosse Hund Katze Haus Baum Garten sieht hat geht in den dem auf und nicht sehr alt neu"
_ENGLISH = "the small big dog cat house tree garden sees has goes into on and not very old new a an it is was"
GERMAN, ENGLISH = _GERMAN.split(), _ENGLISH.split()
SIZES = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
}  # fmt: skip


def lines(words: list[str], count: int = 300, seed: int = 1) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=draw.randint(3, 9))) + draw.choice([".", "?", ""]) for _ in range(count)]


def train_spm(texts: list[str], size: int, kind: str = "unigram", **settings) -> bytes:
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=content, vocab_size=size, model_type=kind, hard_vocab_limit=False,
        minloglevel=2, num_threads=1, **settings,
    )  # fmt: skip
    return content.getvalue()


def pieces_of(model: bytes) -> list[str]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return [processor.id_to_piece(i) for i in range(processor.get_piece_size())]


def randomise(network, seed: int = 5) -> None:
    """Weights far enough from 0 that what a position reads can be seen in its logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.requires_grad and "norm" not in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        if hasattr(network, "final_logits_bias"):
            network.final_logits_bias.copy_(torch.randn(network.final_logits_bias.shape, generator=generator))


def write(directory: Path, network, tokenizer_config: dict, files: dict[str, bytes]) -> Path:
    network.save_pretrained(directory)
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


def marian(
    directory: Path, *, languages: tuple[str, ...] = (), texts: tuple[list[str], list[str]] | None = None, **changes
) -> Path:
    """Helsinki-NLP's layout: </s> 0, <unk> 1, pieces of both sides, <pad> last, which the decoder starts with."""
    models = [train_spm(text, 90) for text in texts or (lines(GERMAN), lines(ENGLISH))]
    both = dict.fromkeys(piece for model in models for piece in pieces_of(model)[3:])
    numbers = {piece: i for i, piece in enumerate(["</s>", "<unk>", *languages, *sorted(both), "<pad>"])}
    pad = numbers["<pad>"]
    config = transformers.MarianConfig(**{
        **SIZES, "vocab_size": len(numbers), "decoder_vocab_size": len(numbers), "pad_token_id": pad, "eos_token_id": 0,
        "bos_token_id": 0, "decoder_start_token_id": pad, "forced_eos_token_id": 0, "scale_embedding": True,
        "static_position_embeddings": True, "activation_function": "swish", **changes,
    })  # fmt: skip
    torch.manual_seed(3)
    network = transformers.MarianMTModel(config)
    randomise(network)
    network.generation_config.bad_words_ids = [[pad]]
    files = {"source.spm": models[0], "target.spm": models[1], "vocab.json": json.dumps(numbers).encode()}
    return write(
        directory, network, {"tokenizer_class": "MarianTokenizer", "source_lang": "de", "target_lang": "en"}, files
    )


def marian_apart(directory: Path) -> Path:
    """Marian with a list of pieces, and a table, for each side; the source's <pad> is a word of the target's."""
    models = [train_spm(text, size) for text, size in ((lines(GERMAN), 90), (lines(GERMAN + ENGLISH), 140))]
    sides = [["</s>", "<unk>", *sorted(pieces_of(model)[3:]), "<pad>"] for model in models]
    numbers = [{piece: i for i, piece in enumerate(side)} for side in sides]
    source_pad, target_pad = (each["<pad>"] for each in numbers)
    assert source_pad < target_pad
    config = transformers.MarianConfig(**{
        **SIZES, "vocab_size": len(sides[0]), "decoder_vocab_size": len(sides[1]), "pad_token_id": source_pad,
        "eos_token_id": 0, "bos_token_id": 0, "decoder_start_token_id": target_pad, "forced_eos_token_id": 0,
        "scale_embedding": True, "static_position_embeddings": True, "activation_function": "swish",
        "share_encoder_decoder_embeddings": False, "tie_word_embeddings": False,
    })  # fmt: skip
    torch.manual_seed(3)
    network = transformers.MarianMTModel(config)
    randomise(network)
    network.generation_config.bad_words_ids = [[target_pad]]
    network.final_logits_bias[0, source_pad] -= 20  # its search takes that word for padding, wherever it has it
    files = {"source.spm": models[0], "target.spm": models[1]}
    files |= {"vocab.json": json.dumps(numbers[0]).encode(), "target_vocab.json": json.dumps(numbers[1]).encode()}
    settings = {"tokenizer_class": "MarianTokenizer", "source_lang": "de", "target_lang": "en", "separate_vocabs": True}
    return write(directory, network, settings, files)


def t5(directory: Path, **changes) -> Path:
    """Relative positions, a padded table, no <s>; tie_word_embeddings scales what the head reads."""
    texts = [*lines(GERMAN), *lines(ENGLISH), *["translate German to English:"] * 20]
    model = train_spm(texts, 140, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    config = transformers.T5Config(**{
        "vocab_size": len(pieces_of(model)) + 100 + 28, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2,
        "num_heads": 2, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, **changes,
    })  # fmt: skip
    torch.manual_seed(3)
    network = transformers.T5ForConditionalGeneration(config)
    randomise(network)
    return write(
        directory, network, {"tokenizer_class": "T5Tokenizer", "model_max_length": 64}, {"spiece.model": model}
    )


def mbart(directory: Path, *, fifty: bool = False, **changes) -> Path:
    """<s> <pad> </s> <unk>, pieces, languages, <mask>; mBART-50 forces the target's language behind </s>."""
    model = train_spm([*lines(GERMAN), *lines(ENGLISH)], 140)
    kind = transformers.MBart50Tokenizer if fifty else transformers.MBartTokenizer
    (directory).mkdir(parents=True, exist_ok=True)
    (directory / "sentencepiece.bpe.model").write_bytes(model)
    settings = {"tokenizer_class": kind.__name__, "model_max_length": 64}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = kind.from_pretrained(directory, src_lang="de_DE", tgt_lang="en_XX")
    config = transformers.MBartConfig(**{
        **SIZES, "vocab_size": len(tokenizer), "decoder_start_token_id": 2 if fifty else None, "scale_embedding": True,
        **changes,
    })  # fmt: skip
    torch.manual_seed(3)
    network = transformers.MBartForConditionalGeneration(config)
    randomise(network)
    return write(directory, network, settings, {})


def nllb(directory: Path, **changes) -> Path:
    """M2M100's network under NLLB's tokenizer, which is a BPE with the language in front."""
    model = train_spm([*lines(GERMAN), *lines(ENGLISH)], 140, kind="bpe")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "sentencepiece.bpe.model").write_bytes(model)
    settings = {
        "tokenizer_class": "NllbTokenizer", "model_max_length": 64,
        "additional_special_tokens": ["deu_Latn", "eng_Latn", "fra_Latn"],
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = transformers.NllbTokenizer.from_pretrained(directory)
    return write(directory, _m2m100(len(tokenizer), changes), settings, {})


def m2m100(directory: Path, **changes) -> Path:
    """Languages behind the list of pieces, as __de__."""
    model = train_spm([*lines(GERMAN), *lines(ENGLISH)], 140)
    numbers = {piece: i for i, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>", *pieces_of(model)[3:]])}
    files = {"sentencepiece.bpe.model": model, "vocab.json": json.dumps(numbers).encode()}
    settings = {"tokenizer_class": "M2M100Tokenizer", "model_max_length": 64}
    return write(directory, _m2m100(len(numbers) + 108, changes), settings, files)


def _m2m100(size: int, changes: dict):
    config = transformers.M2M100Config(**{
        **SIZES, "vocab_size": size, "decoder_start_token_id": 2, "scale_embedding": True, **changes,
    })  # fmt: skip
    torch.manual_seed(3)
    network = transformers.M2M100ForConditionalGeneration(config)
    randomise(network)
    return network
