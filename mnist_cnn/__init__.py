"""A CNN on MNIST and what a real experiment needs around it.

A class that is imported here has a short name in YAML and on the command line: `class_path: CNN`.
"""

from mnist_cnn.classifier import LitClassifier as LitClassifier
from mnist_cnn.data import MNISTDataModule as MNISTDataModule
from mnist_cnn.nets import CNN as CNN
from mnist_cnn.nets import StackCNN as StackCNN
from mnist_cnn.run.callbacks import EpochProgressBar as EpochProgressBar
from mnist_cnn.run.callbacks import Histograms as Histograms
from mnist_cnn.run.callbacks import ModelGraph as ModelGraph
from mnist_cnn.run.callbacks import PredictionWriter as PredictionWriter
from mnist_cnn.run.pictures import TestPictures as TestPictures
from mnist_cnn.schedules import WarmupCosineLR as WarmupCosineLR
