"""Every clip of a split through one reader of the format, as a program of its own.

    python tests/other_readers.py READER ROOT SPLIT...

prints the reader's version, then a JSON array [split, key, sha256 of the mp4, sidecar] for each
clip, in the reader's own order. ROOT is a directory or s3://bucket/prefix (the usual AWS variables say where
that is). Each reader is used as its own documentation shows; nothing here knows how a dataset is
laid out beyond what docs/format.md says.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

Clip = tuple[str, bytes, Any]


def fetch(url: str) -> bytes:
    """Read an object of a bucket whole: what two of the readers must be given from outside."""
    import obstore

    folder, _, name = url.rpartition("/")
    store = obstore.store.from_url(
        folder, client_options={"allow_http": True}, virtual_hosted_style_request=False
    )
    return bytes(obstore.get(store, name).bytes())


def shards(root: str, split: str) -> list[str]:
    data = (
        fetch(f"{root}/manifest.json")
        if "://" in root
        else (Path(root) / "manifest.json").read_bytes()
    )
    return [f"{root}/{shard['path']}" for shard in json.loads(data)["splits"][split]["shards"]]


def read_kprep(root: str, split: str) -> Iterator[Clip]:
    """The index says where everything stands; what the loader reads with checks every byte."""
    import dataclasses
    import io
    import tarfile

    import numpy as np

    from prep.format import index_path, iter_records, read_index, read_manifest
    from prep.storage import Storage
    from stream.index import load_index
    from stream.reads import ClipReader, ClipRequest

    storage = Storage(root)
    index = load_index(storage, read_manifest(storage), split)
    reader = ClipReader(storage, versions={})
    records = iter_records(read_index(storage.read(index_path(split)), split))
    for number, row in enumerate(records):
        whole = dataclasses.replace(index.clip(number), codec_config=None)
        (pending,) = reader.begin([ClipRequest(whole, np.array([0]))])
        video = pending.get().whole
        entry = storage.read_range(row.shard, row.entry_offset, row.entry_offset + row.entry_bytes)
        with tarfile.open(fileobj=io.BytesIO(bytes(entry))) as tar:
            member = tar.extractfile(f"{row.key}.json")
            assert member is not None
            yield row.key, bytes(video or b""), json.load(member)


def read_webdataset(root: str, split: str) -> Iterator[Clip]:
    """The tars alone. It has no handler for s3://, but lets one be registered."""
    import io

    import webdataset

    webdataset.gopen_schemes["s3"] = lambda url, mode, bufsize, **_: io.BytesIO(fetch(url))
    for sample in webdataset.WebDataset(shards(root, split), shardshuffle=False):
        yield sample["__key__"], sample["mp4"], json.loads(sample["json"])


def read_wids(root: str, split: str) -> Iterator[Clip]:
    """The index form. From a bucket it calls the aws program; a function can stand in for it."""
    import wids
    from wids import wids_dl

    def download(url: str, local: str) -> None:
        Path(local).write_bytes(fetch(url))

    wids_dl.default_cmds["s3"] = download
    with tempfile.TemporaryDirectory() as cache:
        dataset = wids.ShardListDataset(
            f"{root}/wids-{split}.json", cache_dir=cache, transformations=[]
        )
        for number in range(len(dataset)):
            sample = dataset[number]
            yield sample["__key__"], sample[".mp4"].read(), json.load(sample[".json"])


def read_energon(root: str, split: str) -> Iterator[Clip]:
    """`.nv-meta` and `.tar.idx`. Buckets go through NVIDIA's multi-storage-client."""
    from megatron.energon import (
        Cooker,
        TaskEncoder,
        WorkerConfig,
        get_loader,
        get_val_dataset,
        stateless,
    )

    class Raw(TaskEncoder):  # type: ignore[misc, type-arg]
        decoder = None  # raw bytes
        cookers = (Cooker(stateless(lambda sample: sample)),)

    with tempfile.TemporaryDirectory() as folder:
        if "://" in root:
            root = _profile_of_a_bucket(root, Path(folder))
        one = WorkerConfig(rank=0, world_size=1, num_workers=0)
        dataset = get_val_dataset(
            root, split_part=split, worker_config=one, batch_size=None, task_encoder=Raw()
        )
        for sample in get_loader(dataset):
            yield sample["__key__"], sample["mp4"], json.loads(sample["json"])


def _profile_of_a_bucket(root: str, folder: Path) -> str:
    """Write what multi-storage-client reads; return ROOT as it wants it."""
    bucket, _, prefix = root.removeprefix("s3://").partition("/")
    options = {
        "endpoint_url": os.environ["AWS_ENDPOINT_URL"],
        "base_path": bucket,
        "region_name": os.environ["AWS_REGION"],
    }
    keys = {
        "access_key": os.environ["AWS_ACCESS_KEY_ID"],
        "secret_key": os.environ["AWS_SECRET_ACCESS_KEY"],
    }
    profile = {
        "storage_provider": {"type": "s3", "options": options},
        "credentials_provider": {"type": "S3Credentials", "options": keys},
    }
    path = folder / "msc.json"
    path.write_text(json.dumps({"profiles": {"there": profile}}))
    os.environ["MSC_CONFIG"] = str(path)
    return f"msc://there/{prefix}"


def read_datasets(root: str, split: str) -> Iterator[Clip]:
    """Hugging Face `datasets`: the builder `webdataset`, found through the card's `configs`."""
    import datasets

    with tempfile.TemporaryDirectory() as cache:
        if "://" in root:  # the card is not looked for in a bucket, so the globs are given
            files = {split: f"{root}/{split}/*.tar"}
            found = datasets.load_dataset(
                "webdataset", data_files=files, split=split, cache_dir=cache
            )
        else:
            found = datasets.load_dataset(root, split=split, cache_dir=cache)
        for row in found.cast_column("mp4", datasets.Video(decode=False)):
            yield row["__key__"], row["mp4"]["bytes"], row["json"]


READERS = {
    "kprep": (read_kprep, "kprep"),
    "webdataset": (read_webdataset, "webdataset"),
    "wids": (read_wids, "wids"),
    "megatron-energon": (read_energon, "megatron-energon"),
    "datasets": (read_datasets, "datasets"),
}


def main() -> None:
    reader, root, *splits = sys.argv[1:]
    read, distribution = READERS[reader]
    with contextlib.redirect_stdout(sys.stderr):  # some readers talk
        clips = [
            [split, key, hashlib.sha256(video).hexdigest(), sidecar]
            for split in splits
            for key, video, sidecar in read(root, split)
        ]
    print(json.dumps(importlib.metadata.version(distribution)))
    print("\n".join(map(json.dumps, clips)))


if __name__ == "__main__":
    main()
