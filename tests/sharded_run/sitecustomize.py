"""On the PYTHONPATH of a run's processes: its ranks can shard on CPUs."""

import os
import sys
from pathlib import Path

if "RANK" in os.environ:
    sys.path.append(str(Path(__file__).parents[1] / "training"))
    from cpu_shards import shard_on_cpus

    shard_on_cpus()
