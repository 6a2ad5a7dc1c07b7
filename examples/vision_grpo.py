"""GRPO on pictures, on a CPU: a tiny Qwen2.5-VL learns to name the colour of squares and to count them.

    python examples/vision_grpo.py

The model starts from random weights. In an update each picture goes through the vision encoder once for a group of 16
answers. The curve of the reward is written to runs/vision_grpo.png.
"""

import random
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import flexpg

COLOURS = {"red": (210, 40, 40), "green": (40, 170, 60), "blue": (40, 80, 210), "yellow": (230, 200, 40)}
NUMBERS = ["one", "two", "three", "four"]
WORDS = ["<pad>", "<image>", "<video>", "<start>", "<end>", "colour?", "how many?", *COLOURS, *NUMBERS]
TOKEN = {word: token for token, word in enumerate(WORDS)}
PICTURES, GROUP_SIZE, STEPS = 32, 16, 120
CELL = 28  # pixels; one token of the language model


def make_model() -> Qwen2_5_VLForConditionalGeneration:
    """Return a model of 0.2 million parameters with random weights."""
    width = {"hidden_size": 64, "intermediate_size": 128}
    config = Qwen2_5_VLConfig(
        text_config=width
        | {
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": len(WORDS),
            "bos_token_id": None,
            "eos_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
        },
        vision_config=width | {"depth": 2, "num_heads": 4, "out_hidden_size": 64, "fullatt_block_indexes": [1]},
        image_token_id=TOKEN["<image>"],
        video_token_id=TOKEN["<video>"],
        vision_start_token_id=TOKEN["<start>"],
        vision_end_token_id=TOKEN["<end>"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(config)


def draw(colour: str, count: int) -> Image.Image:
    """Return a picture of one to four squares of a colour."""
    picture = Image.new("RGB", (2 * CELL, 2 * CELL), (235, 235, 235))
    for cell in random.sample(range(4), count):
        left, top = CELL * (cell % 2), CELL * (cell // 2)
        ImageDraw.Draw(picture).rectangle([left + 5, top + 5, left + 22, top + 22], fill=COLOURS[colour])
    return picture


def problem(processor: Qwen2VLImageProcessorPil) -> tuple[list[int], dict[str, torch.Tensor], int]:
    """Return the token ids of a prompt, what the processor returns beside them, and the right answer."""
    colour, count = random.choice(list(COLOURS)), random.randint(1, 4)
    question = random.choice(["colour?", "how many?"])
    words = ["<start>", *["<image>"] * 4, "<end>", question]
    answer = colour if question == "colour?" else NUMBERS[count - 1]
    inputs = dict(processor(draw(colour, count), return_tensors="pt"))
    inputs["mm_token_type_ids"] = torch.tensor([[int(word == "<image>") for word in words]])
    return [TOKEN[word] for word in words], inputs, TOKEN[answer]


def main() -> None:
    """Train, print the reward, and draw its curve."""
    random.seed(0)
    model = flexpg.enable(make_model())
    processor = Qwen2VLImageProcessorPil(min_pixels=CELL**2, max_pixels=(2 * CELL) ** 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    curve = []
    for step in range(STEPS):
        prompts, inputs, right = zip(*(problem(processor) for _ in range(PICTURES)), strict=True)
        batch = {name: torch.cat([row[name] for row in inputs]) for name in inputs[0]}
        mask = torch.ones(PICTURES, len(prompts[0]), dtype=torch.int64)
        with torch.no_grad():  # answers have one token; `model.generate` would sample longer ones
            logits = model(input_ids=torch.tensor(prompts), attention_mask=mask, **batch).logits[:, -1]
            logits[:, [TOKEN["<image>"], TOKEN["<video>"]]] = -torch.inf
            answers = logits.softmax(-1).multinomial(GROUP_SIZE, replacement=True)  # [PICTURES, GROUP_SIZE]
        rewards = (answers == torch.tensor(right)[:, None]).float()
        rollouts = flexpg.Rollouts.from_groups(prompts, answers[..., None], rewards, prompt_inputs=inputs)
        advantages = flexpg.group_advantages(rollouts)
        for micro_batch, logprobs in flexpg.packed_logprobs(model, rollouts, max_tokens=4096):
            loss = flexpg.grpo_loss(
                logprobs,
                advantages[micro_batch.indices],
                micro_batch.loss_mask,
                total_tokens=rollouts.num_loss_tokens,
            )
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(float(rewards.mean()))
        if step % 10 == 9:
            tree = micro_batch.tree
            print(
                f"step {step + 1:3}  reward {sum(curve[-10:]) / 10:.2f}  "
                f"{tree.num_tokens} tokens encoded instead of {tree.baseline_tokens}"
            )
    draw_curve(curve)


def draw_curve(curve: list[float]) -> None:
    """Write the reward of every step, and its mean over ten, to runs/vision_grpo.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from flexpg.analysis.palette import BASELINE, LINE, REWARD

    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    axes.plot(range(1, len(curve) + 1), curve, color=LINE, label="reward of a step")
    means = [sum(curve[max(0, n - 9) : n + 1]) / min(10, n + 1) for n in range(len(curve))]
    axes.plot(range(1, len(curve) + 1), means, color=REWARD, label="mean of ten steps")
    axes.axhline(1 / 4, color=BASELINE, linestyle=":", label="guessing one of four answers")
    axes.set(xlabel="step", ylabel="mean reward", ylim=(0, 1.05), title="Naming and counting squares in pictures")
    axes.legend(frameon=False)
    Path("runs").mkdir(exist_ok=True)
    figure.savefig("runs/vision_grpo.png", dpi=150)
    print("wrote runs/vision_grpo.png")


if __name__ == "__main__":
    main()
