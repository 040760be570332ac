"""Draws assets/quantized.png, accuracy over bytes, from a sweep: `python benchmarks/quantized.py FOLDER FLOAT_ACC`.

FOLDER is the sweep's, such as logs/sweeps/quantized; FLOAT_ACC is the test accuracy of the net in floating point.
"""

import csv
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import ScalarFormatter

folder, float_acc = Path(sys.argv[1]), float(sys.argv[2])
figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
with open(folder / "results_by_point.csv") as file:
    for row in csv.DictReader(file):
        size, accuracy, std = (float(row[f"test/{name}"]) for name in ("bytes", "acc", "acc std"))
        axes.errorbar(size, accuracy, std, marker="o", capsize=3, color="tab:blue")
        bits = f"{row['model.net.weight_bits']}/{row['model.net.act_bits']}"
        below = bits.startswith("1.58")  # its neighbour's label is above
        axes.annotate(bits, (size, accuracy), (5, -12 if below else 5), textcoords="offset points")
size = 4 * 40_322  # the parameters of base.yaml's net
axes.plot(size, float_acc, "s", color="black")
axes.annotate("float32", (size, float_acc), (-10, 8), textcoords="offset points", ha="right")
axes.set(
    xscale="log", xlabel="bytes", ylabel="test accuracy, mean ± standard deviation", xticks=[1e4, 2e4, 4e4, 8e4, 16e4]
)
axes.minorticks_off()
axes.xaxis.set_major_formatter(ScalarFormatter())
axes.grid(alpha=0.3)
figure.savefig(Path(__file__).resolve().parents[1] / "assets/quantized.png", dpi=120)
