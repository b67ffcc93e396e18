"""Bytes per image of the forms of storage, and what int8 costs in the decoded image."""

from itertools import islice

import numpy as np
import torch

from jobs.bench.photos import crops
from ldm.autoencoder import load
from ldm.image_tensors import to_model
from ldm.metrics import reconstruction_quality
from ldm.preprocess import Preprocess
from pipelines.latent_table import LatentRows, MomentArrays, data_bytes
from pipelines.storage_form import StorageForm, dequantise, quantise

__all__ = ["measure_storage"]

VAE = "f8"


def measure_storage(count: int, size_px: int = 256) -> dict[str, float]:
    """Of ``count`` photographs' crops: bytes of a row in a unit's file, and the mean drop of PSNR in dB.

    The drop is between decoding the fp32 mean and decoding the mean as int8 holds it, both against the
    photograph.
    """
    autoencoder, preprocess = load(VAE), Preprocess(sizes_px=(size_px,))
    means, stds, drops = [], [], []
    for sample in islice(crops(size_px), count):
        image = to_model(preprocess.views(sample.image_bytes(), sample.key)[0][None])
        moments = autoencoder.encode(image)
        mean = moments.mean_BChw.half().numpy()
        int8 = torch.from_numpy(dequantise(quantise(mean))).float()
        exact, coarse = (
            reconstruction_quality(image, autoencoder.decode(latent))[0].psnr_db
            for latent in (moments.mean_BChw, int8)
        )
        drops.append(exact - coarse)
        means.append(mean[0])
        stds.append(moments.std_BChw.half().numpy()[0])
    none = [None] * count
    arrays = MomentArrays(np.stack(means), np.stack(stds))
    rows = LatentRows([f"{index:06d}" for index in range(count)], none, none, none, arrays)
    sizes = {form: len(data_bytes(rows, StorageForm(dtype=form))) / count for form in ("float16", "int8")}
    return {
        "bytes_fp16": sizes["float16"],
        "bytes_int8": sizes["int8"],
        "int8_loss_db": float(np.mean(drops)),
    }
