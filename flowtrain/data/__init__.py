"""Datasets of images and vectors, their splits and their loaders. Nothing here knows of flows."""

from flowtrain.data.arrays import Arrays
from flowtrain.data.augment import Augment
from flowtrain.data.digits import Digits
from flowtrain.data.image_density import ImageDensity
from flowtrain.data.image_folders import CelebA, CelebAHQ, ImageFolder
from flowtrain.data.imagenet import DownsampledImageNet
from flowtrain.data.loader import Loader, evaluation_batches
from flowtrain.data.maf_tables import BSDS300, Gas, Hepmass, Miniboone, Power
from flowtrain.data.patches import Patches
from flowtrain.data.simulator import Simulator
from flowtrain.data.split import ArraySplit, Split
from flowtrain.data.synthetic import Synthetic
from flowtrain.data.tables.columns import Columns
from flowtrain.data.tables.table import Table
from flowtrain.data.target_data import TargetData
from flowtrain.data.torchvision_sets import CIFAR10, KMNIST, MNIST, SVHN, FashionMNIST
from flowtrain.data.toys import Checkerboard, EightGaussians, Moons, Pinwheel, Rings, Spirals

__all__ = [
    "BSDS300",
    "CIFAR10",
    "KMNIST",
    "MNIST",
    "SVHN",
    "ArraySplit",
    "Arrays",
    "Augment",
    "CelebA",
    "CelebAHQ",
    "Checkerboard",
    "Columns",
    "Digits",
    "DownsampledImageNet",
    "EightGaussians",
    "FashionMNIST",
    "Gas",
    "Hepmass",
    "ImageFolder",
    "Loader",
    "Miniboone",
    "Moons",
    "Patches",
    "ImageDensity",
    "Pinwheel",
    "Power",
    "Rings",
    "Simulator",
    "Spirals",
    "Split",
    "Synthetic",
    "Table",
    "TargetData",
    "evaluation_batches",
]
