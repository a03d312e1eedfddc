"""The figure that was saved last: its artists, and whether its texts can be read."""

import itertools
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

from pipeline.plotting import DPI, WIDTH


class Drawn:
    """Notes each figure as it is saved, with the boxes of the texts in it, in pixels."""

    def __init__(self, monkeypatch) -> None:
        self.figure: Figure | None = None
        self.boxes: dict[Text, Bbox] = {}
        save, draw = Figure.savefig, Text.draw

        def note_figure(figure, *args, **kwargs):
            self.figure, self.boxes = figure, {}
            return save(figure, *args, **kwargs)

        def note_text(text, renderer, *args, **kwargs):
            if text.get_visible() and text.get_text().strip():
                self.boxes[text] = text.get_window_extent(renderer)
            return draw(text, renderer, *args, **kwargs)

        monkeypatch.setattr(Figure, "savefig", note_figure)
        monkeypatch.setattr(Text, "draw", note_text)

    def find(self, kind: type) -> list:
        return self.figure.findobj(kind, include_self=False)

    @property
    def words(self) -> str:
        return "\n".join(text.get_text() for text in self.boxes)

    def check(self, path: Path) -> None:
        """A PNG of the right width, no text cut off, and none on another; a pixel may be shared."""
        with Image.open(path) as image:
            image.load()
            assert (image.format, image.width) == ("PNG", WIDTH * DPI)
        assert self.boxes
        frame = self.figure.bbox.padded(1)
        for text, box in self.boxes.items():
            assert frame.count_contains(box.corners()) == 4, text
        inner = {text: box.padded(-1) for text, box in self.boxes.items()}
        for (text, box), (other, other_box) in itertools.combinations(inner.items(), 2):
            assert not box.overlaps(other_box), (text, other)
