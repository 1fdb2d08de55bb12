"""The image's health check: exit status 0 if the server in this container is ready. Standard library only.

It asks where the server was told to listen, so a container run with another ELBOW_PORT, or with TLS, is checked as well.
"""

from __future__ import annotations

import os
import ssl
import sys
import urllib.error
import urllib.request

TIMEOUT_S = 2.5


def main() -> int:
    scheme = "https" if os.environ.get("ELBOW_TLS_CERT_FILE") else "http"
    url = f"{scheme}://127.0.0.1:{os.environ.get('ELBOW_PORT', '8000')}/readyz"
    # the certificate names the service, not this address; and a proxy of the environment is not asked for our own port
    handlers = urllib.request.HTTPSHandler(context=ssl._create_unverified_context()), urllib.request.ProxyHandler({})
    try:
        with urllib.request.build_opener(*handlers).open(url, timeout=TIMEOUT_S) as answer:
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
