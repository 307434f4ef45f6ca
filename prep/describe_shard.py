"""The work of an indexing process: every sample of one shard, with what the index says of a clip.

For tars of kprep the sidecars say most of it (`kprep verify --repair`); for tars that somebody else
wrote each clip is decoded (`kprep index`).
"""

from __future__ import annotations

import functools
import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prep.checksums import content_hash
from prep.clip_check import decode_clip, find_gops
from prep.errors import DatasetError
from prep.foreign_labels import stated_label
from prep.format import Sidecar
from prep.mp4 import FormError, check_form
from prep.outcome import Reason, RowFailure
from prep.shard_bytes import ShardBytes, TarEntry, walk
from prep.storage import Storage
from prep.tar_samples import LABEL_EXTENSIONS, VIDEO_EXTENSIONS, Grouping, Sample
from prep.tar_stream import ArchiveError
from prep.worker_marks import Mark

if TYPE_CHECKING:
    from prep.mp4 import GopIndex

MAX_VIDEO_BYTES = 2 << 30
_MAX_TEXT_BYTES = 4 << 20  # of a sidecar or label
_MAX_KEY = 200


def describe_shard(job: dict[str, Any]) -> dict[str, Any]:
    """Read one shard once; return its hashes and its samples, or why it is refused.

    The job: root, options, path; context (a JSON file: foreign None, or as_stored and the label
    rules to try); mark; skip (clips that a worker died of).
    """
    storage, path = Storage(job["root"], job["options"]), job["path"]
    mark = Mark(job["mark"])
    body = ShardBytes(storage, storage.info(path), mark.add_bytes)
    try:
        context = _context(job["context"])
        kind = _Kprep if context["foreign"] is None else _Foreign
        described = kind(context, mark, job["skip"])
        for entry in walk(body):
            described.add(entry)
        described.close()
    except ArchiveError as error:
        return {"refused": f"{path} is no tar that every reader takes alike: {error}"}
    finally:
        body.close()
        mark.close()
    if described.grouping.problems:
        return {"refused": f"{path}: {described.grouping.problems[0][1]}"}
    samples = described.grouping.samples
    return {
        "bytes": body.size_bytes,
        "sha256": body.sha256.hexdigest(),
        "md5": body.md5.hexdigest(),
        "offsets": [*(sample.offset for sample in samples), samples[-1].end if samples else 0],
        "samples": described.described,
    }


