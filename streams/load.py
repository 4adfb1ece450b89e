"""A finished candidate's bytes, as one payload; nothing is decoded."""

from streams.batch import BatchRejected, digest_of
from streams.files import read_file
from streams.formats import form_of_name, pack_images, pack_pair
from streams.markers import MAX_SUMS_BYTES, check_sums
from streams.tree import Candidate


def load(candidate: Candidate, max_bytes: int, leases: bool) -> tuple[str, bytes, str]:
    """Format, payload and its SHA-256; its checksums are true.

    leases: as in `read_file`. Raises StillChanging, or BatchRejected too_large, unreadable or checksum_mismatch.
    """
    total = sum(member.size for member in candidate.members)
    if total > max_bytes:
        raise BatchRejected("too_large", f"{total} bytes, at most {max_bytes} expected")
    found = {member.path: read_file(member.path, member.fingerprint, max_bytes, leases) for member in candidate.members}
    form, payload = _pack(candidate, found)
    sha256 = digest_of(payload)
    sums = [marker for marker in candidate.markers if marker.has_sums]
    if sums:
        own = candidate.kind == "file"
        digests = {path: sha256 if own else digest_of(data) for path, data in found.items()}
        for marker in sums:
            file = marker.file
            check_sums(read_file(file.path, file.fingerprint, MAX_SUMS_BYTES, leases), marker, digests)
    return form, payload, sha256


def _pack(candidate: Candidate, found: dict[str, bytes]) -> tuple[str, bytes]:
    if candidate.kind == "images":
        return "images", pack_images(("/".join(path.split("/")[-2:]), data) for path, data in found.items())
    if candidate.kind == "pair":
        x, y = found.values()
        return "npz", pack_pair(x, y)
    (payload,) = found.values()
    return form_of_name(candidate.members[0].path) or "", payload
