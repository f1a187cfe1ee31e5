"""Tiny vision-language models with random weights, and a small set of questions on pictures in the shape of GQA."""

import io
import json
from pathlib import Path
from typing import Any

from randopt.engines.vision import images_only

WORDS = ["What", "colour", "is", "it", "?", "Is", "red", "blue", "green", "yes", "no", "left", "Answer", "in", "box"]
SIDE = 28  # pixels of a tiny model's picture
FAMILIES = ("qwen2_5_vl", "llava", "idefics3")

_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.5,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 14,
    "image_size": SIDE,
    "initializer_range": 0.5,
}
# Messages whose contents are lists of parts, as vision-language models take them.
_TEMPLATE = (
    "{% for message in messages %}<user> {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def build_tiny_vision_model(folder: Path, family: str, dtype: str = "float32", **text: Any) -> Path:
    """A checkpoint folder with a two-layer language model behind a two-layer vision tower of `family`.

    The weights are a fixed function of a seed; its answers are nonsense, but they depend on the picture. `text`:
    settings of the language model.
    """
    import torch

    torch.manual_seed(0)
    processor, model = {"qwen2_5_vl": _qwen, "llava": _llava, "idefics3": _idefics}[family]({**_TEXT, **text})
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and "norm" not in name:  # loud enough for the picture to be heard
            torch.nn.init.normal_(weight, std=0.5)
    folder.mkdir(parents=True, exist_ok=True)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def picture(colour: tuple[int, int, int], size: tuple[int, int] = (SIDE, SIDE), kind: str = "PNG") -> bytes:
    """An encoded picture of one colour with a dark corner."""
    from PIL import Image

    image = Image.new("RGB", size, colour)
    image.paste((0, 0, 40), (0, 0, size[0] // 2, size[1] // 3))
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def write_questions(folder: Path, count: int = 12, sizes: tuple[tuple[int, int], ...] = ((SIDE, SIDE),)) -> Path:
    """questions.jsonl with the columns question, answer and image (a path relative to the file)."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    colours = {"red": (220, 30, 20), "green": (30, 200, 40), "blue": (20, 40, 230)}
    rows = []
    for index in range(count):
        word, (red, green, blue) = list(colours.items())[index % 3]
        name = f"pictures/{index}.{'jpg' if index % 2 else 'png'}"
        shade = (max(0, red - index), max(0, green - index), max(0, blue - index))
        kind = "JPEG" if index % 2 else "PNG"
        (folder / name).write_bytes(picture(shade, sizes[index % len(sizes)], kind))
        rows.append({"question": ("What colour is it ?", f"Is it {word} ?")[index % 2], "image": name})
        rows[-1]["answer"] = (word, "yes")[index % 2]
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def task_file(folder: Path, source: dict[str, Any], splits: dict[str, Any], max_tokens: int = 6) -> Path:
    """A task of questions with a picture each."""
    import yaml

    content = [{"type": "image", "column": "image"}, {"type": "text", "text": " {question} Answer in box"}]
    task = {
        "version": 1,
        "source": source,
        "prompt": [{"role": "user", "content": content}],
        "reference": "answer",
        "splits": splits,
        "max_tokens": max_tokens,
        "scorer": "gqa",
    }
    path = folder / "pictures.yaml"
    path.write_text(yaml.safe_dump(task))
    return path


def _tokenizer(image: str, *special: str) -> Any:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<eos>", *WORDS, *map(str, range(10))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>", padding_side="left"
    )
    marks = ["<user>", "<assistant>", image, *special]
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(mark) for mark in marks]})
    return tokenizer


def _image_processor(family: str, **settings: Any) -> Any:
    """The family's image processor on Pillow; torchvision is not needed."""
    import importlib

    name = {"qwen2_vl": "Qwen2VL", "clip": "CLIP", "idefics3": "Idefics3"}[family]
    module = importlib.import_module(f"transformers.models.{family}.image_processing_pil_{family}")
    return getattr(module, f"{name}ImageProcessorPil")(**settings)


def _qwen(text: dict[str, Any]) -> tuple[Any, Any]:
    import transformers as hf

    tokenizer = _tokenizer("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad")}
    images = _image_processor("qwen2_vl", patch_size=14, merge_size=2, min_pixels=28 * 28, max_pixels=56 * 84)
    mark = "<|vision_start|><|image_pad|><|vision_end|>"
    processor = images_only(hf.Qwen2_5_VLProcessor)(
        image_processor=images,
        tokenizer=tokenizer,
        chat_template=_TEMPLATE.replace("IMAGE", mark),
    )
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = hf.Qwen2_5_VLConfig(
        text_config={**text, "vocab_size": len(tokenizer), "rope_parameters": rope, "tie_word_embeddings": True},
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "window_size": 56,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    return processor, hf.Qwen2_5_VLForConditionalGeneration(config)


def _llava(text: dict[str, Any]) -> tuple[Any, Any]:
    import transformers as hf

    tokenizer = _tokenizer("<image>")
    size = {"height": SIDE, "width": SIDE}
    images = _image_processor("clip", size={"shortest_edge": SIDE}, crop_size=size)
    processor = hf.LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE.replace("IMAGE", "<image>"),
    )
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**text, vocab_size=len(tokenizer)),
        vision_config=hf.CLIPVisionConfig(**_TOWER, projection_dim=16),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    return processor, hf.LlavaForConditionalGeneration(config)


def _idefics(text: dict[str, Any]) -> tuple[Any, Any]:
    import transformers as hf

    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
    tokenizer = _tokenizer("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *tiles)
    edge = {"longest_edge": SIDE}
    images = _image_processor("idefics3", size={"longest_edge": 2 * SIDE}, max_image_size=edge)
    processor = hf.Idefics3Processor(
        image_processor=images,
        tokenizer=tokenizer,
        image_seq_len=1,
        chat_template=_TEMPLATE.replace("IMAGE", "<image>"),
    )
    config = hf.Idefics3Config(
        text_config=hf.LlamaConfig(**text, vocab_size=len(tokenizer)),
        vision_config=_TOWER,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=1,
    )
    return processor, hf.Idefics3ForConditionalGeneration(config)
