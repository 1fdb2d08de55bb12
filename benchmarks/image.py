"""What the cpu image costs: megabytes over its base, seconds to the first answer, resident memory.

    python benchmarks/image.py [--image elbow:cpu] [--runs 5]

Builds the image from the working tree, unless --image names one that is there, and starts it with a read-only root and no
capabilities on the host's network. Without a Docker engine it says so and measures nothing.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from _report import keep, table

ROOT = Path(__file__).parents[1]
PORT, NAME = 18_437, "elbow-image-benchmark"
URL = f"http://127.0.0.1:{PORT}"
READ_ONLY = ("--read-only", "--cap-drop", "ALL", "--network", "host", "--env", f"ELBOW_PORT={PORT}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", help="an image that is there already")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    if shutil.which("docker") is None or subprocess.run(["docker", "version"], capture_output=True, check=False).returncode:
        print("needs a Docker engine (`docker version` finds none)")
        return 0
    image = options.image or "elbow:cpu"
    if options.image is None:
        docker("build", "--network", "host", "--tag", image, str(ROOT))
    (base,) = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    size, base_size = (int(docker("image", "inspect", "--format", "{{.Size}}", name)) / 1e6 for name in (image, base))
    starts, resident = zip(*(one_start(image) for _ in range(options.runs)), strict=True)
    measured = {
        "image, MB": size,
        "its base, MB": base_size,
        "added, MB": size - base_size,
        "docker run to ready, s (median)": statistics.median(starts),
        "docker run to ready, s (slowest)": max(starts),
        "resident when ready, MB (median)": statistics.median(resident),
    }
    print(table(["cpu image", "measured"], list(measured.items())))
    keep("image", {"image": image, "base": base, "runs": options.runs, "measured": measured, "starts_s": starts})
    return 0


def one_start(image: str) -> tuple[float, float]:
    """Seconds from `docker run` to the first 200 of /readyz; the process's resident megabytes then."""
    started = time.monotonic()
    docker("run", "--detach", "--name", NAME, *READ_ONLY, image)
    try:
        while not ready():
            if time.monotonic() > started + 120:
                raise SystemExit(f"{image} is not ready after two minutes")
            time.sleep(0.02)
        seconds = time.monotonic() - started
        with urllib.request.urlopen(f"{URL}/metrics") as answer:
            (resident,) = re.findall(r"^process_resident_memory_bytes (\S+)$", answer.read().decode(), re.MULTILINE)
        return seconds, float(resident) / 1e6
    finally:
        docker("rm", "--force", NAME)


def ready() -> bool:
    try:
        with urllib.request.urlopen(f"{URL}/readyz", timeout=1) as answer:
            return answer.status == 200
    except OSError:  # an HTTPError is one, too
        return False


def docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"docker {' '.join(arguments)}\n{done.stderr}")
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
