"""The command `lockstep` in a thread of this process: its ranks come from the server that other tests' ranks come from.

A process of its own would import torch and Transformers, and so would the server of its own that it starts: 10 s of
work. That the command works in one is shown by the tests that a terminal, `torchrun` or Ctrl-C belongs to.
"""

import sys
import threading

from lockstep import cli


class Command(threading.Thread):
    """Started at once; `wait` for its exit status. What it prints, `capsys` has."""

    def __init__(self, *arguments):
        super().__init__(daemon=True)
        self.code = None
        self.argv = ["lockstep", *map(str, arguments)]
        self.start()

    def run(self):
        before, sys.argv = sys.argv, self.argv
        try:
            cli.main()
        except SystemExit as ended:
            self.code = ended.code
        finally:
            sys.argv = before

    def wait(self, seconds):
        self.join(seconds)
        assert not self.is_alive(), f"{' '.join(self.argv)} did not end within {seconds} s"
        return self.code