@functools.lru_cache(maxsize=2)
def _context(path: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    return values


class _Described:
    """Collects the samples of one tar; a subclass knows what their members mean.

    `described` holds for each sample: key, start and end of the entry, then either
    `failed` (reason and detail) or the facts of its clip.
    """

    def __init__(self, context: dict[str, Any], mark: Mark, skip: dict[str, str]) -> None:
        self.context, self.mark, self.skip = context, mark, skip
        self.grouping = Grouping()
        self.described: list[dict[str, Any]] = []
        self._texts: dict[str, bytes] = {}
        self._facts: dict[str, Any] = {}
        self._failure: RowFailure | None = None

    def add(self, entry: TarEntry) -> None:
        """Take one member; a video is described at once, while its bytes are here."""
        before = len(self.grouping.samples)
        found = self.grouping.add(entry)
        if found is None:
            return
        _, extension = found
        if len(self.grouping.samples) > before and before:
            self._finish(self.grouping.samples[before - 1])
        if extension in VIDEO_EXTENSIONS:
            if self._facts or self._failure:
                self._failure = RowFailure(Reason.SEVERAL_VIDEOS)
                return
            try:
                self._facts = self._video(entry)
            except RowFailure as failure:
                self._failure = failure
        elif extension in LABEL_EXTENSIONS and entry.size <= _MAX_TEXT_BYTES:
            self._texts[extension] = entry.read()

    def close(self) -> None:
        """Finish the last sample."""
        if self.grouping.samples:
            self._finish(self.grouping.samples[-1])

    def _finish(self, sample: Sample) -> None:
        values: dict[str, Any] = {"key": sample.key}
        values |= {"entry_offset": sample.offset, "entry_bytes": sample.end - sample.offset}
        failure = self._failure
        if failure is None and not self._facts:
            failure = RowFailure(Reason.MISSING, "the sample has no video member")
        try:
            if failure is not None:
                raise failure
            values |= self._facts | self._about(sample)
        except RowFailure as refused:
            values["failed"] = [str(refused.reason), refused.detail]
        self.described.append(values)
        self._texts, self._facts, self._failure = {}, {}, None

    def _video(self, entry: TarEntry) -> dict[str, Any]:
        if not entry.size:
            raise RowFailure(Reason.EMPTY_FILE, "0 bytes")
        if entry.size > MAX_VIDEO_BYTES:
            text = f"{entry.size:,} bytes, more than {MAX_VIDEO_BYTES:,}"
            raise RowFailure(Reason.PICTURE_SIZE, text)
        data = entry.read()
        if str(entry.data_offset) in self.skip:
            raise RowFailure(Reason.CRASHED, f"the decoder: {self.skip[str(entry.data_offset)]}")
        with self.mark.clip(entry.data_offset):
            facts, gops = self._pictures(data)
        return {
            **facts,
            "video_offset": entry.data_offset,
            "video_bytes": entry.size,
            "content_hash": content_hash(data).hex(),
            "crc32": zlib.crc32(data),
            "codec_config": gops and gops.codec_config.hex(),
            "gop_frames": gops and gops.gop_frames,
            "gop_offsets": gops and list(gops.offsets),
            "gop_crc32": gops and list(gops.crc32),
        }

    def _pictures(self, data: bytes) -> tuple[dict[str, Any], GopIndex | None]:
        raise NotImplementedError

    def _about(self, sample: Sample) -> dict[str, Any]:
        raise NotImplementedError


class _Kprep(_Described):
    """Samples of kprep's own tars: the sidecar speaks, and the form of the mp4 is proven."""

    def _pictures(self, data: bytes) -> tuple[dict[str, Any], GopIndex | None]:
        try:
            form = check_form(data, self.context["gop_frames"])
        except FormError as error:
            raise RowFailure(Reason.DAMAGED, str(error)) from error
        facts = {"num_frames": form.num_frames, "width": form.width, "height": form.height}
        return facts, form.gops

    def _about(self, sample: Sample) -> dict[str, Any]:
        try:
            sidecar = Sidecar.from_bytes(self._texts.get("json", b""), f"{sample.key}.json")
        except DatasetError as error:
            raise RowFailure(Reason.BAD_ROW, str(error)) from error
        facts = self._facts
        if (sidecar.num_frames, sidecar.width, sidecar.height) != (
            facts["num_frames"], facts["width"], facts["height"]):  # fmt: skip
            raise RowFailure(Reason.DAMAGED, "its sidecar describes another clip")
        names = ("video_id", "label_index", "start_seconds", "end_seconds", "source")
        about = {name: getattr(sidecar, name) for name in names}
        return about | {"fps": [sidecar.fps_num, sidecar.fps_den]}


class _Foreign(_Described):
    """Samples that somebody else wrote: every frame is decoded, and every label rule is tried."""

    def _pictures(self, data: bytes) -> tuple[dict[str, Any], GopIndex | None]:
        clip = decode_clip(data)
        if clip.width % 2 or clip.height % 2 or min(clip.width, clip.height) < 2:
            raise RowFailure(Reason.ODD_SIZE, f"{clip.width}x{clip.height}")
        if not self.context["as_stored"]:
            if clip.rotation_degrees:
                raise RowFailure(Reason.ROTATED, f"by {clip.rotation_degrees} degrees")
            if clip.sample_aspect != 1:
                raise RowFailure(Reason.PIXEL_ASPECT, f"{clip.sample_aspect}")
        facts = {
            "num_frames": clip.num_frames, "width": clip.width, "height": clip.height,
            "fps": list(clip.fps.as_integer_ratio()),
        }  # fmt: skip
        return facts, find_gops(data, clip)

    def _about(self, sample: Sample) -> dict[str, Any]:
        key = sample.key
        if broken := _broken_rule(key):
            raise RowFailure(Reason.BAD_NAME, f"keys must {broken}")
        labels: dict[str, Any] = {}
        for rule in self.context["rules"]:
            try:
                labels[rule] = stated_label(rule, self._texts)
            except RowFailure as failure:
                labels[rule] = failure.detail
        return {"labels": labels}


def _broken_rule(key: str) -> str:
    """Return what a key must be and is not, so that readers would cut it differently; or ""."""
    if not key.isprintable():
        return "be of characters that can be printed"
    if "." in key:
        return "have no dot"
    if key.startswith("__"):
        return "not begin with '__'"  # as webdataset's own entries of a sample, such as __key__
    return f"have at most {_MAX_KEY} characters" if len(key) > _MAX_KEY else ""
