"""Speech by a VRNN: frames of 200 samples at 8 kHz, standardised; its own filter, and amortized variational filtering.

A small relative of the published TIMIT model (LSTM 2,000, z 200): small enough to ship. Crops of 40 frames, batch 64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from models.architecture import FilterArchitecture, IterativeArchitecture, OwnFilterArchitecture, VRNNArchitecture
from training.config import OptimiserConfig, RefinementConfig
from training.sequence_config import SequenceDataConfig, SequenceRunConfig

MODEL = VRNNArchitecture(
    latent=32, hidden=256, cell="gru", x_hidden=(256,), z_hidden=(128,), prior_hidden=(256,), decoder_hidden=(256, 256)
)
OWN = OwnFilterArchitecture(hidden=(256, 256))
# what the own filter reads, and the evidence; with layer norms in place of the last two AVF was 12 nats worse (docs/log.md)
NET = IterativeArchitecture(encodings=("x", "past", "q", "grad_log_sign"), hidden=(256, 256), highway=True)
STEPS = (1, 2, 4, 8)


def own() -> SequenceRunConfig:
    """The VRNN's own filter, q = f(x_t, h)."""
    return SequenceRunConfig(
        name="speech-own",
        architecture=FilterArchitecture(MODEL, OWN),
        data=SequenceDataConfig("fsdd", frames=40),
        refinement=RefinementConfig(steps=0),
        optimiser=OptimiserConfig(learning_rate=3e-3, decay="cosine", weight_decay=0.01, clip_norm=50.0),
        batch_size=64,
        epochs=400,
        validate_every=4,
    )


def avf(steps: int) -> SequenceRunConfig:
    """The same model with one learned refiner that also reads the frame, in the end `steps` times."""
    run = own()
    return replace(
        run,
        name=f"speech-avf{steps}",
        architecture=replace(run.architecture, inference=NET),
        refinement=RefinementConfig(steps=steps),
        one_step_share=0.0 if steps == 1 else 0.75,
        later_frames=True,
    )


def large() -> SequenceRunConfig:
    """2.0 M weights, for measuring how many streams a machine carries (benchmarks/streams.py); too large to ship beside the others."""
    run = avf(1)
    model = replace(MODEL, hidden=512, decoder_hidden=(256,))
    net = IterativeArchitecture(encodings=("x", "q_layer_norm", "grad_layer_norm"), hidden=(256, 256))
    data = replace(run.data, name="speech16k")  # 200 samples at 16 kHz, as published: 80 frames a second
    architecture = FilterArchitecture(model, net)
    return replace(run, name="speech-large", architecture=architecture, data=data, validation_sequences=4, validate_every=20)


def runs() -> dict[str, Callable[[], SequenceRunConfig]]:
    """Every run of this file by name."""
    return {"speech-large": large, "speech-own": own} | {f"speech-avf{steps}": (lambda steps=steps: avf(steps)) for steps in STEPS}
