"""The image's health check: exit status 0 if the server in this container is ready. Standard library only.

It asks the port that the server was told to listen on, so a container run with another ELBOW_PORT is checked as well.
"""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request

TIMEOUT_S = 2.5


def main() -> int:
    url = f"http://127.0.0.1:{os.environ.get('ELBOW_PORT', '8000')}/readyz"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy of the environment is not asked for our own port
    try:
        with direct.open(url, timeout=TIMEOUT_S) as answer:
            print(answer.read().decode())
    except urllib.error.HTTPError as exc:  # 503 while it warms up or drains
        print(exc.read().decode())
        return 1
    except OSError as exc:
        print(f"{url}: {exc}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
