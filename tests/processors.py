"""Processors of tiny vision-language models, made from transformers' own without downloads.

processor_of(name)     Qwen2-VL's or Gemma 3's processor with a token per letter, and a chat template
picture(color, ...)    a small image of one colour
"""

from __future__ import annotations

from typing import Any

import transformers
from hf_models import IMAGE, IMAGE_END, IMAGE_START, VIDEO, VOCAB
from PIL import Image
from tokenizers import Tokenizer, decoders, models
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

LETTERS = ["<pad>", "<bos>", "<eos>", *"abcdefghijklmnopqrstuvwxyz +?\n:"]
QWEN = {"<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO, "<|vision_start|>": IMAGE_START, "<|vision_end|>": IMAGE_END}
GEMMA = {"<image_soft_token>": IMAGE, "<start_of_image>": IMAGE_START, "<end_of_image>": IMAGE_END}
TEMPLATE = """{% for message in messages %}{{ message.role }}:{% if message.content is string %}{{ message.content }}
{%- else %}{% for part in message.content %}{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}
{%- endfor %}{% endif %}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""


class TakesPromptsWithoutImages:
    """A processor that takes None for a prompt without images, which TRL passes and transformers 5.23 refuses."""

    def prepare_inputs_layout(self, images=None, **inputs):
        if images is not None:
            images = [image or [] for image in images]
        return super().prepare_inputs_layout(images=images, **inputs)


class GemmaProcessor(TakesPromptsWithoutImages, transformers.Gemma3Processor):
    """Gemma 3's processor."""


class ImageOnlyQwenProcessor(TakesPromptsWithoutImages, transformers.Qwen2VLProcessor):
    """Qwen2-VL's processor without its video processor, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument_name == "video_processor":
            return None
        return super().check_argument_for_proper_class(argument_name, argument)


def processor_of(name: str) -> transformers.ProcessorMixin:
    """Return the processor of a model of hf_models: "gemma3_vl", or one whose name begins with "qwen"."""
    if name == "gemma3_vl":
        tokens = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
        return GemmaProcessor(
            image_processor=Gemma3ImageProcessorPil(size={"height": 28, "width": 28}),
            tokenizer=_tokenizer(GEMMA, tokens),
            image_seq_length=4,
            chat_template=TEMPLATE.replace("IMAGE", "<start_of_image>"),
        )
    tokens = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    tokens |= {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
    sizes = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    return ImageOnlyQwenProcessor(
        image_processor=Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=112 * 112, **sizes),
        tokenizer=_tokenizer(QWEN, tokens),
        chat_template=TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )


def _tokenizer(special: dict[str, int], names: dict[str, str]) -> transformers.PreTrainedTokenizerFast:
    vocabulary = {letter: n for n, letter in enumerate(LETTERS)}
    vocabulary |= {f"<unused{n}>": n for n in range(len(LETTERS), VOCAB)} | special
    letters = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    letters.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",  # or TRL's token types of images would not be at its tokens
        extra_special_tokens=names,
    )


def picture(color: tuple[int, int, int], width: int = 56, height: int = 56) -> Image.Image:
    """Return an image of one colour with a dark corner."""
    image = Image.new("RGB", (width, height), color)
    image.paste((20, 20, 20), (0, 0, width // 3, height // 2))
    return image
