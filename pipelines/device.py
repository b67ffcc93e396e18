"""The device that Ray gave the current process."""

import ray
import torch

__all__ = ["pick_device"]


def pick_device() -> torch.device:
    """A GPU only where Ray assigned one and it is there (Ray's GPUs can be logical), else the CPU."""
    if ray.get_gpu_ids():
        if torch.cuda.is_available():
            return torch.device("cuda")
        if torch.backends.mps.is_available():
            return torch.device("mps")
    return torch.device("cpu")
