"""Records a command of Cerebellum as a picture of a terminal, by rich's own export.

    python benchmarks/session.py docs/demo/session.svg demo -o cerebellum-demo

What the command prints as its answer is in the picture, as it was printed; notes and progress go to stderr as always. A
run that is finished answers again without measuring anything, so that the picture is of the run that is in the folder.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from rich.text import Text

from cerebellum.cli import progress

COLUMNS = 110
_FONTS = re.compile(r"\s*@font-face \{.*?\}", re.DOTALL)  # from a server; a picture in a page may load none


class Recorder(progress.Terminal):
    """Is a terminal that wraps what is too long for it: a picture would cut it off."""

    def print(self, *objects: Any, **how: Any) -> None:
        """Prints within the columns of the picture."""
        super().print(*objects, **(how | {"soft_wrap": False}))


def main() -> None:
    picture, *arguments = sys.argv[1:]
    recorder = Recorder(record=True, width=COLUMNS)
    progress.OUT = recorder
    from cerebellum.cli.commands import cli  # takes the recorder where it is imported

    recorder.print(Text.assemble(("$ ", "dim"), (f"cerebellum {arguments[0]}", "bold")))
    try:
        cli.main(arguments, standalone_mode=False)
    except SystemExit as ended:
        if ended.code:
            raise
    svg = recorder.export_svg(title=f"cerebellum {arguments[0]}", unique_id="session")
    Path(picture).write_text(_FONTS.sub("", svg), encoding="utf-8")
    print(picture, file=sys.stderr)


if __name__ == "__main__":
    main()
