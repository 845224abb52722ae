"""Two processes of which the second sleeps, or dies, in its third step: `python stuck.py asleep|killed`."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch

from segkit.errors import SegkitError
from segkit.training.distributed import joined_ranks

if __name__ == "__main__":
    try:
        with joined_ranks(torch.device("cpu"), timeout_s=6) as ranks:
            for step in range(5):
                ranks.mark("loading a batch", step)
                if ranks.rank == 1 and step == 2:
                    if sys.argv[1] == "killed":
                        os.kill(os.getpid(), signal.SIGKILL)
                    time.sleep(60)
                ranks.mark("computing")
                ranks.sum(1.0)
    except SegkitError as error:
        sys.exit(f"Error: {error}")
