"""Disentanglement metrics: codes and ground-truth factors in, scores out."""

from fastdis.metrics.beta_vae import BetaVAEResult, beta_vae
from fastdis.metrics.dci import DCIResult, completeness, dci, disentanglement
from fastdis.metrics.dcimig import DCIMIGResult, dcimig
from fastdis.metrics.encoding import encode
from fastdis.metrics.evaluate import Evaluation, evaluate, evaluate_model
from fastdis.metrics.explicitness import ExplicitnessResult, explicitness
from fastdis.metrics.factor_vae import FactorVAEResult, factor_vae
from fastdis.metrics.flatness import FlatnessResult, flatness
from fastdis.metrics.infomec import InfoMECResult, infomec
from fastdis.metrics.irs import IRSResult, irs
from fastdis.metrics.jemmig import JEMMIGResult, jemmig
from fastdis.metrics.local_isometry import LocalIsometryResult, local_isometry
from fastdis.metrics.mcc import MCCResult, mcc
from fastdis.metrics.mig import MIGResult, mig
from fastdis.metrics.mig_sup import MIGSupResult, mig_sup
from fastdis.metrics.modularity import ModularityResult, modularity
from fastdis.metrics.r2 import R2Result, r2
from fastdis.metrics.rmig import RMIGResult, rmig
from fastdis.metrics.sap import SAPResult, sap
from fastdis.metrics.unsupervised import (
    CodeMutualInformationResult,
    GaussianTotalCorrelationResult,
    WassersteinCorrelationResult,
    code_mutual_information,
    gaussian_total_correlation,
    wasserstein_correlation,
)

__all__ = [
    "BetaVAEResult",
    "CodeMutualInformationResult",
    "DCIMIGResult",
    "DCIResult",
    "Evaluation",
    "ExplicitnessResult",
    "FactorVAEResult",
    "FlatnessResult",
    "GaussianTotalCorrelationResult",
    "IRSResult",
    "InfoMECResult",
    "JEMMIGResult",
    "LocalIsometryResult",
    "MCCResult",
    "MIGResult",
    "MIGSupResult",
    "ModularityResult",
    "R2Result",
    "RMIGResult",
    "SAPResult",
    "WassersteinCorrelationResult",
    "beta_vae",
    "code_mutual_information",
    "completeness",
    "dci",
    "dcimig",
    "disentanglement",
    "encode",
    "evaluate",
    "evaluate_model",
    "explicitness",
    "factor_vae",
    "flatness",
    "gaussian_total_correlation",
    "infomec",
    "irs",
    "jemmig",
    "local_isometry",
    "mcc",
    "mig",
    "mig_sup",
    "modularity",
    "r2",
    "rmig",
    "sap",
    "wasserstein_correlation",
]
