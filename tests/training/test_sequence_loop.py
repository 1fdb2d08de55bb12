"""Runs of sequence models: they learn, resume bit for bit, stop by time, and never lose a good checkpoint."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models.architecture import FilterArchitecture, IterativeArchitecture, OwnFilterArchitecture, SRNNArchitecture
from training import run_loop, sequence_loop
from training.checkpoint import CheckpointError, load_filter, load_static
from training.config import OptimiserConfig, RefinementConfig
from training.run_loop import TrainingFailed, fabric_for
from training.sequence_config import SequenceDataConfig, SequenceRunConfig
from training.sequence_loop import SequenceTrainer
from training.sequence_step import Chunk
from training.sequence_update import SequenceGradients

SAMPLES = Path(__file__).parents[1] / "data"
MODEL = SRNNArchitecture(latent=4, hidden=8, prior_hidden=(8,), decoder_hidden=(12,))
AVF = FilterArchitecture(MODEL, IterativeArchitecture(("x", "q_layer_norm", "grad_layer_norm"), (16,), highway=True))
OWN = FilterArchitecture(MODEL, OwnFilterArchitecture(hidden=(12,), residual=True))

RUN = SequenceRunConfig(
    "tiny",
    AVF,
    SequenceDataConfig(f"rolls:{SAMPLES / 'chorales_short.npz'}", frames=10, transpose=2),
    RefinementConfig(steps=2),
    OptimiserConfig(learning_rate=5e-3, weight_decay=0.01, clip_norm=5.0),
    batch_size=2,
    epochs=6,
    kl_warmup_epochs=2,
    validate_frames=20,
    compiled=False,
)
CARRIED = replace(RUN, data=replace(RUN.data, order="carried", frames=12), epochs=3)
RUNS = {
    "avf, crops": RUN,
    "avf, one step first": replace(RUN, one_step_share=0.5),
    "avf, carried": CARRIED,
    "own, carried": replace(CARRIED, architecture=OWN, refinement=RefinementConfig(steps=0)),
    "own, whole": replace(RUN, architecture=OWN, refinement=RefinementConfig(steps=0), data=replace(RUN.data, order="whole")),
}


def trainer(run: SequenceRunConfig, folder: Path) -> SequenceTrainer:
    return SequenceTrainer(run, folder, fabric_for("cpu"))


def weights(folder: Path) -> bytes:
    return (folder / "final" / "weights.safetensors").read_bytes()


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def interrupt_at(update: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves as a kill would: after the state was saved, in the midst of a later update."""
    plain, count = SequenceGradients.__call__, 0

    def counted(self: SequenceGradients, *args: Any) -> Any:
        nonlocal count
        count += 1
        if count == update:
            raise OSError("killed")
        return plain(self, *args)

    monkeypatch.setattr(SequenceGradients, "__call__", counted)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_in_mid_epoch_ends_with_the_same_bits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RUNS[name]
    trainer(run, tmp_path / "straight").fit()
    monkeypatch.setattr(run_loop, "SAVE_EVERY_S", -1.0)
    with monkeypatch.context() as patch:
        interrupt_at(6, patch)
        with pytest.raises(OSError, match="killed"):
            trainer(run, tmp_path / "killed").fit()
    trainer(run, tmp_path / "killed").fit()
    assert weights(tmp_path / "killed") == weights(tmp_path / "straight")
    assert [line["valid_elbo"] for line in log(tmp_path / "killed")] == [line["valid_elbo"] for line in log(tmp_path / "straight")]


