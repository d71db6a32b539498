"""Digests of weights: the same exactly where a model computes the same."""

import hashlib

import torch


def weights_digest(module: torch.nn.Module, about: str = "") -> str:
    """A digest of all weights and statistics of a module, and of a description of it."""
    digest = hashlib.sha256(about.encode())
    for name, value in module.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
