"A data set and a network so small that a test can train them."
import torch
from torch import nn

from nncomp.core import seed_everything
from nncomp.data import Data, Split
from nncomp.training import Callback


def toy_data(seed=0, n=96):
    "Random 4 x 4 images of three classes: n for training, 32 for validation, 32 for the test."
    g = torch.Generator().manual_seed(seed)
    parts = [Split(torch.randn(k, 1, 4, 4, generator=g), torch.randint(0, 3, (k,), generator=g)) for k in (n, 32, 32)]
    return Data("toy", *parts, 3)


def toy_net(seed=0):
    "A convolution with batch normalisation and two dense layers, from a seed."
    seed_everything(seed)
    convolution = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*convolution, nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))


class Stop(Callback):
    "Interrupt the run in the middle of an epoch; -1 = never."
    def __init__(self, epoch): self.epoch = epoch
    def after_step(self, run):
        if run.epoch == self.epoch and run.step % run.steps_per_epoch == 3:
            raise KeyboardInterrupt
