"""``python docs/index_figure.py`` writes the figure of the index: the first in the notebook on lost modalities."""

import base64
import json
from pathlib import Path

DOCS = Path(__file__).resolve().parent
NOTEBOOK = DOCS / "notebooks" / "lost_modality.ipynb"
FIGURE = DOCS / "results" / "lost_modality.png"


def figure_of(notebook: Path) -> bytes:
    """Return the first picture among the outputs of a notebook, as PNG."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    pictures = (output.get("data", {}).get("image/png") for cell in cells for output in cell.get("outputs", []))
    return base64.b64decode(next(picture for picture in pictures if picture))


if __name__ == "__main__":
    FIGURE.write_bytes(figure_of(NOTEBOOK))
