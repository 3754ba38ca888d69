"""Write report.html: one page that shows what a run learned, where its time went, and what to look at.

python -m gymexp.report outputs/<name>/<date_time>    of a run at any time; a run makes its own
"""

from __future__ import annotations

import gc
from pathlib import Path

from gymexp.cli.terminal import guarded, parser_of
from gymexp.config.schema import RunConfig
from gymexp.printable import say
from gymexp.report.page import write_report


def main() -> None:
    parser = parser_of("report", __doc__ or "")
    parser.add_argument("run", type=Path, metavar="DIR", help="the directory of a run or of an evaluation")
    gc.disable()  # the records of a long run are millions of objects, which live until the end
    say(write_report(parser.parse_args().run.resolve()))


if __name__ == "__main__":
    guarded(main, RunConfig)()
