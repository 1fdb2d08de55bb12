"""Motion capture by a linear-Gaussian model with the exact Kalman filter: the likelihood itself is what training climbs.

Joint angles of one subject walking (`mocap35`), 50 per frame, 8 latents. It is what a learned filter on such data has to beat, and it shows
that the exact filter is served like any other.
"""

from __future__ import annotations

from collections.abc import Callable

from models.architecture import FilterArchitecture, KalmanArchitecture, LinearGaussianArchitecture
from training.config import OptimiserConfig, RefinementConfig
from training.sequence_config import SequenceDataConfig, SequenceRunConfig


def kalman() -> SequenceRunConfig:
    """Maximum likelihood through time, in chunks of 50 frames."""
    return SequenceRunConfig(
        name="mocap-kalman",
        architecture=FilterArchitecture(LinearGaussianArchitecture(x_size=50, latent=8), KalmanArchitecture()),
        data=SequenceDataConfig("mocap35", frames=50),
        refinement=RefinementConfig(steps=0),
        optimiser=OptimiserConfig(learning_rate=1e-2, decay="cosine", clip_norm=50.0),
        batch_size=16,
        epochs=200,
        validate_every=20,
    )


def runs() -> dict[str, Callable[[], SequenceRunConfig]]:
    """Every run of this file by name."""
    return {"mocap-kalman": kalman}
