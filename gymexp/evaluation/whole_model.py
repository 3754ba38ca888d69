"""Makes a whole model of a checkpoint that has an adapter or shards, in a process of its own:

    python -m gymexp.evaluation.whole_model RUN CHECKPOINT TO

prints the directory of the model, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from gymexp.policy.checkpoint_model import materialize

if __name__ == "__main__":
    print("\n" + json.dumps(str(materialize(*map(Path, sys.argv[1:4])))))
