"""A CNN on MNIST and what a real experiment needs around it.

A class that is imported here has a short name in YAML and on the command line: `class_path: CNN`.
"""
# ruff: noqa: F401

from mnist_cnn.classifier import LitClassifier
from mnist_cnn.data import MNISTDataModule
from mnist_cnn.nets import CNN, StackCNN
from mnist_cnn.run.callbacks import EpochProgressBar, Histograms, ModelGraph, PredictionWriter
from mnist_cnn.run.pictures import TestPictures
from mnist_cnn.schedules import WarmupCosineLR
