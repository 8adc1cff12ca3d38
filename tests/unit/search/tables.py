"""The three public tables with every path: TAKD's figure 5, and two replications of it from a fork's logs.

TAKD: CNN on CIFAR-100 with 10, 8, 6, 4, 2 layers, accuracies read from figure 5 of Mirzadeh et al. 2020 (arXiv 1902.03393).
Fork: "Final result" of each log in github.com/GAEUNYIM/CNN-TA-Distillation, evaluations/ (results_CNN_epoch20 for the CNN,
results_ResNet_epoch20 and results_epoch20 for the ResNet with 110, 56, 32, 20, 8 layers): 20 epochs, one seed, the best epoch on the
test set. Fixtures for algorithms, no evidence about distillation: most differences are within the sampling error of an accuracy, and the
ResNet with 8 layers is 9 points better without a teacher.
"""

from tadistill.config.arm import ModelPath


def table(text: str) -> dict[ModelPath, float]:
    pairs = (item.split() for item in text.strip().split("\n"))
    return {tuple(path.split("-")): float(value) for path, value in pairs}


TAKD = table("""
10-8 56.75
10-6 57.13
10-8-6 57.53
10-4 50.94
10-8-4 52.59
10-6-4 52.84
10-8-6-4 52.87
10-2 42.56
10-8-2 44.28
10-6-2 44.57
10-4-2 44.92
10-8-6-2 44.46
10-8-4-2 44.47
10-6-4-2 45.06
10-8-6-4-2 45.14
""")
TAKD_SCRATCH = {"10": 56.19, "8": 54.86, "6": 54.8, "4": 47.39, "2": 41.09}

FORK_CNN = table("""
10-8 56.09
10-6 56.16
10-8-6 56.16
10-4 48.87
10-8-4 48.93
10-6-4 49.45
10-8-6-4 49.71
10-2 41.70
10-8-2 41.30
10-6-2 41.88
10-4-2 41.85
10-8-6-2 41.84
10-8-4-2 41.99
10-6-4-2 42.00
10-8-6-4-2 41.79
""")

FORK_RESNET = table("""
110-56 41.17
110-32 43.56
110-56-32 44.06
110-20 42.88
110-56-20 42.17
110-32-20 41.72
110-56-32-20 42.31
110-8 32.05
110-56-8 32.17
110-32-8 31.97
110-20-8 31.39
110-56-32-8 31.89
110-56-20-8 31.54
110-32-20-8 31.36
110-56-32-20-8 31.15
""")
