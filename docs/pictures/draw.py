"""Draws the picture of the README: predictions of the two mini models, clean and attacked.

    python docs/pictures/draw.py

Writes ``attack_on_shapes.png`` beside this file: image, label, and for each model its prediction on the clean image and
on the adversarial image of SEA's ``mce`` attack at 8/255, with the share of correct pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import segbench
from segbench.data.sets.shapes import CLASS_NAMES
from segbench.protocol import SEA_V1

MODELS = {
    "clean training": "clean_convnext_mini_shapes",
    "PIR-AT": "pirat_convnext_mini_shapes",
}
COLOURS = ["ebebe6", "d64541", "3f7fbf", "f0b429", "269173", "7e57c2", "e9782d", "5a626e"]
PALETTE = np.array([tuple(bytes.fromhex(colour)) for colour in COLOURS], np.uint8)
IMAGES, EPS_255, SCALE, GAP, HEAD = (3, 7, 12, 21), 8, 3, 8, 44


def tile(pixels: np.ndarray) -> Image.Image:
    """(64,64,3) uint8, enlarged."""
    return Image.fromarray(pixels).resize((64 * SCALE, 64 * SCALE), Image.Resampling.NEAREST)


def main() -> None:
    data = segbench.load_dataset("shapes")
    samples = [data[row] for row in IMAGES]
    images, labels = torch.stack([s.image for s in samples]), torch.stack([s.label for s in samples])
    as_pixels = (images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    columns = [("image", as_pixels, None), ("label", PALETTE[labels], None)]
    for title, model_id in MODELS.items():
        model = segbench.load_model(model_id)
        seeds = [SEA_V1.start_seed(s.image_id, "mce", EPS_255) for s in samples]
        start = segbench.attacks.random_start(images, eps=2 * EPS_255 / 255, seeds=seeds)
        found = segbench.attacks.red_eps_apgd(
            model, images, labels, eps=EPS_255 / 255, loss="mce", iterations=SEA_V1.iterations, start=start
        )
        with torch.inference_mode():
            clean = model(images).argmax(dim=1)
        for name, predicted in (("clean image", clean), (f"attacked, {EPS_255}/255", found.predictions)):
            correct = (predicted == labels).flatten(1).float().mean(dim=1)
            columns.append((f"{title}\n{name}", PALETTE[predicted], correct.tolist()))
    side = 64 * SCALE
    sheet = Image.new("RGB", (len(columns) * (side + GAP) + GAP, HEAD + len(IMAGES) * (side + GAP) + 30), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for column, (title, pixels, correct) in enumerate(columns):
        x = GAP + column * (side + GAP)
        draw.multiline_text((x, 4), title, "black", font)
        for row in range(len(IMAGES)):
            y = HEAD + row * (side + GAP)
            sheet.paste(tile(pixels[row]), (x, y))
            if correct:
                draw.rectangle((x, y + side - 22, x + 48, y + side), "white")
                draw.text((x + 4, y + side - 20), f"{100 * correct[row]:.0f} %", "black", font)
    x, y = GAP, HEAD + len(IMAGES) * (side + GAP) + 4
    for name, colour in zip(CLASS_NAMES, PALETTE, strict=True):
        draw.rectangle((x, y, x + 16, y + 16), tuple(int(v) for v in colour), "black")
        draw.text((x + 22, y - 1), name, "black", font)
        x += 40 + int(draw.textlength(name, font))
    sheet.quantize(128).save(Path(__file__).with_name("attack_on_shapes.png"), optimize=True)


if __name__ == "__main__":
    main()
