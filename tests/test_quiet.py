import threading
from pathlib import Path

from quiet import room


class Guest:
    """Somebody in another thread who comes into the room, and stays until told to leave."""

    def __init__(self, folder: Path, *, alone: bool) -> None:
        self.inside = threading.Event()
        self.leave = threading.Event()
        self.thread = threading.Thread(target=self._visit, args=(folder, alone), daemon=True)
        self.thread.start()

    def _visit(self, folder: Path, alone: bool) -> None:
        with room(folder, alone=alone):
            self.inside.set()
            self.leave.wait(60)

    def comes_in(self, seconds: float = 30.0) -> bool:
        return self.inside.wait(seconds)

    def goes(self) -> None:
        self.leave.set()
        self.thread.join(30)


def test_many_are_in_a_room_together(tmp_path):
    guests = [Guest(tmp_path, alone=False) for _ in range(3)]
    assert all(guest.comes_in() for guest in guests)
    for guest in guests:
        guest.goes()


def test_one_is_alone_and_comes_before_those_who_came_later(tmp_path):
    first = Guest(tmp_path, alone=False)
    assert first.comes_in()
    alone = Guest(tmp_path, alone=True)
    assert not alone.comes_in(0.2)
    late = Guest(tmp_path, alone=False)
    assert not late.comes_in(0.2)  # though `first` would not mind
    first.goes()
    assert alone.comes_in()
    assert not late.comes_in(0.2)
    alone.goes()
    assert late.comes_in()
    late.goes()
