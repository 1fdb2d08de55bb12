"""MNIST, dynamically binarised: the published one-level pair, the pair that ships, and two small ones.

Published (Marino 2018, C.7.1 and Fig. 7): z 64, 2×512 ELU both ways, batch 64, Adam 2e-4 × 0.999 per epoch, 1,500
epochs, 5 steps. Where this project differs from the reference code: λ-gradients are per row (not batch means), layer norm
runs over a row's own features, and both rivals of a pair see the same number of samples.
"""

from __future__ import annotations

from dataclasses import replace

from models.architecture import Architecture, DirectArchitecture, IterativeArchitecture, VAEArchitecture
from training.config import OptimiserConfig, RefinementConfig, RunConfig

ENCODINGS = ("x", "grad_layer_norm", "grad_log_sign", "q")


def mnist_iterative() -> RunConfig:
    """The published iterative model: about 1.29 M updates, a job for a GPU."""
    return RunConfig(
        name="mnist-iterative",
        architecture=Architecture(VAEArchitecture(), IterativeArchitecture(encodings=ENCODINGS)),
        refinement=RefinementConfig(steps=5, samples=2, antithetic=True),
        compiled=True,
    )


def mnist_direct() -> RunConfig:
    """Its rival: the same decoder, data, samples and optimiser, and a standard encoder of the same size."""
    return replace(
        mnist_iterative(),
        name="mnist-direct",
        architecture=Architecture(VAEArchitecture(), DirectArchitecture()),
    )


def _short(run: RunConfig, name: str) -> RunConfig:
    """What two CPU cores train in about an hour: larger batches, a higher rate that decays to zero, bfloat16 matrices."""
    return replace(
        run,
        name=name,
        batch_size=256,
        epochs=110,
        optimiser=OptimiserConfig(learning_rate=1e-3, decay="cosine", horizon=150, cooldown_epochs=24, clip_norm=50.0),
        precision="bf16-mixed",
    )


def mnist_iterative_short() -> RunConfig:
    """First phase of the iterative checkpoint that ships."""
    return _short(mnist_iterative(), "mnist-iterative-short")


def mnist_direct_short() -> RunConfig:
    """First phase of the direct checkpoint that ships."""
    return _short(mnist_direct(), "mnist-direct-short")


def _brief() -> OptimiserConfig:
    return OptimiserConfig(learning_rate=1e-3, decay="cosine", clip_norm=50.0)


def _polished(run: RunConfig, name: str, epochs: int = 12) -> RunConfig:
    """φ alone for a few more epochs, θ fixed: what inference can still gain on a decoder that no longer moves (cf. He 2019)."""
    return replace(
        run,
        name=name,
        parent=run.name,
        frozen=("generative",),
        epochs=epochs,
        optimiser=OptimiserConfig(learning_rate=4e-4, decay="cosine", clip_norm=50.0),
    )


def mnist_iterative_polished() -> RunConfig:
    """Second phase: 10 steps per update, so that late steps are trained too."""
    run = _polished(mnist_iterative_short(), "mnist-iterative-polished")
    return replace(run, refinement=replace(run.refinement, steps=10))


def mnist_iterative_late() -> RunConfig:
    """Third phase: late steps weigh more."""
    run = _polished(mnist_iterative_polished(), "mnist-iterative-late", epochs=8)
    return replace(run, refinement=replace(run.refinement, late=True))


def mnist_iterative_linked() -> RunConfig:
    """Fourth phase: from the third on a step also learns what it leaves to the next, and three digits of ten have a part hidden,
    so that λ does not run away from what is left of them."""
    run = _polished(mnist_iterative_late(), "mnist-iterative-linked", epochs=20)
    return replace(
        run,
        refinement=replace(run.refinement, linked=2),
        data=replace(run.data, mask_probability=0.3),
        precision="32-true",
    )


def mnist_iterative_long() -> RunConfig:
    """Fifth phase, and the checkpoint served as `mnist-iterative`: 16 steps per update, so that λ stays where many steps bring it."""
    run = mnist_iterative_linked()
    return replace(
        run,
        name="mnist-iterative-long",
        parent=run.name,
        epochs=10,
        refinement=replace(run.refinement, steps=16),
        optimiser=replace(run.optimiser, learning_rate=2e-4),
    )


def mnist_direct_polished() -> RunConfig:
    """Second phase of the direct model: as many epochs with the decoder fixed as its rival's second and third had."""
    return _polished(mnist_direct_short(), "mnist-direct-polished", epochs=20)


def mnist_direct_long() -> RunConfig:
    """Third phase, and the checkpoint served as `mnist-direct`: as many epochs as its rival's fourth and fifth, of whole digits."""
    return replace(_polished(mnist_direct_polished(), "mnist-direct-long", epochs=30), precision="32-true")


def digits_masked() -> RunConfig:
    """`digits-tiny` with a part of every other digit hidden, and a refiner that is told which: for filling in what a client lacks."""
    run = digits_tiny()
    inference = IterativeArchitecture(encodings=ENCODINGS, hidden=(128, 128), encode_mask=True)
    return replace(
        run,
        name="digits-masked",
        architecture=replace(run.architecture, inference=inference),
        data=replace(run.data, mask_probability=0.5),
    )


def digits_grey() -> RunConfig:
    """`digits-tiny` on grey digits: the mass of the interval of 1/255 around each level instead of draws of 0 and 1."""
    run = digits_tiny()
    generative = replace(run.architecture.generative, likelihood="quantised_gaussian")
    return replace(run, name="digits-grey", architecture=replace(run.architecture, generative=generative))


def mnist_landscape() -> RunConfig:
    """z = 2, 16 steps: small enough to draw L(μ) of one digit as a landscape with the path of λ on it (Marino 2018, Fig. 3)."""
    run = mnist_iterative_short()
    return replace(
        run,
        name="mnist-landscape",
        architecture=replace(run.architecture, generative=VAEArchitecture(latent=2)),
        refinement=replace(run.refinement, steps=16),
        optimiser=_brief(),
        train_rows=30_000,
        epochs=3,
        compiled=False,
    )


def digits_tiny() -> RunConfig:
    """About a minute on two cores: enough to see the ELBO rise with every step."""
    run = mnist_iterative_short()
    return replace(
        run,
        name="digits-tiny",
        architecture=Architecture(
            VAEArchitecture(latent=16, hidden=(128, 128)), IterativeArchitecture(encodings=ENCODINGS, hidden=(128, 128))
        ),
        train_rows=10_000,
        validation_rows=1_000,
        batch_size=64,
        optimiser=_brief(),
        epochs=10,
        precision="32-true",
        compiled=False,
    )
