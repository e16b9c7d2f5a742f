"""The table that a run of the spectral method's benchmarks ends with."""

import sklearn
import torch
from comparison_table import print_comparison


def pytest_terminal_summary(terminalreporter, config):
    title = f"whole fits, {torch.get_num_threads()} threads, scikit-learn {sklearn.__version__}"
    print_comparison(terminalreporter, config, title, "estimator")
