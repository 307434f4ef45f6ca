"""Which version of each shard a run reads: asked once, by rank 0 for all where there are ranks.

Texts travel between ranks as JSON in uint8 tensors: nothing is pickled.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
import torch.distributed

from prep.errors import KprepError, error_from_text, error_to_text
from prep.storage import listed_file

if TYPE_CHECKING:
    from prep.storage import Storage

_REQUESTS_IN_FLIGHT = 16

Versions = dict[str, str | None]
"""The ETag of each shard; None where the store has none and only crc32 protects."""


def pin_versions(storage: Storage, shards: dict[str, int]) -> Versions:
    """Return the ETag of every shard; raise KprepError when one has another size than listed.

    Sizes are those of the manifest, in bytes.
    """
    with listed_file(), ThreadPoolExecutor(_REQUESTS_IN_FLIGHT, "kprep-pin") as threads:
        infos = list(threads.map(storage.info, shards))
    for info in infos:
        if info.size_bytes != shards[info.path]:
            raise KprepError(
                f"{storage.where(info.path)} has {info.size_bytes} bytes, the manifest says "
                f"{shards[info.path]}; run `kprep verify`"
            )
    return {info.path: info.etag for info in infos}


def shared_versions(
    storage: Storage, shards: dict[str, int], *, rank: int, world_size: int
) -> Versions:
    """Return what rank 0 pinned; every rank must call this, in the same order.

    Asked of rank 0 where torch.distributed is up and has this rank and number of ranks. Else, and
    for a local directory, whose ETags are those of each machine's own files, each process pins.
    Raises, on every rank, what rank 0 met.
    """
    if storage.local_root is not None or not _has_peers(rank, world_size):
        return pin_versions(storage, shards)
    answer = {"shards": shards, "versions": {}, "error": ""}
    if rank == 0:
        try:
            answer["versions"] = pin_versions(storage, shards)
        except KprepError as error:
            answer["error"] = error_to_text(error)
    told = json.loads(_broadcast_from_first(json.dumps(answer)))
    if told["error"]:
        raise error_from_text(told["error"])
    if told["shards"] != shards:
        raise KprepError(
            f"{storage.root} is not the same dataset on rank {rank} as on rank 0 (their manifests "
            "list other shards); start all ranks on one version"
        )
    versions: Versions = told["versions"]
    return versions


def _has_peers(rank: int, world_size: int) -> bool:
    distributed = torch.distributed
    if world_size == 1 or not distributed.is_available() or not distributed.is_initialized():
        return False
    return (rank, world_size) == (distributed.get_rank(), distributed.get_world_size())


def _broadcast_from_first(text: str) -> str:
    """Return rank 0's text on every rank."""
    config = str(torch.distributed.get_backend_config())  # such as "cpu:gloo,cuda:nccl"
    device = "cpu" if "cpu:" in config else f"cuda:{torch.cuda.current_device()}"
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    length = torch.tensor([len(data)], dtype=torch.int64, device=device)
    torch.distributed.broadcast(length, src=0)
    if torch.distributed.get_rank() == 0:
        body = data.to(device)
    else:
        body = torch.empty(int(length), dtype=torch.uint8, device=device)
    torch.distributed.broadcast(body, src=0)
    return bytes(body.cpu().numpy()).decode()
