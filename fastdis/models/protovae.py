"""ProtoVAE: a prototypical network that names the latent which was intervened on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdis import ops
from fastdis.models.vae import VAE, ConvEncoder, normal_like

EMBEDDINGS = ("concat", "difference")
INTERVENTIONS = ("prior", "swap")


@dataclass(frozen=True, eq=False)
class Episode:
    """Latents before and after an intervention on each coordinate in turn.

    Attributes
    ----------
    bases : Tensor, [P, N]
        Latents as they were.
    intervened : Tensor, [P, N, N]
        ``intervened[p, n]`` is ``bases[p]`` with coordinate n, and no other, replaced.
    labels : Tensor of int64, [P, N]
        Which coordinate was replaced: ``labels[p, n] == n``.
    """

    bases: Tensor
    intervened: Tensor
    labels: Tensor


class ProtoVAE(VAE):
    r"""VAE whose latents are told apart, from the images before and after a change of one, by a prototypical network.

    In every training step latents :math:`z` of ``shots + queries`` images are taken, each coordinate n is replaced in
    turn, and both versions are decoded. A network h embeds the pair of images; the mean over the first ``shots`` is
    the prototype :math:`p_n` of that coordinate, and the embeddings :math:`e` of the other pairs are to be nearest to
    the prototype of theirs:

    .. math::
        L = L_\mathrm{VAE} + \lambda L_\mathrm{proto} + \mu L_\mathrm{isometry}, \quad
        L_\mathrm{proto} = -\mathrm{mean} \log \mathrm{softmax}_n(-\|e - p_n\|^2)

    The gradient of :math:`L_\mathrm{proto}` reaches the network h and the decoder, so that every latent has to change
    the image in a way of its own, the same everywhere.

    **This is a reconstruction.** The published abstracts say that a prototypical network, trained by self-supervision
    on interventions in latent space, constrains the map from representations to data, with local isometry as the
    bias. The losses, weights, episode sizes and architectures of the paper were not available; every default below,
    and the form of every term, is a choice made here.

    Parameters
    ----------
    latent_dim, beta, channels, image_size
        As for :class:`fastdis.models.VAE`; N latents, C channels, S x S pixels.
    shots : int, optional
        Images whose pairs make a prototype. A batch must hold at least ``shots + queries`` images.
    queries : int, optional
        Images whose pairs are named.
    embedding : {"concat", "difference"}, optional
        ``h(before, after)``, the two stacked as channels, or ``h(after) - h(before)``.
    intervention : {"prior", "swap"}, optional
        The new value of a coordinate: a draw from N(0, 1), or that coordinate of another image of the episode.
    proto_weight : float, optional
        :math:`\lambda`, the weight of the prototypical loss.
    isometry_weight : float, optional
        :math:`\mu`, the weight of a local isometry term: the mean of :math:`(\|e - e_0\| - |z'_n - z_n|)^2`, with
        :math:`e_0` the embedding of no change. No such term is computed where it is 0.
    embedding_dim : int, optional
        Dimension D of the embedding.

    Raises
    ------
    ValueError
        A parameter lies outside its range.

    References
    ----------
    V. Patil, M. Evanusa, J. JaJa. ProtoVAE: Prototypical Networks for Unsupervised Disentanglement. arXiv:2305.09092,
    2023.
    """

    def __init__(
        self,
        latent_dim: int = 10,
        beta: float = 1.0,
        channels: int = 1,
        image_size: int = 64,
        *,
        shots: int = 5,
        queries: int = 5,
        embedding: str = "concat",
        intervention: str = "prior",
        proto_weight: float = 1.0,
        isometry_weight: float = 0.0,
        embedding_dim: int = 64,
    ) -> None:
        super().__init__(latent_dim, beta, channels, image_size)
        for name, count in (("shots", shots), ("queries", queries), ("embedding_dim", embedding_dim)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        for name, weight in (("proto_weight", proto_weight), ("isometry_weight", isometry_weight)):
            if not weight >= 0:
                raise ValueError(f"{name} must not be negative, got {weight}")
        if embedding not in EMBEDDINGS:
            raise ValueError(f"embedding must be one of {', '.join(EMBEDDINGS)}, got {embedding!r}")
        if intervention not in INTERVENTIONS:
            raise ValueError(f"intervention must be one of {', '.join(INTERVENTIONS)}, got {intervention!r}")
        self.shots = shots
        self.queries = queries
        self.embedding = embedding
        self.intervention = intervention
        self.proto_weight = proto_weight
        self.isometry_weight = isometry_weight
        self.embedding_dim = embedding_dim
        self.embedder = ConvEncoder(2 * channels if embedding == "concat" else channels, embedding_dim, image_size)
        _keep_variance(self.embedder)

    def config(self) -> dict[str, Any]:
        """Return the arguments that make a model like this one."""
        return {
            **super().config(),
            "shots": self.shots,
            "queries": self.queries,
            "embedding": self.embedding,
            "intervention": self.intervention,
            "proto_weight": self.proto_weight,
            "isometry_weight": self.isometry_weight,
            "embedding_dim": self.embedding_dim,
        }

    def episode(self, z: Tensor, generator: torch.Generator | None = None) -> Episode:
        """Intervene on every coordinate of every latent vector.

        Parameters
        ----------
        z : Tensor, [P, N]
            Latents. Swapping needs two vectors or more.
        generator : torch.Generator, optional
            Source of the new values.

        Returns
        -------
        Episode
            The latents, P * N changed copies, and their labels.

        Raises
        ------
        ValueError
            ``z`` does not have that shape, or there is nothing to swap with.
        """
        if z.dim() != 2 or z.shape[1] != self.latent_dim:
            raise ValueError(f"z must have shape [P, {self.latent_dim}], got {list(z.shape)}")
        P, N = z.shape
        if self.intervention == "prior":
            values = normal_like(z, generator)
        else:
            if P < 2:
                raise ValueError(f"z must hold at least 2 vectors to swap coordinates between, got {P}")
            device = z.device if generator is None else generator.device
            # An offset from 1 to P - 1 always lands on another vector.
            offset = torch.randint(1, P, (P, N), generator=generator, device=device).to(z.device)
            others = (torch.arange(P, device=z.device).unsqueeze(1) + offset) % P
            values = z.gather(0, others)
        replaced = torch.eye(N, dtype=torch.bool, device=z.device)
        intervened = torch.where(replaced, values.unsqueeze(1), z.unsqueeze(1))
        labels = torch.arange(N, device=z.device).expand(P, N)
        return Episode(z, intervened, labels)

    def embed(self, before: Tensor, after: Tensor) -> Tensor:
        """Embed the change between images.

        Parameters
        ----------
        before : Tensor, [P, C, S, S]
            Images of the bases.
        after : Tensor, [P, M, C, S, S]
            M images of each base changed.

        Returns
        -------
        Tensor, [P, M, D]
            One embedding for each pair.
        """
        P, M = after.shape[:2]
        if self.embedding == "difference":
            change = self.embedder(after.flatten(0, 1)).unflatten(0, (P, M))
            return change - self.embedder(before).unsqueeze(1)
        pairs = torch.cat([before.unsqueeze(1).expand_as(after), after], dim=2)
        return self.embedder(pairs.flatten(0, 1)).unflatten(0, (P, M))

    def loss(self, x: Tensor, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return what to minimise, and its parts.

        Parameters
        ----------
        x : Tensor, [B, C, S, S]
            Images, intensities in [0, 1]; B is at least ``shots + queries``.
        generator : torch.Generator, optional
            Source of the posterior's noise and of the interventions.

        Returns
        -------
        dict of str to scalar Tensor
            ``loss``, ``reconstruction`` and ``kl`` in nats an image; ``prototypical`` in nats a query; ``isometry``
            where it has a weight; and ``accuracy``, the share of queries named rightly, without a gradient.

        Raises
        ------
        ValueError
            The batch is too small for an episode.
        """
        P = self.shots + self.queries
        if len(x) < P:
            raise ValueError(f"x must hold at least shots + queries = {P} images, got {len(x)}")
        mean, logvar = self.encode(x)
        z = self.reparameterize(mean, logvar, generator=generator)
        logits = self.decode(z)
        terms = self.elbo_terms(x, logits, mean, logvar)
        # The bases are the first latents of the batch, whose decodes the reconstruction has made already: an episode
        # costs P * N decodes more, where independent pairs would cost 2 * P * N.
        episode = self.episode(z[:P], generator)
        return {**terms, **self._episode_terms(terms["loss"], episode, torch.sigmoid(logits[:P]))}

    def _episode_terms(self, vae_loss: Tensor, episode: Episode, before: Tensor) -> dict[str, Tensor]:
        """Return the total ``loss`` and the terms of an episode whose bases decode to ``before`` [P, C, S, S]."""
        P, N = episode.labels.shape
        after = torch.sigmoid(self.decode(episode.intervened.flatten(0, 1))).unflatten(0, (P, N))
        embeddings = self.embed(before, after)
        prototypes = embeddings[: self.shots].mean(dim=0)
        queries = embeddings[self.shots :].flatten(0, 1)
        labels = episode.labels[self.shots :].flatten()

        prototypical = ops.prototypical_loss(queries, prototypes, labels)
        with torch.no_grad():
            named = ops.prototype_distances(queries, prototypes).argmin(dim=-1)
            accuracy = (named == labels).to(prototypical.dtype).mean()
        terms = {
            "loss": vae_loss + self.proto_weight * prototypical,
            "prototypical": prototypical,
            "accuracy": accuracy,
        }
        if self.isometry_weight > 0:
            terms["isometry"] = self._isometry(episode, before, embeddings)
            terms["loss"] = terms["loss"] + self.isometry_weight * terms["isometry"]
        return terms

    def _isometry(self, episode: Episode, before: Tensor, embeddings: Tensor) -> Tensor:
        """Return the mean squared difference between the length of an embedded change and of the change itself."""
        moved = (episode.intervened - episode.bases.unsqueeze(1)).abs().sum(dim=-1)
        # Two embeddings of one image differ by nothing already; a concatenated pair of the same image need not be 0.
        if self.embedding == "concat":
            embeddings = embeddings - self.embed(before, before.unsqueeze(1))
        # The square root has no gradient at 0, where an embedding that does not move would put it.
        length = (embeddings.square().sum(dim=-1) + 1e-12).sqrt()
        return F.mse_loss(length, moved)


def _keep_variance(layers: nn.Sequential) -> None:
    """Draw weights that keep the variance of activations through ReLU (He et al., 2015, eq. 10), with biases 0.

    PyTorch's own weights shrink activations at every layer. An encoder recovers from that in a few steps; here the
    squared distances between embeddings would start at some 1e-8, where the softmax over them has no gradient.
    """
    weighted = [layer for layer in layers if isinstance(layer, nn.Linear | nn.Conv2d)]
    for layer in weighted:
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear" if layer is weighted[-1] else "relu")
        nn.init.zeros_(layer.get_parameter("bias"))
