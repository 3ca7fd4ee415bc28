"""The README's pictures, of what the tests of this folder saw last:

.venv/bin/python -m pytest kd_assets_tests/ui && .venv/bin/python -m kd_assets_tests.ui.pictures
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from kd_assets_tests.ui.web_ui import SCREENSHOTS

PICTURES = Path(__file__).parent.parent.parent / "docs" / "pictures"
BOXES = {
    "graph": (270, 235, 1312, 725),
    "card": (130, 240, 1216, 684),
    "run at work": (240, 0, 1360, 470),
    "failed shard": (240, 0, 1360, 400),
}
"""Screenshot → left, upper, right and lower edge of what is shown of it, without paths of the machine."""
MAX_BYTES = 60_000


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    for name, box in BOXES.items():
        picture = PICTURES / f"{name.replace(' ', '-')}.png"
        with Image.open(SCREENSHOTS / f"{name}.png") as screenshot:
            screenshot.convert("RGB").crop(box).quantize(64).save(picture, optimize=True)
        n_bytes = picture.stat().st_size
        assert n_bytes <= MAX_BYTES, f"{picture} has {n_bytes:,} bytes: crop it further"
        print(f"{picture.name}: {n_bytes:,} bytes")


if __name__ == "__main__":
    main()
