"""OpenSSF Model Signing of a bundle: a signature that tools of others verify. It has no part in what devices trust."""

from __future__ import annotations

import tempfile
from pathlib import Path

from eyas_device.bundle import Bundle
from eyas_host.fleet.updates.keys import SigningError
from eyas_host.support.errors import MissingExtra
from eyas_host.support.extras import install_line
from eyas_host.support.files import write_bytes

SIGNATURE = "model.sig"


def sign_bundle(bundle: Path, key: Path) -> Path:
    """Write `model.sig` into a bundle, over the names and hashes of its files.

    Args:
        bundle: The bundle.
        key: Private key in PEM, an elliptic curve's (P-256, P-384 or P-521), without a passphrase.

    Raises:
        MissingExtra: The extra `oms` is not installed.
        SigningError: The key cannot be used.
        BundleError: It is not a bundle, or damaged.

    """
    try:
        from model_signing import hashing, signing
    except ImportError:
        raise MissingExtra(f"--oms needs OpenSSF model-signing; {install_line('oms')}") from None
    Bundle.open(bundle)
    target = bundle / SIGNATURE
    hasher = hashing.Config().set_ignored_paths(paths=[target], ignore_git_paths=False)
    with tempfile.TemporaryDirectory(prefix="eyas-oms-") as scratch:
        written = Path(scratch) / SIGNATURE
        try:
            config = signing.Config().use_elliptic_key_signer(private_key=key).set_hashing_config(hasher)
            config.sign(bundle, written)
        except (ValueError, TypeError, OSError) as error:
            raise SigningError(f"{key}: cannot sign ({' '.join(str(error).split())[:200]})") from None
        write_bytes(target, written.read_bytes())
    return target
