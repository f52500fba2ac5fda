"""ECRT: rare classes learn from common ones by what is the same in all.

Chen et al., Supercharging Imbalanced Data Learning With Energy-based Contrastive Representation
Transfer, NeurIPS 2021, arXiv 2011.12454.

Its assumption: features z are made from sources s, which are independent of each other in every
class, and the map s = f(z) is invertible and the same for all classes. `fit` finds it by
generalised contrastive learning (Hyvärinen et al., Nonlinear ICA Using Auxiliary Variables and
Generalized Contrastive Learning, AISTATS 2019, arXiv 1805.08651): a critic that sees one source at
a time tells the label of an image from those of others. If the classes' distributions differ
enough, sources are found up to their order and a transformation of each alone. `augmented` then
makes new sources of a rare class: each coordinate comes from another image of the class.

What differs from the paper and its published code (github.com/ZidiXiu/ECRT), and why:

- All classes teach the map. There the common classes alone do, of which there are many; inspection
  has but one, good, and a single label leaves nothing to contrast.
- Between the flow's autoregressive layers are trained linear maps. There the order of coordinates
  is reversed instead, and batch normalisation added; this takes longer to find known sources.
- The critic is a sum over sources, as the paper has it. The code scales such sums to unit length
  and divides by a trained temperature, which mixes sources that should be told apart.
- A rare class is filled up to the size of the largest. There the weights of its real and made-up
  samples are an option, lambda; here lambda is the part of the class that is made up.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
import zuko
from torch import nn
from torch.nn import functional as F

Augmentation = Literal["shuffle", "gaussian", "none"]

LAYERS = 3  # of the flow, each a linear and an autoregressive one
HIDDEN = 32  # units in each network of the flow
UNITS = 16  # of the critic, for each source
RHO = 0.3  # weight of the likelihood beside the contrast
LEARNING_RATE = 1e-2  # at its peak
BATCH = 256


class SourceMap(nn.Module):
    """The invertible map from features (n, d) to sources (n, d), a masked autoregressive flow.

    Papamakarios et al., Masked Autoregressive Flow for Density Estimation, NeurIPS 2017, arXiv
    1705.07057. It begins as the identity.
    """

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        layers: list[Any] = []
        for _ in range(LAYERS):
            layers.append(
                zuko.lazy.UnconditionalTransform(
                    zuko.transforms.LULinearTransform, torch.eye(dimensions)
                )
            )
            autoregressive = zuko.flows.MaskedAutoregressiveTransform(
                dimensions, hidden_features=(HIDDEN, HIDDEN), activation=nn.ELU
            )
            for parameter in autoregressive.hyper[-1].parameters():
                nn.init.zeros_(parameter)
            layers.append(autoregressive)
        self.layers = zuko.lazy.LazyComposedTransform(*layers)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        sources: torch.Tensor = self.layers()(features)
        return sources

    def inverse(self, sources: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.layers().inv(sources)
        return features

    def with_log_determinant(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sources (n, d), and the logarithm of the Jacobian's absolute determinant (n,)."""
        sources, log_determinant = self.layers().call_and_ladj(features)
        return sources, log_determinant


class Critic(nn.Module):
    """How well sources (n, d) go with each label: (n, classes).

    r(y, s) is the sum over sources a of r_a(y, s_a), each with a small network of its own.
    """

    def __init__(self, dimensions: int, classes: int) -> None:
        super().__init__()
        self.of_each = nn.Sequential(  # a network for each source, side by side
            nn.Conv1d(dimensions, dimensions * UNITS, 1, groups=dimensions),
            nn.ELU(),
            nn.Conv1d(dimensions * UNITS, dimensions * classes, 1, groups=dimensions),
        )
        self._shape = (dimensions, classes)

    def forward(self, sources: torch.Tensor) -> torch.Tensor:
        return self.of_each(sources[:, :, None]).unflatten(1, self._shape).sum(dim=(1, 3))


