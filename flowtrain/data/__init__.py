"""Data: sets of pictures, their splits, and loaders. They know nothing of flows."""

from flowtrain.data.augment import Augment
from flowtrain.data.columns import Columns
from flowtrain.data.digits import Digits
from flowtrain.data.folders import CelebA, CelebAHQ, ImageFolder
from flowtrain.data.imagenet import DownsampledImageNet
from flowtrain.data.loader import Loader, ordered
from flowtrain.data.split import ArraySplit, Split
from flowtrain.data.synthetic import Synthetic
from flowtrain.data.tabular import Table
from flowtrain.data.torchvision_sets import CIFAR10, KMNIST, MNIST, SVHN, FashionMNIST

__all__ = [
    "CIFAR10",
    "KMNIST",
    "MNIST",
    "SVHN",
    "ArraySplit",
    "Augment",
    "CelebA",
    "CelebAHQ",
    "Columns",
    "Digits",
    "DownsampledImageNet",
    "FashionMNIST",
    "ImageFolder",
    "Loader",
    "Split",
    "Synthetic",
    "Table",
    "ordered",
]
