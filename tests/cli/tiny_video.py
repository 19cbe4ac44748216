"""A tiny pipeline of the true class that makes videos, as a folder that plain diffusers loads."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel


def write_wan(folder: Path) -> Path:
    """A WanPipeline of about a megabyte; pixels in multiples of 16."""
    torch.manual_seed(2)
    words = {word: index for index, word in enumerate(("<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"))}
    letters = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )
    text_config = UMT5Config(vocab_size=len(words), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    transformer = WanTransformer3DModel(
        in_channels=16, out_channels=16, num_layers=2, attention_head_dim=12, num_attention_heads=3, text_dim=16,
        freq_dim=16, ffn_dim=32, rope_max_seq_len=32,
    )  # fmt: skip
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(text_config).eval(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    )
    pipe.save_pretrained(folder)
    return folder