class Priors(nn.Module):
    """A Gaussian of independent sources for each class; the paper's ECRT-MP."""

    def __init__(self, dimensions: int, classes: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(classes, dimensions))
        self.log_scale = nn.Parameter(torch.zeros(classes, dimensions))

    def log_likelihood(self, sources: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(n,) logarithms of densities of sources (n, d)."""
        scaled = (sources - self.mean[labels]) / self.log_scale[labels].exp()
        normaliser = self.log_scale[labels] + math.log(2 * math.pi) / 2
        return -(scaled.square() / 2 + normaliser).sum(dim=1)


def contrast(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The energy-based contrastive loss of a batch: scores r (n, classes), labels (n,).

    The mean over images i of log mean_j exp(r(y_j, s_i) - r(y_i, s_i)), where j are the other
    images: minus the Donsker-Varadhan bound on the mutual information of sources and labels. The
    paper writes it as Fenchel-Donsker-Varadhan, whose further term is the quotient of two equal
    values, one of them without gradient: value and gradient are the same. Labels of one class are
    counted instead of listed.
    """
    others = torch.bincount(labels, minlength=scores.shape[1]) - F.one_hot(labels, scores.shape[1])
    energies = scores - scores.gather(1, labels[:, None])
    return (energies + others.log()).logsumexp(dim=1).mean() - math.log(len(labels) - 1)


class _Model(nn.Module):
    """What is trained together."""

    def __init__(self, dimensions: int, classes: int) -> None:
        super().__init__()
        self.map = SourceMap(dimensions)
        self.critic = Critic(dimensions, classes)
        self.priors = Priors(dimensions, classes)

    def loss(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """L_GCL + rho L_FLOW: the contrast, and a likelihood that keeps sources from collapsing."""
        sources, log_determinant = self.map.with_log_determinant(features)
        likelihood = self.priors.log_likelihood(sources, labels) + log_determinant
        return contrast(self.critic(sources), labels) - RHO * likelihood.mean()


def fit(
    seen: tuple[torch.Tensor, torch.Tensor],
    validation: tuple[torch.Tensor, torch.Tensor],
    classes: int,
    epochs: int,
    seed: int,
    show: Callable[[float], None] = lambda done: None,
) -> SourceMap:
    """The map of the epoch with the lowest loss on validation; before training it is the identity.

    `seen` and `validation` are features (n, d), of about unit variance, and labels (n,). `show`
    gets the part that is done.
    """
    features, labels = seen
    torch.manual_seed(seed)
    model = _Model(features.shape[1], classes)
    best, lowest = copy.deepcopy(model.map), _validate(model, *validation)
    batches = -(-len(labels) // BATCH)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=epochs * batches
    )
    for epoch in range(epochs):
        for chosen in torch.randperm(len(labels)).tensor_split(batches):
            loss = model.loss(features[chosen], labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        found = _validate(model, *validation)
        if found < lowest:
            best, lowest = copy.deepcopy(model.map), found
        show((epoch + 1) / epochs)
    return best.eval()


@torch.no_grad()
def _validate(model: _Model, features: torch.Tensor, labels: torch.Tensor) -> float:
    return model.loss(features, labels).item()


def augmented(
    sources: np.ndarray, labels: np.ndarray, how: Augmentation, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Sources (n, d) and labels (n,) with each class filled up to the size of the largest.

    The real ones come first. `shuffle` and `gaussian` are the paper's ways, without and with a
    model of the class; copies, `none`, are what these have to be better than.
    """
    largest = np.bincount(labels).max()
    all_sources, all_labels = [sources], [labels]
    for label in np.unique(labels):
        own = sources[labels == label]
        count = largest - len(own)
        if count:
            all_sources.append(MAKERS[how](own, count, rng))
            all_labels.append(np.full(count, label))
    return np.concatenate(all_sources), np.concatenate(all_labels)


def shuffled(own: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, d): each coordinate of each from a random one of a class's sources (n, d).

    Each coordinate of the class is permuted on its own, and again until there are enough. So all
    its values come equally often.
    """
    rounds = -(-count // len(own))
    return np.concatenate([rng.permuted(own, axis=0) for _ in range(rounds)])[:count]


def gaussian(own: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, d) draws from the Gaussian, of independent coordinates, of sources (n, d).

    Of a single source there are only copies: it says nothing about the spread.
    """
    spread = own.std(axis=0, ddof=1) if len(own) > 1 else np.zeros(own.shape[1])
    return rng.normal(own.mean(axis=0), spread, (count, own.shape[1]))


def copied(own: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, d) of the sources (n, d) themselves, each as often as any other."""
    return np.resize(rng.permutation(own), (count, own.shape[1]))


MAKERS = {"shuffle": shuffled, "gaussian": gaussian, "none": copied}
