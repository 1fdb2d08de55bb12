"""Which artifacts a server takes: all that are whole, or only those signed by the holder of a key."""

from __future__ import annotations

from pathlib import Path

from models.artifact import ArtifactError, Signer, public_key_of
from service.settings import Settings


def signer_of(secret: str | None, public_key: str | None) -> Signer | None:
    """What artifacts are checked with: a shared secret (HMAC-SHA256), a public key (Ed25519, 64 hexadecimal digits), or nothing."""
    if public_key is not None:
        return Signer(public_key=bytes.fromhex(public_key))
    return None if secret is None else Signer(secret=secret.encode())


def signer_of_settings(settings: Settings) -> Signer | None:
    """What a server checks the artifacts with that it loads."""
    key = settings.signing_key
    return signer_of(None if key is None else key.get_secret_value(), settings.public_key)


def signer_with(secret: str | None, private_key: Path | None) -> tuple[Signer, str | None]:
    """What artifacts are signed with, and the public key that servers need, if it is one of a pair.

    Args:
        private_key: a file of 64 hexadecimal digits.

    Raises:
        ArtifactError: there is neither, or the file holds no key.
    """
    if private_key is None:
        if secret is None:
            raise ArtifactError("set ELBOW_SIGNING_KEY, the secret that signs and checks, or pass --private-key FILE")
        return Signer(secret=secret.encode()), None
    try:
        key = bytes.fromhex(private_key.read_text().strip())
    except (OSError, ValueError) as exc:
        raise ArtifactError(f"{private_key}: not a private key of 64 hexadecimal digits (openssl rand -hex 32 > FILE makes one)") from exc
    return Signer(private_key=key), public_key_of(key).hex()