def test_frames_get_one_step_first_and_more_of_them_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the run is the one-step run, update by update; then the steps rise to K."""
    made: list[int] = []
    plain = SequenceGradients.__call__

    def noted(self: SequenceGradients, chunk: Chunk, kl_weight: float) -> Any:
        made.append(chunk.noise.shape[1] - 1)
        return plain(self, chunk, kl_weight)

    monkeypatch.setattr(SequenceGradients, "__call__", noted)
    trainer(replace(RUN, refinement=RefinementConfig(steps=5), one_step_share=0.5), tmp_path / "rising").fit()
    per_epoch = len(made) // RUN.epochs
    assert made == [k for k in (1, 1, 1, 2, 4, 5) for _ in range(per_epoch)]
    trainer(replace(RUN, refinement=RefinementConfig(steps=1)), tmp_path / "one").fit()
    rising, one = log(tmp_path / "rising"), log(tmp_path / "one")
    assert [line["train_elbo"][:2] for line in rising[:3]] == [line["train_elbo"] for line in one[:3]]
    assert [line["train_elbo"][1:] for line in rising[:3]] == [[line["train_elbo"][1]] * 5 for line in one[:3]]


def test_it_learns_and_keeps_the_best(tmp_path: Path) -> None:
    data = replace(RUN.data, name=f"rolls:{SAMPLES / 'chorales_sample.npz'}", frames=5)
    run = replace(RUN, data=data, epochs=24, validate_every=4, optimiser=replace(RUN.optimiser, learning_rate=2e-2))
    trained = trainer(run, tmp_path)
    untrained = trained.validate()[-1]
    trained.fit()
    lines = log(tmp_path)
    assert [line["epoch"] for line in lines] == list(range(4, 25, 4))
    assert untrained < lines[0]["valid_elbo"][-1] < lines[-1]["valid_elbo"][-1] - 0.3
    assert lines[-1]["valid_elbo"][-1] > untrained + 0.6
    assert len(lines[0]["valid_elbo"]) == 3
    model, kept, facts = load_filter(tmp_path)
    assert kept == run
    assert facts["valid_elbo"][-1] == max(line["valid_elbo"][-1] for line in lines)
    assert not model.generative.x_mean.eq(0).all()
    with pytest.raises(CheckpointError, match="sequence model"):
        load_static(tmp_path)


def test_a_run_by_time_ends_with_its_seconds_and_its_rate_at_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(run_loop.time, "process_time", lambda: float(next(clock)))
    monkeypatch.setattr(run_loop.time, "perf_counter", lambda: float(next(clock)))
    run = replace(RUN, epochs=1000, seconds=20.0, optimiser=replace(RUN.optimiser, decay="cosine"))
    trained = trainer(run, tmp_path)
    line = trained.fit()
    assert 20 <= line["training_seconds"] <= 20 + len(trained.batches)
    rates = [entry["learning_rate"] for entry in log(tmp_path)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.2 * rates[0]


def test_a_nan_ends_the_run_and_names_the_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, count = SequenceGradients.__call__, 0

    def poisoned(self: SequenceGradients, *args: Any) -> Any:
        nonlocal count
        count += 1
        seen = plain(self, *args)
        return replace(seen, elbo=seen.elbo * math.nan) if count == 7 else seen

    monkeypatch.setattr(SequenceGradients, "__call__", poisoned)
    with pytest.raises(TrainingFailed, match=r"update 7 .* not finite"):
        trainer(RUN, tmp_path).fit()
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert all(bool(torch.isfinite(value).all()) for value in state["model"].values())


def test_transposing_moves_whole_rows_by_few_semitones(tmp_path: Path) -> None:
    trained = trainer(replace(RUN, data=replace(RUN.data, transpose=3)), tmp_path)
    x = torch.zeros(200, 4, 88)
    x[:, :, 40] = 1
    moved = trained._transposed(x)
    places = moved.argmax(-1)
    assert bool((moved.sum(-1) == 1).all())
    assert bool((places == places[:, :1]).all())
    assert set(places[:, 0].tolist()) == set(range(37, 44))
    assert 0.4 < float((places[:, 0] == 40).float().mean()) < 0.75


def test_padding_counts_for_nothing_in_validation(tmp_path: Path) -> None:
    trained = trainer(RUN, tmp_path)
    together = trained.validate()
    single = sequence_loop.validation_trace(trained.filters, trained.valid, 2, 1, rows_at_once=1)
    assert together[-1] == pytest.approx(single[-1], rel=0.05)  # other noise, the same frames
