"""Piano rolls by the SRNN of Marino, Cvitkovic & Yue (2018): its own filter, and amortized variational filtering of 1 and 5 steps.

Published sizes: z 100, LSTM 300, prior 1×500, decoder 2×500, chunks of 25, batch 16. Trained here at equal seconds, each
with its learning rate going to zero within them. Against overfitting, which ends every run on these small sets, weights decay
and half of the pieces are transposed: all of them stand in C, so transposing every one costs more than it gives (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from models.architecture import FilterArchitecture, IterativeArchitecture, OwnFilterArchitecture, SRNNArchitecture
from training.config import OptimiserConfig, RefinementConfig
from training.sequence_config import SequenceDataConfig, SequenceRunConfig

OWN = OwnFilterArchitecture(hidden=(500,), residual=True)
NET = IterativeArchitecture(encodings=("x", "q_layer_norm", "grad_layer_norm"), hidden=(320, 320), highway=True)
SETS = {"jsb": "jsb", "nottingham": "nottingham", "musedata": "musedata", "piano-midi": "piano_midi"}
STEPS = (1, 5)
ONE_STEP_SHARE = 0.5
DECAY = {"jsb": 1.0, "nottingham": 0.5}
"""Of the weights, where it is not DEFAULT_DECAY: smaller sets overfit sooner."""
DEFAULT_DECAY = 0.3


def own(data: str) -> SequenceRunConfig:
    """The published baseline: a filter designed for the SRNN, trained by back-propagation through time."""
    return SequenceRunConfig(
        name=f"{data}-own",
        architecture=FilterArchitecture(SRNNArchitecture(), OWN),
        data=SequenceDataConfig(SETS[data], frames=25, transpose=5),
        refinement=RefinementConfig(steps=0),
        optimiser=OptimiserConfig(learning_rate=1e-3, decay="cosine", weight_decay=DECAY.get(data, DEFAULT_DECAY), clip_norm=5.0),
        epochs=800,
        kl_warmup_epochs=20,
        validate_every=8,
        validate_frames=256,
    )


def avf(data: str, steps: int) -> SequenceRunConfig:
    """The same model with one learned refiner, in the end `steps` times a frame."""
    run = own(data)
    return replace(
        run,
        name=f"{data}-avf{steps}",
        architecture=replace(run.architecture, inference=NET),
        refinement=RefinementConfig(steps=steps),
        one_step_share=0.0 if steps == 1 else ONE_STEP_SHARE,
    )


def carried() -> SequenceRunConfig:
    """On the SRNN paper's long streams, whose state goes on from chunk to chunk as in that paper. Not transposed: the chunks of a
    stream would be by different intervals."""
    run = avf("jsb", 1)
    data = SequenceDataConfig("jsb_srnn", order="carried", frames=run.data.frames)
    # an epoch has 69 chunks per stream, where one of crops has 15 batches
    return replace(run, name="jsb-carried", data=data, epochs=160, kl_warmup_epochs=4, validate_every=2)


def runs() -> dict[str, Callable[[], SequenceRunConfig]]:
    """Every run of this file by name."""
    table: dict[str, Callable[[], SequenceRunConfig]] = {"jsb-carried": carried}
    for data in SETS:
        table[f"{data}-own"] = lambda data=data: own(data)  # type: ignore[misc]
        for steps in STEPS:
            table[f"{data}-avf{steps}"] = lambda data=data, steps=steps: avf(data, steps)  # type: ignore[misc]
    return table
