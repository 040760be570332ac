"""A CNN on MNIST and what a real experiment needs around it.

What is imported here is found by its short name in YAML and on the command line: `class_path: CNN`.
"""

from mnist_cnn.callbacks import EpochProgressBar, Histograms, ModelGraph, PredictionWriter, TestPictures
from mnist_cnn.classifier import LitClassifier
from mnist_cnn.data import MNISTDataModule
from mnist_cnn.nets import CNN, StackCNN
from mnist_cnn.schedules import WarmupCosineLR

__all__ = [
    "CNN",
    "EpochProgressBar",
    "Histograms",
    "LitClassifier",
    "MNISTDataModule",
    "ModelGraph",
    "PredictionWriter",
    "StackCNN",
    "TestPictures",
    "WarmupCosineLR",
]
