"""Tiny tensors: a second thread costs more than it brings, and much more on a busy machine."""

import os

# read by torch when a test first imports it; importing it here would keep the process that hands out tests waiting
os.environ["OMP_NUM_THREADS"] = "1"
