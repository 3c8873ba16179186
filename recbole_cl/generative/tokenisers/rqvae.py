"""RQ-VAE: an autoencoder with a residual quantiser in its middle, through vector-quantize-pytorch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from recbole_cl.errors import ConfigError, DataError
from recbole_cl.generative.tokenisers.base import Tokeniser, residual_distances
from recbole_cl.registry import tokenisers


@tokenisers.register("rqvae")
class RQVAE(Tokeniser):
    """Vectors to a latent space, its residuals to codes (Lee et al. 2022; TIGER, Rajput et al. 2023).

    The loss is the squared error of the decoded vector and the commitment to the codes; codebooks follow their vectors
    by moving averages, start from k-means, and a code that nobody takes is moved to a vector.

    Args:
        parameters: ``levels``, ``size``, ``width``, ``hidden``, ``epochs``, ``batch``, ``rate``, ``commitment``.
        seed: The run's seed; weights, codebooks and batches are drawn from it, and the global generator is left alone.
    """

    prefix = "rqvae"

    def fit(self, vectors: np.ndarray) -> None:
        try:
            from vector_quantize_pytorch import ResidualVQ
        except ImportError as error:
            raise ConfigError(
                "tokeniser: 'rqvae' needs the package vector-quantize-pytorch; pip install 'recbole-cl[rqvae]', or "
                "take residual_quantiser"
            ) from error
        own = self.parameters
        for key in ("width", "epochs", "batch"):
            if int(own[key]) < 1:
                raise ConfigError(f"property 'rqvae_{key}' is {own[key]!r}; it must be at least 1")
        data = torch.from_numpy(self.require(vectors))
        # Vectors of sentence encoders have numbers around 0.05; the autoencoder sees them with a variance of 1.
        self.mean = data.mean(0)
        self.scale = (data - self.mean).square().mean().sqrt().clamp(min=torch.finfo(data.dtype).tiny)
        data = self._scaled(data)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            widths = [data.shape[1], *(int(width) for width in own["hidden"]), int(own["width"])]
            self.encoder, decoder = _mlp(widths), _mlp(widths[::-1])
            self.quantiser = ResidualVQ(
                dim=widths[-1],
                num_quantizers=self.levels,
                codebook_size=self.size,
                kmeans_init=True,
                threshold_ema_dead_code=1,
                commitment_weight=float(own["commitment"]),
            )
            parts = (self.encoder, decoder, self.quantiser)
            optimiser = torch.optim.Adam([p for part in parts for p in part.parameters()], lr=float(own["rate"]))
            # k-means starts from the first batch, which therefore holds more vectors than there are codes.
            size = max(int(own["batch"]), self.size)
            for _ in range(int(own["epochs"])):
                for rows in torch.randperm(len(data)).split(size):
                    latent = self.encoder(data[rows]).unsqueeze(0)
                    quantised, _, committed = self.quantiser(latent)
                    loss = nn.functional.mse_loss(decoder(quantised.squeeze(0)), data[rows]) + committed.sum()
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
        if not torch.isfinite(loss):
            raise DataError(f"tokeniser: the loss of rqvae is {float(loss)}; make rqvae_rate ({own['rate']}) smaller")
        for part in parts:
            part.eval().requires_grad_(False)
        self.books = self.quantiser.codebooks.detach().numpy()

    def _scaled(self, vectors: torch.Tensor) -> torch.Tensor:
        return (vectors - self.mean) / self.scale

    def _latent(self, vectors: np.ndarray) -> torch.Tensor:
        return self.encoder(self._scaled(torch.from_numpy(np.asarray(vectors, dtype=np.float32))))

    @torch.no_grad()
    def encode(self, vectors: np.ndarray) -> np.ndarray:
        left = self._latent(vectors)
        books = torch.from_numpy(self.books)
        codes = torch.empty((len(left), self.levels), dtype=torch.int64)
        # As the quantiser takes them, but without its batch of one, which would need a distance to all codes at once.
        for level, book in enumerate(books):
            parts = [torch.cdist(part, book).argmin(1) for part in left.split(4096)]
            codes[:, level] = torch.cat(parts) if parts else codes[:, level]
            left = left - book[codes[:, level]]
        return codes.numpy()

    @torch.no_grad()
    def last_codes(self, vector: np.ndarray, codes: np.ndarray) -> np.ndarray:
        return residual_distances(self._latent(vector[None])[0].numpy(), codes, self.books)


def _mlp(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
