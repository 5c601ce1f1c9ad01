"""Faithfulness of synthetic images: predictions of an independent classifier against their labels."""

import numpy as np

from semantic_aug.datasets.synthetic import SyntheticImages

GAMMAS = (0.01, 100.0)
"""Bounds of :func:`fitting_gamma`."""


def scores(probabilities: np.ndarray, images: SyntheticImages, gamma: float) -> dict[str, np.ndarray]:
    """Faithfulness of each image.

    Args:
        probabilities: ``(M, K)``, rows summing to one.
        gamma: of the soft labels y = (1 - s^gamma) source + s^gamma target.

    Returns:
        Each ``(M,)`` in [0, 1]: ``source_probability``, ``target_probability``; ``source_top1`` and ``target_top1``, whether
        the most likely class is the source's or the target's; ``label_agreement``, sum_k y_k p_k. Values of the source are
        those of its most probable class, and NaN where it may be of any class.
    """
    rows, best = np.arange(len(images)), probabilities.argmax(1)
    labels, unknown = images.labels(gamma, probabilities.shape[1]), images.of_any_class
    return {
        "source_probability": np.where(unknown, np.nan, probabilities[rows, images.source]),
        "target_probability": target_mass(probabilities, images),
        "source_top1": np.where(unknown, np.nan, best == images.source),
        "target_top1": (best == images.target).astype(float),
        "label_agreement": (labels * probabilities).sum(1),
    }


def fitting_gamma(strengths: np.ndarray, source: np.ndarray, target: np.ndarray) -> float:
    """The gamma whose soft labels fit the classifier's predictions best on images between two classes: it minimises the
    cross-entropy of (1 - s^gamma, s^gamma) to the probabilities of source and target.

    Of images of one strength s it is log q / log s, where q is the target's share of the two probabilities.

    Args:
        strengths: ``(N,)`` in (0, 1).
        source: ``(N,)``, probability of each image's source class.
        target: ``(N,)``, of its target class.

    Returns:
        A number between the :data:`GAMMAS`.
    """
    from scipy.optimize import minimize_scalar

    def cross_entropy(log_gamma: float) -> float:
        log_share = np.exp(log_gamma) * np.log(strengths)
        return float(-(target * log_share + source * np.log(-np.expm1(log_share))).sum())

    return float(np.exp(minimize_scalar(cross_entropy, bounds=np.log(GAMMAS), method="bounded").x))


def target_mass(probabilities: np.ndarray, images: SyntheticImages) -> np.ndarray:
    """Probability ``(M,)`` of the target class: low for an image that is something else, and for a source left as it is."""
    return probabilities[np.arange(len(images)), images.target]


def label_mass(probabilities: np.ndarray, images: SyntheticImages) -> np.ndarray:
    """Probability ``(M,)`` of the classes that the soft label names: the target, and those that the source may be of.

    A translation on its way from source to target loses nothing here, whatever its strength; an image that is something
    else does.
    """
    rows = np.arange(len(images))
    if images.source_labels is not None:
        named = images.source_labels > 0
        named[rows, images.target] = True
        return (probabilities * named).sum(1)
    target = probabilities[rows, images.target]
    return np.where(images.source == images.target, target, target + probabilities[rows, images.source])
