"""Two processes of which the second sleeps, or dies, in its third step: `python stuck.py asleep|killed`."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch

from segkit.errors import SegkitError
from segkit.training.distributed import joined_processes, mark, rank, summed

if __name__ == "__main__":
    try:
        with joined_processes(torch.device("cpu"), timeout_s=6):
            for step in range(5):
                mark("loading a batch", step)
                if rank() == 1 and step == 2:
                    if sys.argv[1] == "killed":
                        os.kill(os.getpid(), signal.SIGKILL)
                    time.sleep(60)
                mark("computing")
                summed(1.0)
    except SegkitError as error:
        sys.exit(f"Error: {error}")
