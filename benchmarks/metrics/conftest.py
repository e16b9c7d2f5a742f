"""The --full option, and the table that a run of the metrics' benchmarks ends with."""

import sklearn
import torch
from comparison_table import print_comparison


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also DCI at full size, and a model on full dSprites: an hour")


def pytest_terminal_summary(terminalreporter, config):
    title = f"metrics, {torch.get_num_threads()} threads, scikit-learn {sklearn.__version__}"
    print_comparison(terminalreporter, config, title, "metric")
