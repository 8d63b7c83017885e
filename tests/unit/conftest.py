"""Tiny tensors: a second thread costs more than it brings, and much more on a busy machine."""

import torch

torch.set_num_threads(1)
