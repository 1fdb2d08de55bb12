"""Name -> function returning a complete run. `elbow-train train NAME`."""

from collections.abc import Callable

from training.config import RunConfig
from training.runs import mnist, motion, music, speech
from training.sequence_config import SequenceRunConfig

RUNS: dict[str, Callable[[], RunConfig | SequenceRunConfig]] = {
    "mnist-direct": mnist.mnist_direct,
    "mnist-iterative": mnist.mnist_iterative,
    "mnist-direct-short": mnist.mnist_direct_short,
    "mnist-iterative-short": mnist.mnist_iterative_short,
    "mnist-direct-polished": mnist.mnist_direct_polished,
    "mnist-iterative-polished": mnist.mnist_iterative_polished,
    "mnist-iterative-late": mnist.mnist_iterative_late,
    "mnist-iterative-linked": mnist.mnist_iterative_linked,
    "mnist-iterative-long": mnist.mnist_iterative_long,
    "mnist-direct-long": mnist.mnist_direct_long,
    "mnist-landscape": mnist.mnist_landscape,
    "digits-tiny": mnist.digits_tiny,
    "digits-masked": mnist.digits_masked,
    "digits-grey": mnist.digits_grey,
    **motion.runs(),
    **music.runs(),
    **speech.runs(),
}
