"""Token embeddings of the stages: one vector per byte, or one per patch of bytes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from torch import Tensor, nn

from mblm.model.linear import apply, apply_in_order
from mblm.model.plain import Part, are_plain, parts_in
from mblm.ops.embed_patches import embed_patches

# State dict entries that grow with the vocabulary when a checkpoint is loaded into a larger one.
# The published names, and a pattern for the stages above the lowest two.
MBLM_TOKEN_EMB_MIGRATION: set[str] = {
    "token_embs_rev.0.embedding.weight",
    "token_embs_rev.1.embedding.weight",
    "token_embs_rev.*.embedding.weight",
    "to_logits.weight",
    "to_logits.bias",
}


class TokenEmbedding(nn.Module):
    """A table of one vector of width D_N per token id, whose sizes programs ask for.

    Attributes:
        num_embeddings: V.
        embedding_dim: D_N, for the upper stages, too.
    """

    def __init__(self, num_tokens: int, dim: int, pad_token_id: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_tokens, dim, padding_idx=pad_token_id)

    @property
    def num_embeddings(self) -> int:
        return self.embedding.num_embeddings

    @property
    def embedding_dim(self) -> int:
        return self.embedding.embedding_dim


class LocalTokenEmbedding(TokenEmbedding):
    """The local stage's embedding, one vector of width D_N per byte."""

    def parts(self) -> Iterator[Part]:
        """What is in it, as built."""
        yield self.embedding, nn.Embedding

    def forward(self, ids: Tensor) -> Tensor:
        """Embed bytes: ids ``(..)`` -> ``(.., D_N)``."""
        out: Tensor = self.embedding(ids)
        return out

    def from_embeddings(self, embeddings: Tensor) -> Tensor:
        """Embeddings of bytes are what this stage takes: ``(..., D_N) -> (..., D_N)``."""
        return embeddings


class PatchTokenEmbedding(TokenEmbedding):
    """An upper stage's embedding, one vector of width D_n per patch of R_n bytes."""

    def __init__(
        self, num_tokens: int, local_dim: int, pad_token_id: int, patch_size: int, dim: int
    ) -> None:
        super().__init__(num_tokens, local_dim, pad_token_id)
        self.patch_size = patch_size
        self.pad_token_id = pad_token_id
        flat_dim = patch_size * local_dim
        # The names of the entries are those of the checkpoints: norm 1, projection 2, norm 3.
        self._post = nn.Sequential(
            nn.Flatten(-2), nn.LayerNorm(flat_dim), nn.Linear(flat_dim, dim), nn.LayerNorm(dim)
        )

    def forward(
        self, ids: Tensor, num_patches: int, project: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Embed patches: ids ``(B, L)``, padded to ``num_patches`` -> ``(B, num_patches, D_n)``.

        ``project`` stands in for the linear layer, where nothing else is hooked or replaced.
        """
        is_built = are_plain(islice(self.parts(), 4))  # up to the norm before the linear layer
        if not (is_built and self.embedding.padding_idx == self.pad_token_id):
            missing = num_patches * self.patch_size - ids.shape[1]
            padded = nn.functional.pad(ids, (0, missing), value=self.pad_token_id)
            return self.from_embeddings(
                self.embedding(padded).unflatten(1, (num_patches, self.patch_size))
            )
        flat_norm: Any
        _, flat_norm, own, *rest = self._post
        flat = embed_patches(
            ids,
            self.embedding.weight,
            flat_norm.weight,
            flat_norm.bias,
            num_patches=num_patches,
            patch_size=self.patch_size,
            pad_token_id=self.pad_token_id,
            eps=flat_norm.eps,
        )
        out = apply(own, flat) if project is None else project(flat)
        for layer in rest:
            out = layer(out)
        return out

    def parts(self) -> Iterator[Part]:
        """What is in it, as built."""
        yield self.embedding, nn.Embedding
        yield self._post, nn.Sequential
        yield from parts_in(self._post, nn.Flatten, nn.LayerNorm, nn.Linear, nn.LayerNorm)

    def from_embeddings(self, embeddings: Tensor) -> Tensor:
        """Embeddings of bytes to those of patches: ``(..., R_n, D_N) -> (..., D_n)``."""
        return apply_in_order(self._post, embeddings)


def build_token_embeddings(
    hidden_dims: Sequence[int], seq_lens: Sequence[int], num_tokens: int, pad_token_id: int
) -> nn.ModuleList:
    """The stages' token embeddings, the local stage's first."""
    local_dim = hidden_dims[-1]
    embeddings = nn.ModuleList([LocalTokenEmbedding(num_tokens, local_dim, pad_token_id)])
    patch_size = 1  # seq_lens[1:] and hidden_dims[:-1], both from the local end
    for dim, seq_len in zip(hidden_dims[-2::-1], seq_lens[:0:-1], strict=True):
        patch_size *= seq_len
        embeddings.append(PatchTokenEmbedding(num_tokens, local_dim, pad_token_id, patch_size, dim))
    return embeddings


def migrate_embedding_keys(state_dict: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Rename the embedding entries of release 0.4.0 to the current layout; others stay.

    Only entries below ``prefix + "token_embs_rev."`` are looked at.
    """
    old_upper = {"0": "embedding", "2": "_post.1", "3": "_post.2", "4": "_post.3"}
    prefix = f"{prefix}token_embs_rev."
    migrated = {}
    for key, value in state_dict.items():
        parts = key.removeprefix(prefix).split(".")
        if key.startswith(prefix):
            if len(parts) == 2 and parts[1] == "weight":  # 0.weight
                key = f"{prefix}{parts[0]}.embedding.weight"
            elif len(parts) == 3 and parts[1] in old_upper:  # 1.2.bias
                key = f"{prefix}{parts[0]}.{old_upper[parts[1]]}.{parts[2]}"
        migrated[key] = value
    return migrated
