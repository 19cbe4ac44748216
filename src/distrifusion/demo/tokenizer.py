"""A CLIPTokenizer with its own small vocabulary: byte-level BPE learnt from captions."""

from collections import Counter
from itertools import pairwise

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from distrifusion.demo.dataset import sample_scenes
from distrifusion.demo.scenes import sample_caption

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 77
Word = tuple[str, ...]


def build_tokenizer(num_captions: int = 20_000, num_merges: int = 600) -> CLIPTokenizer:
    """Learn at most ``num_merges`` merges from sampled captions.

    Every byte is in the vocabulary, alone and as the end of a word, so any text has tokens; the end token has the
    highest id, which is where both old and new CLIPTextModel code looks for it.
    """
    rng = np.random.default_rng(11)
    captions = (sample_caption(scene, rng)[0] for scene in sample_scenes(num_captions, seed=11))
    counts = Counter(word for caption in captions for word in caption.replace(",", " , ").replace("-", " - ").split())
    merges = learn_merges(counts, num_merges)
    alphabet = sorted(ByteLevel.alphabet())
    tokens = alphabet + [byte + "</w>" for byte in alphabet] + ["".join(pair) for pair in merges] + [START, END]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def learn_merges(counts: Counter[str], num_merges: int) -> list[tuple[str, str]]:
    """Byte-pair encoding (Sennrich et al. 2016, algorithm 1): merge the most frequent pair, again and again."""
    words: dict[Word, int] = {(*word[:-1], word[-1] + "</w>"): count for word, count in counts.items()}
    merges: list[tuple[str, str]] = []
    while len(merges) < num_merges:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        words = {_merge(word, best): count for word, count in words.items()}
    return merges


def _merge(word: Word, pair: tuple[str, str]) -> Word:
    merged: list[str] = []
    i = 0
    while i < len(word):
        joined = word[i : i + 2] == pair
        merged.append("".join(pair) if joined else word[i])
        i += 2 if joined else 1
    return tuple(merged)
