"""Losses over soft labels, for balanced and for long-tailed data.

Every criterion is implemented by its *terms* l_k, ``(B, K)``: the loss for each class as the hard label. The loss of a soft
label y is the expectation of the terms under y, with optional class weights w:

    L(z, y) = sum_k w_k y_k l_k(z)

For a one-hot label this is the papers' formula. Labels mixed by synthetic images, mixup, CutMix or smoothing weight every
class by its share.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from semantic_aug.classify.config import LossSettings

# ------------------------------------------------------------------------------------------------------ soft labels


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Class indices ``(B,)`` to float32 ``(B, K)``."""
    return F.one_hot(labels.long(), num_classes).to(torch.float32)


def smooth(targets: Tensor, smoothing: float) -> Tensor:
    """Label smoothing (Szegedy et al. 2016): (1 - e) y + e / K for targets ``(B, K)``; rows still sum to one."""
    return targets * (1 - smoothing) + smoothing / targets.shape[-1] if smoothing else targets


def expected(terms: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Each item's loss ``(B,)``, sum_k w_k y_k l_k, from the terms ``(B, K)``, targets ``(B, K)``, rows summing to one, and
    class weights ``(K,)``; None: all one."""
    return (targets * terms if weights is None else targets * weights * terms).sum(-1)


# ------------------------------------------------------------------------------------------------------------ terms


def ce_terms(logits: Tensor) -> Tensor:
    """Cross-entropy: l_k = -log p_k."""
    return -F.log_softmax(logits.float(), dim=-1)


def focal_terms(logits: Tensor, gamma: float) -> Tensor:
    """Focal loss over a softmax (Lin et al. 2017, eq. 4 without alpha): l_k = -(1 - p_k)^gamma log p_k."""
    log_p = F.log_softmax(logits.float(), dim=-1)
    # for gamma < 1 the power has an infinite slope at 0, so 1 - p is bounded from below
    return -((1 - log_p.exp()).clamp_min(1e-7) ** gamma) * log_p if gamma else -log_p


def ldam_terms(logits: Tensor, margins: Tensor, scale: float) -> Tensor:
    """Label-distribution-aware margin loss (Cao et al. 2019, eq. 10): cross-entropy of s (z - m_k e_k) for the label k.

    The paper uses s = 30 because its classifier outputs cosines; a linear head learns its scale (s = 1). The authors of
    Diff-Mix use s = 30 with a linear head.

    Args:
        margins: ``(K,)``, see :func:`ldam_margins`.
        scale: s.
    """
    scaled, shift = scale * logits.double(), scale * margins.double()
    # l_k = log(1 + exp(s m_k) r_k) with the odds r_k against k; log r_k is exact where 1 - p_k would round to 0
    return F.softplus(shift + log_other_classes(scaled) - scaled).float()


def log_other_classes(logits: Tensor) -> Tensor:
    """log sum_(j != k) exp(z_j) for every class k, ``(B, K)`` from logits ``(B, K)``; exact also for p_k near 1."""
    largest = F.one_hot(logits.argmax(-1), logits.shape[-1]).bool()
    total = logits.logsumexp(-1, keepdim=True)
    # all classes but the most probable have p <= 1/2, for which 1 - p does not cancel
    p = (logits - total).exp().masked_fill(largest, 0)
    without_largest = logits.masked_fill(largest, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.where(largest, without_largest, total + torch.log1p(-p))


def balanced_softmax_terms(logits: Tensor, counts: Tensor) -> Tensor:
    """Balanced softmax (Ren et al. 2020, eq. 3): cross-entropy over z_k + log n_k, n ``(K,)`` at least 1."""
    return -F.log_softmax(logits.float() + counts.float().log(), dim=-1)


# ------------------------------------------------------------------------------------------ from the class frequencies


def ldam_margins(counts: Sequence[int], largest: float) -> np.ndarray:
    """Margins C / n_k^(1/4) (Cao et al. 2019, eq. 11), ``(K,)``; C gives the rarest class the margin ``largest``, which a class
    without images has, too."""
    counts = np.asarray(counts, np.float64)
    margins = np.maximum(counts, 1) ** -0.25
    return np.minimum(margins * (largest / margins[counts > 0].max()), largest)


def effective_number_weights(counts: Sequence[int], beta: float = 0.9999) -> np.ndarray:
    """Class-balanced weights (Cui et al. 2019, eq. 8): (1 - b) / (1 - b^n_k), scaled to a mean of 1 over the classes with
    images; ``(K,)``."""
    counts = np.asarray(counts, np.float64)
    weights = (1 - beta) / (1 - beta ** np.maximum(counts, 1))
    return weights * ((counts > 0).sum() / weights[counts > 0].sum())


@dataclass(frozen=True)
class Criterion:
    """A loss: maps logits ``(B, K)``, targets ``(B, K)`` and the epoch (from 0) to each item's loss ``(B,)``.

    Attributes:
        terms: maps logits ``(B, K)`` to the loss of each class as the hard label ``(B, K)``.
        weights: class weights ``(K,)`` by effective number.
    """

    settings: LossSettings
    terms: Callable[[Tensor], Tensor]
    weights: Tensor

    def __call__(self, logits: Tensor, targets: Tensor, epoch: int) -> Tensor:
        smoothed = smooth(targets, self.settings.label_smoothing)
        return expected(self.terms(logits), smoothed, self.weights if self.weighted(epoch) else None)

    def weighted(self, epoch: int) -> bool:
        """Whether classes are weighted in an epoch: in all, or in later ones (deferred reweighting, Cao et al. 2019)."""
        return self.settings.criterion == "cb" or 0 <= self.settings.drw_epoch <= epoch

    def weight_sum(self, targets: Tensor) -> Tensor:
        """The sum of a batch's class weights, sum_ik w_k y_ik, by which PyTorch's weighted cross-entropy is normalised."""
        return (smooth(targets, self.settings.label_smoothing) * self.weights).sum()


def make_criterion(settings: LossSettings, counts: Sequence[int], device: torch.device) -> Criterion:
    """The loss of the settings; ``counts`` ``(K,)``: number of real training images of each class, 0 counts as 1."""

    def tensor(values) -> Tensor:
        return torch.as_tensor(np.asarray(values, np.float32), device=device)

    n = tensor(np.maximum(counts, 1))
    terms = {
        **dict.fromkeys(("ce", "ls", "cb"), ce_terms),
        "focal": lambda logits: focal_terms(logits, settings.focal_gamma),
        "ldam": lambda logits: ldam_terms(logits, margins, settings.ldam_scale),
        "bsm": lambda logits: balanced_softmax_terms(logits, n),
    }[settings.criterion]
    margins = tensor(ldam_margins(counts, settings.ldam_margin))
    return Criterion(settings, terms, tensor(effective_number_weights(counts, settings.cb_beta)))
