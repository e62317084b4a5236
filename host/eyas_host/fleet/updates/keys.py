"""Keys that sign the repository: which there are, where each lies, and how they are used.

    KIT/keys/keys.json          id -> name and place of each key; public
    KIT/keys/NAME-ID.pem        private keys, ed25519, readable by their owner only; those of root and targets encrypted

A key may lie elsewhere: `folders` names others (a stick) in which its file is looked for, and its place may be any URI
that securesystemslib knows (`hsm:` for PKCS#11 and YubiKey, `awskms:`, `gcpkms:`, `azurekms:`, `hv:`, `tkey:`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import KEY_FOR_TYPE_AND_SCHEME, CryptoSigner, Key, Signer, SSlibKey

from eyas_device.errors import EyasError
from eyas_host.fleet.broker.pki import CredentialError, exists, read_file, write_file

INDEX = "keys.json"
_FILE = "file:"
_ID_DIGITS = 8
_MAX_PASSPHRASE = 1024
MIN_PASSPHRASE = 8
"""Minimum length of a passphrase, characters."""

Ask = Callable[[str, bool], str]
"""Asks for the passphrase of the key with this name; True: of a new key."""


class SigningError(EyasError, OSError):
    """A key that has to sign is not here, cannot be used, or has another passphrase."""


class KeyEntry(msgspec.Struct, frozen=True):
    """A key, without its secret."""

    name: str
    """E.g. `root-1`, `timestamp`, `site-hall-2`."""
    uri: str
    """`file:NAME-ID.pem` in the folder of keys, or a URI of securesystemslib."""
    public: dict[str, object]
    """Type, scheme and public value, as in TUF metadata."""
    created: float = 0.0
    """Seconds since 1970."""
    retired: float = 0.0
    """When another key took its place, seconds since 1970; 0: in use."""


class KeyStore:
    """The keys of a kit.

    Args:
        folder: `KIT/keys`.
        ask: Asks for a passphrase, e.g. on the terminal.
        folders: Other folders in which private keys are looked for.

    """

    def __init__(self, folder: Path, *, ask: Ask | None = None, folders: Sequence[Path] = ()) -> None:
        self.folder, self._folders = folder, (folder, *folders)
        self._ask = ask
        self._signers: dict[str, Signer] = {}

    def entries(self) -> dict[str, KeyEntry]:
        """Id -> key, of all that there ever were. Raises `CredentialError` if the index is damaged."""
        path = self.folder / INDEX
        if not exists(path):
            return {}
        try:
            return msgspec.json.decode(read_file(path), type=dict[str, KeyEntry])
        except msgspec.MsgspecError as error:
            raise CredentialError(f"{path}: damaged ({error}); restore it from a backup") from None

    def public(self, key_id: str) -> Key:
        """The public key. Raises `SigningError` for an unknown id."""
        entry = self.entries().get(key_id)
        if entry is None:
            raise SigningError(f"{self.folder}: no key {key_id[:_ID_DIGITS]} in {INDEX}")
        return Key.from_dict(key_id, dict(entry.public))

    def name(self, key_id: str) -> str:
        """The key's name with the first digits of its id."""
        entry = self.entries().get(key_id)
        return f"{entry.name if entry else 'unknown key'} ({key_id[:_ID_DIGITS]})"

    def create(self, name: str, now: float, *, encrypted: bool) -> Key:
        """Create a key and return its public part. Raises `CredentialError` if it cannot be written."""
        private = Ed25519PrivateKey.generate()
        key = SSlibKey.from_crypto(private.public_key())
        encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
        if encrypted:
            encryption = serialization.BestAvailableEncryption(self._passphrase(name, new=True))
        pem = private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
        file = f"{name}-{key.keyid[:_ID_DIGITS]}.pem"
        self._make_folder()
        write_file(self.folder / file, pem, private=True)
        self._record(key, name, f"{_FILE}{file}", now)
        self._signers[key.keyid] = CryptoSigner(private, key)
        return key

    def adopt(self, name: str, uri: str, public: Path, now: float) -> Key:
        """Record a key that lies elsewhere, under its URI.

        Args:
            name: Its name.
            uri: Where securesystemslib finds it.
            public: PEM file of its public part.
            now: Seconds since 1970.

        Raises:
            SigningError: The file is not a public key that TUF can use.

        """
        try:
            key = SSlibKey.from_crypto(serialization.load_pem_public_key(read_file(public)))
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise SigningError(f"{public}: not a public key in PEM ({error})") from None
        if uri.startswith(_FILE):
            raise SigningError(f"{uri}: a key in a file is looked for by `--keys DIR`; its URI would be `file2:PATH`")
        self._make_folder()
        self._record(key, name, uri, now)
        self.signer(key.keyid)
        return key

    def retire(self, key_ids: Iterable[str], now: float) -> None:
        """Record that others took the place of these keys; private files stay where they are."""
        gone = set(key_ids)
        self._write(
            {
                key_id: msgspec.structs.replace(entry, retired=now) if key_id in gone else entry
                for key_id, entry in self.entries().items()
            }
        )

    def place(self, key_id: str) -> str:
        """Where a key lies: a path, a URI, or empty if it is not here."""
        entry = self.entries().get(key_id)
        if entry is None:
            return ""
        if not entry.uri.startswith(_FILE):
            return entry.uri
        file = entry.uri.removeprefix(_FILE)
        return next((str(folder / file) for folder in self._folders if exists(folder / file)), "")

    def signer(self, key_id: str) -> Signer | None:
        """The key's signer; None if it is not here. Raises `SigningError` if it is, but cannot be used."""
        if key_id not in self._signers:
            place = self.place(key_id)
            if not place:
                return None
            self._signers[key_id] = self._load(key_id, place)
        return self._signers[key_id]

    def load_file(self, path: Path, name: str = "") -> CryptoSigner:
        """The signer of a private key in PEM. Raises `SigningError` if it cannot be used."""
        name = name or path.stem
        data = read_file(path)
        passphrase = self._passphrase(name, new=False) if b"ENCRYPTED" in data else None
        try:
            return CryptoSigner(serialization.load_pem_private_key(data, passphrase))
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            if passphrase is not None:
                raise SigningError(f"{path}: the passphrase of {name} is another one, or the file is damaged") from None
            raise SigningError(f"{path}: not a private key in PEM ({error})") from None

    def _load(self, key_id: str, place: str) -> Signer:
        entry = self.entries()[key_id]
        if entry.uri.startswith(_FILE):
            signer = self.load_file(Path(place), entry.name)
            if signer.public_key.keyid != key_id:
                raise SigningError(f"{place}: another key than {self.name(key_id)}")
            return signer
        try:
            return Signer.from_priv_key_uri(place, self.public(key_id), self._secret(entry.name))
        except Exception as error:  # each kind of signer raises its own
            raise SigningError(f"{place}: cannot be used ({' '.join(str(error).split())[:200]})") from None

    def _secret(self, name: str) -> Callable[[str], str]:
        return lambda what: self._passphrase(f"{name}, {what}", new=False).decode()

    def _passphrase(self, name: str, *, new: bool) -> bytes:
        if self._ask is None:
            raise SigningError(
                f"{name}: its passphrase is needed: give --passphrase-file, or set EYAS_KEY_PASSPHRASE, or run this on "
                "a terminal"
            )
        passphrase = self._ask(name, new)
        if new and len(passphrase) < MIN_PASSPHRASE:
            raise SigningError(f"the passphrase of {name}: at least {MIN_PASSPHRASE} characters are needed")
        return passphrase.encode()[:_MAX_PASSPHRASE]

    def _record(self, key: Key, name: str, uri: str, now: float) -> None:
        if (key.keytype, key.scheme) not in KEY_FOR_TYPE_AND_SCHEME:
            raise SigningError(f"{name}: {key.keytype} with {key.scheme} is no key that TUF knows")
        public: dict[str, object] = {"keytype": key.keytype, "scheme": key.scheme, "keyval": key.keyval}
        self._write(self.entries() | {key.keyid: KeyEntry(name, uri, public, created=now)})

    def _write(self, entries: dict[str, KeyEntry]) -> None:
        write_file(self.folder / INDEX, msgspec.json.format(msgspec.json.encode(entries), indent=1) + b"\n")

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise CredentialError(f"{self.folder}: cannot be created ({error.strerror})") from None


def given_passphrase(file: Path | None) -> str | None:
    """The passphrase in the first line of `file`, or in EYAS_KEY_PASSPHRASE; None without either.

    Raises `SigningError` if the file cannot be read or is empty.
    """
    if file is None:
        return os.environ.get("EYAS_KEY_PASSPHRASE") or None
    try:
        with file.open(encoding="utf-8") as stream:
            line = stream.readline(_MAX_PASSPHRASE).rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SigningError(f"{file}: {getattr(error, 'strerror', None) or 'not text'}") from None
    if not line:
        raise SigningError(f"{file}: its first line is empty; the passphrase is needed there")
    return line
