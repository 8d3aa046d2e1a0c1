"""Tiny tokenizers, built on the spot."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

CORPUS = ["The cat sat on the mat.", "naïve café, 東京 and 😀 again", "don't  stop\n\tnow", "aaaa bbbb aaaa"]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level() -> Tokenizer:
    """Like GPT-2, SmolLM or Qwen."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("Ġ", "c"), ("Ã", "©"), ("ð", "Ł"), ("æ", "Ŀ")]
    vocab = {token: at for at, token in enumerate([*alphabet, *("".join(merge) for merge in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    _add(tokenizer)
    return tokenizer


def sentencepiece(*, strip: bool = True) -> Tokenizer:
    """Like Llama 2 (a space before everything, stripped again) or Gemma (nothing stripped)."""
    words = ["▁", "a", "b", "▁a", "▁the", "é", "▁▁", "cat", "ab"]
    vocab = {token: at for at, token in enumerate(["<unk>", *BYTE_TOKENS, *words])}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=[("▁", "a"), ("a", "b"), ("▁", "▁")], unk_token="<unk>", byte_fallback=True)
    )
    scheme = "first" if strip else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    _add(tokenizer)
    return tokenizer


def unigram() -> Tokenizer:
    """Metaspace decoding, no bytes."""
    words = ["<unk>", "▁", "a", "b", "▁a", "▁the", "é", "▁▁", "cat", "s"]
    tokenizer = Tokenizer(models.Unigram([(word, -float(at)) for at, word in enumerate(words)], 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    _add(tokenizer)
    return tokenizer


def wordpiece() -> Tokenizer:
    words = ["[UNK]", "the", "cat", "##s", "##ting", ".", "don", "'", "t"]
    tokenizer = Tokenizer(models.WordPiece({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    _add(tokenizer)
    return tokenizer


def with_bos(tokenizer: Tokenizer) -> Tokenizer:
    """Puts <s> before every text."""
    bos = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return tokenizer


def _add(tokenizer: Tokenizer) -> None:
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("<tool call>", normalized=False), AddedToken("東京", normalized=False)])
