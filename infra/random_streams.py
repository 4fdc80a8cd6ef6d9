"""Every random stream of the project: one constant each, and the generator that they key.

All draws that must be reproducible come from the counter-based generator Philox-4x64 (Salmon et al. 2011,
https://doi.org/10.1145/2063384.2063405) with key ``(seed, stream)`` and a counter that says for what is drawn (an epoch, a
scan, a participant). A draw therefore depends on neither the order of calls nor the number of processes. Two uses with one
stream number and one counter would draw the same values for the same seed, so each use has a number of its own.

The numbers are part of the results: changing one changes splits, orders, views or intervals of every run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

# data_pipeline
SPLITS = 0x5917  # order in which healthy participants are assigned to splits
SHARD_SHUFFLE = 0x5AAD  # distribution of a cohort's scans over its shards
EPOCH_ORDER = 0x04DE4  # permutation of the scans in an epoch; counter: epoch
BALANCED_ORDER = 0xBA1A  # order of groups, and first session of each subject; counter: epoch + 1
SHARD_ORDER = 0x57EA  # order of the shards in an epoch of a sequential reader; counter: epoch
AUGMENTATION = 0xA06  # parameters of one augmented view; counter: epoch, scan, view
MASKED_PATCHES = 0xA08  # patches of a view that pretraining masks; counter: epoch, scan, view
NOISE_BANK = 0xA07  # standard normal voxels from which the noise of all views is cut
SIMULATED_ORDER = 0x51A1  # order in which diagnoses are given to simulated participants
SIMULATED_PERSON = 0x51A2  # age, sex, sessions and regional deviations; counter: participant
SIMULATED_SITE = 0x51A3  # ages, contrast and noise of a simulated site; counter: site
SIMULATED_FOCI = 0x51A4  # how strongly disease acts on each region of a patient; counter: participant
SIMULATED_SUBTYPE = 0x51A5  # subtype of a patient; counter: 0, participant
SIMULATED_SUBTYPES = 0x51A6  # how strongly a subtype acts on each region; counter: 0, subtype
SIMULATED_MISREGISTRATION = 0x51A7  # error of the registration of a simulated scan; counter: participant, session
SIMULATED_VOLUME = 0x5CA4  # folding and noise of a simulated scan; counter: participant, session (0: all sessions)
SIMULATED_TIV = 0x71B  # measurement error of the total intracranial volume; counter: participant, session

# pretrain
MONITORED_SCANS = 0x0B5  # scans drawn for the online probes if the split has more than they use
READOUT_FOLDS = 0x4EAD  # order in which participants are dealt to the folds of a readout

# evaluation
FEW_SHOT_DRAWS = 0xC0DE  # training participants of a learning curve's draw; counter: size, draw
FINE_TUNING_ORDER = 0xF17E  # batches of a fine-tuning epoch; counter: epoch
BOOTSTRAP = 0xB007  # participants of a bootstrap resample
PERMUTATION = 0xDEA1  # labels of a permutation test
RETEST_PEOPLE = 0x7E57  # people of the mixed models of reliability, and voxels of its baseline; counter: 0 or 1
RESAMPLES = 0x4A1F  # repeats, halves, permuted features of a cross-validation; counter: kind, number, side or attempt


# Generators of libraries start from a single number, not from a key:
# torch: run.seed (weights: pretrain.model), a seed for each fit (evaluation.protocols.finetune), `resumed_seed`
#     (pretrain.run.checkpoint), 0 (a network that is then filled from a file: pretrain.weights.import_weights,
#     values of no importance: pretrain.forecast.fake_pass)
# scikit-learn: the evaluation's seed and `inner_fold_seed` (evaluation.tasks.folds, and with the same numbers
#     evaluation.tasks.group_folds), 0 (pretrain.run.online_probes)
# umap: 0 (evaluation.features.embedding)
# webdataset and DALI: `buffer_seed` (data_pipeline.loading.stream)
# NumPy: `saliency_generator` (evaluation.protocols.saliency)


def inner_fold_seed(seed: int, repeat: int) -> int:
    """Seed of scikit-learn for the inner folds of a repeated cross-validation; repeat 0 has the evaluation's own seed."""
    return seed + 7919 * repeat


def buffer_seed(seed: int, epoch: int) -> int:
    """Seed of the shuffle buffer of a sequential reader in an epoch."""
    return (seed << 20) + epoch


def resumed_seed(step: int, rank: int) -> int:
    """Seed of torch's generator on a rank after a resume on another number of ranks; ``step``: of the checkpoint."""
    return 1_000_003 * step + rank


def saliency_generator(seed: int) -> np.random.Generator:
    """Generator of the choice of scans for saliency maps."""
    return np.random.default_rng(seed)


def generator(seed: int, stream: int, counter: Sequence[int] = (0, 0, 0, 0)) -> np.random.Generator:
    """Philox generator of a stream.

    Args:
        seed: the run's seed, 0 to 2**64 - 1.
        stream: one of this module's constants.
        counter: four integers from 0 to 2**64 - 1, the least significant first. Leave the first 0: it advances with every
            draw.
    """
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=list(counter)))


def named_stream(name: str) -> int:
    """A stream number made from a text (the first 32 bits of its SHA-256), for streams that cannot be listed here."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
