"""Data sets of the trainers, as arrays in memory, one file each.

ImageNet, which does not fit there, is a stream: `examples/data/imagenet.py`.
"""

from examples.data.cifar10 import load_cifar10
from examples.data.dataset import Dataset, Split
from examples.data.digits import load_digits
from examples.data.text import Text, load_text

__all__ = ["Dataset", "Split", "Text", "load_cifar10", "load_digits", "load_text"]
