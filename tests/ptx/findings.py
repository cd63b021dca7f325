"""What the emulator finds wrong with a compiled kernel, and what it refuses to run."""


class RefusedError(Exception):
    """An instruction or a situation that the emulator does not know."""


class Findings:
    """The findings of one kernel: kind and instruction, how often, and the first case in words."""

    def __init__(self, kernel, lines):
        self.kernel = kernel
        self.lines = lines  # the instructions; ``at`` below is a number in this list
        self._found = {}

    def __bool__(self):
        return bool(self._found)

    def note(self, kind, at, number=1, detail=""):
        """Add ``number`` lanes of a finding, if any. The detail of the first case is kept."""
        if not number:
            return
        count, first = self._found.get((kind, at), (0, detail))
        self._found[kind, at] = count + int(number), first

    def refuse(self, at, message):
        raise RefusedError(f"{self.kernel}: {message}, at: {self.lines[at]}")

    def kinds(self):
        return {kind for kind, _ in self._found}

    def report(self):
        """One line per kind and instruction."""
        return [
            f"{self.kernel}: {kind}{', ' if detail else ''}{detail} ({count} lanes), at: {self.lines[at]}"
            for (kind, at), (count, detail) in self._found.items()
        ]

    def clear(self):
        self._found.clear()
