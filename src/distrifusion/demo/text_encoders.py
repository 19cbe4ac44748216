"""Stage ``text``: two small CLIP text encoders that learn to read the attributes out of captions, then stay frozen.

Both are trained where SDXL takes its conditioning from: the penultimate hidden states of each (the tokens that
cross-attention sees), and the projected end-of-text state of the second (the pooled embedding added to the time).
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from distrifusion.demo.dataset import sample_scenes
from distrifusion.demo.scenes import ATTRIBUTES, sample_caption
from distrifusion.demo.tokenizer import MAX_TOKENS, build_tokenizer
from distrifusion.demo.training import Schedule, TrainingLog, device, fit

WIDTH = 128
UNNAMED = -1
"""Label of an attribute that a caption does not name; the readers answer it with one class more."""


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """Three layers of width 128 and four heads, 0.75M parameters."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class Reader(nn.Module):
    """Reads every attribute from a set of tokens (B, L, WIDTH): one learnt query each, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(ATTRIBUTES), WIDTH) / WIDTH**0.5)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, len(classes) + 1) for classes in ATTRIBUTES.values())

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """Logits (B, classes + 1) of each attribute."""
        read = (self.queries @ tokens.transpose(1, 2)).softmax(dim=-1) @ tokens
        return [head(read[:, i]) for i, head in enumerate(self.heads)]


class CaptionModel(nn.Module):
    """Both encoders and the three readers that train them: tokens of one, tokens of two, pooled embedding of two."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.one = CLIPTextModel(config)
        self.two = CLIPTextModelWithProjection(config)
        self.readers = nn.ModuleList(Reader() for _ in range(3))

    def forward(self, ids: Tensor) -> list[list[Tensor]]:
        """Attribute logits of each reader for token ids (B, L)."""
        tokens, pooled = encode_tokens(self.one, self.two, ids)
        sources = (tokens[..., :WIDTH], tokens[..., WIDTH:], pooled[:, None])
        return [reader(source) for reader, source in zip(self.readers, sources, strict=True)]


def encode_tokens(one: CLIPTextModel, two: CLIPTextModelWithProjection, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What ``StableDiffusionXLPipeline.encode_prompt`` makes of token ids (B, L).

    Returns the tokens (B, L, 2 WIDTH) and the pooled embedding (B, WIDTH).
    """
    first = one(ids, output_hidden_states=True)
    second = two(ids, output_hidden_states=True)
    return torch.cat((first.hidden_states[-2], second.hidden_states[-2]), dim=-1), second.text_embeds


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids (B, 77) padded and cut as the pipeline does."""
    ids = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return ids.input_ids.to(device())


def train_text_encoders(out: Path, cache: Path, schedule: Schedule, log: TrainingLog) -> None:
    """Learn the vocabulary and both encoders; save them as the pipeline's four text folders under ``out``."""
    torch.manual_seed(1)
    tokenizer = build_tokenizer()
    model = CaptionModel(text_config(tokenizer)).to(device())

    def loss_of_step(_step: int, rng: np.random.Generator) -> tuple[Tensor, int]:
        captions, labels = caption_batch(rng, 48)
        ids = tokenize(tokenizer, captions)
        if rng.random() < 0.75:  # the model is causal: cutting common padding changes no other state, and is quicker
            ids = ids[:, : int((ids != tokenizer.pad_token_id).sum(dim=1).max()) + 2]
        answers = model(ids)
        losses = [F.cross_entropy(a, t) for answer in answers for a, t in zip(answer, targets(labels), strict=True)]
        return torch.stack(losses).mean(), len(captions)

    fit("text", model, loss_of_step, schedule, cache / "text.pt", log)
    log.write(stage="text", accuracy=_accuracy(model.eval(), tokenizer))
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer.save_pretrained(out / name)
    model.one.save_pretrained(out / "text_encoder")
    model.two.save_pretrained(out / "text_encoder_2")


def targets(labels: Tensor) -> list[Tensor]:
    """Class targets (B) of each attribute from labels (B, A), ``UNNAMED`` moved to the class past the last."""
    sizes = [len(classes) for classes in ATTRIBUTES.values()]
    return [torch.where(labels[:, i] == UNNAMED, size, labels[:, i]) for i, size in enumerate(sizes)]


def caption_batch(rng: np.random.Generator, batch: int) -> tuple[list[str], Tensor]:
    """Captions and their labels (B, A); a third of them carry meaningless words, so that strange text does no harm."""
    captions, labels = [], []
    for scene in sample_scenes(batch, seed=int(rng.integers(2**31))):
        caption, named = sample_caption(scene, rng)
        captions.append(_distract(caption, rng) if rng.random() < 0.33 else caption)
        labels.append([c.index(named[a]) if a in named else UNNAMED for a, c in ATTRIBUTES.items()])
    return captions, torch.tensor(labels, device=device())


def _distract(caption: str, rng: np.random.Generator) -> str:
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(rng.choice(list(letters), rng.integers(2, 9))) for _ in range(rng.integers(1, 5))]
    split = int(rng.integers(len(words) + 1))
    return " ".join([*words[:split], caption, *words[split:]])


@torch.no_grad()
def _accuracy(model: CaptionModel, tokenizer: CLIPTokenizer) -> dict[str, list[float]]:
    """Share of captions read right, per attribute and reader, on captions that were not trained on."""
    captions, labels = caption_batch(np.random.default_rng(2**30), 512)
    answers = model(tokenize(tokenizer, captions))
    right = {name: [] for name in ATTRIBUTES}  # type: dict[str, list[float]]
    for answer in answers:
        for name, logits, target in zip(ATTRIBUTES, answer, targets(labels), strict=True):
            right[name].append(round(float((logits.argmax(-1) == target).float().mean()), 4))
    return right
