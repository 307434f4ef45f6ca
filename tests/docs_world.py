"""What the examples of a page find: files, a bucket, two web servers; and who types them."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from typing import TYPE_CHECKING

import numpy as np
from conftest import REPOSITORY, run_kprep
from docs_examples import Example, Page, replaced
from mirror_server import Mirror, mirror

from prep.demo_videos import draw_class_folders, random_motion, write_video
from prep.profile import load_profile

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from s3_server import S3Server

_SECONDS = 600  # far more than any example takes: it ends what hangs
_PROGRAMS = {
    "kprep": [sys.executable, "-P", "-m", "prep"], "python": [sys.executable], "tar": ["tar"],
}  # fmt: skip
_READY = {"scheduler": "Scheduler at:", "worker": "Registered to:"}  # what `dask NAME` says


class World:
    """What the pages' examples are given; made once, copied for each page.

    `videos`       class folders below train/ and val/
    `dataset`      both splits of them, converted
    `k700`         train/ and val/ in class folders, with train.csv and validate.csv
    `k400`         clips named as Kinetics' are, `val.csv` their list
    `kinetics`     the dataset of half of them, `early-videos`; `late-videos` is the other half
    `tars`         as video2dataset writes them
    `classes.txt`  two of the classes
    """

    def __init__(self, folder: Path, s3: S3Server, web: Mirror) -> None:
        self.folder, self.s3, self.web = folder, s3, web
        self.addresses = {"s3": s3.endpoint, "web": web.base}
        draw_class_folders(folder / "videos" / "train", 24, seed=1)
        draw_class_folders(folder / "videos" / "val", 8, seed=2)
        for split in ("train", "val"):
            run_kprep("shard", folder / "videos", folder / "dataset", "--split", split,
                      "--profile", "small", "--clips-per-shard", 10)  # fmt: skip
        (folder / "classes.txt").write_text("left\nright\n")
        self._draw_kinetics()
        self._draw_k700()
        self._convert_half()
        self._mirror_kinetics()
        self._write_tars()

    def _draw_kinetics(self) -> None:
        """Clips with an official-looking list: k400/val and val.csv."""
        rows = ["label,youtube_id,time_start,time_end,split,is_cc"]
        draw_class_folders(self.folder / "drawn", 8, seed=3)
        for number, path in enumerate(sorted((self.folder / "drawn").rglob("*.*"))):
            name = f"clip{number:07d}"
            rows.append(f"{path.parent.name},{name},{number},{number + 1},val,0")
            target = self.folder / "k400" / "val" / f"{name}_{number:06d}_{number + 1:06d}.mp4"
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
        (self.folder / "val.csv").write_text("\n".join(rows) + "\n")

    def _draw_k700(self) -> None:
        """The same clips under other names, one of each class in each split."""
        rows = {"train": [], "validate": []}
        for line, path in zip((self.folder / "val.csv").read_text().splitlines()[1:],
                              sorted((self.folder / "k400" / "val").iterdir()), strict=True):  # fmt: skip
            label, name, start, end = line.split(",")[:4]
            split, listed = (("train", "train"), ("val", "validate"))[int(start) % 2]
            name = name.replace("clip", "k700")
            rows[listed].append(f"{label},{name},{start},{end},{listed}")
            target = self.folder / "k700" / split / label / path.name.replace("clip", "k700")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        for listed, lines in rows.items():
            text = "\n".join(["label,youtube_id,time_start,time_end,split", *lines, ""])
            (self.folder / "k700" / f"{listed}.csv").write_text(text)

    def _convert_half(self) -> None:
        """A dataset in which half the rows are missing, and the clips of these rows."""
        for number, path in enumerate(sorted((self.folder / "k400" / "val").iterdir())):
            target = self.folder / ("early-videos", "late-videos")[number % 2]
            target.mkdir(exist_ok=True)
            shutil.copy(path, target)
        run_kprep("shard", self.folder / "early-videos", self.folder / "kinetics", "--split", "val",
                  "--annotations", self.folder / "val.csv", "--profile", "small")  # fmt: skip

    def _mirror_kinetics(self) -> None:
        """The same clips in the layout of the public mirror: one archive, its list and the rows."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            for path in sorted((self.folder / "k400" / "val").iterdir()):
                tar.add(path, f"./{path.name}")
        archive = "400/val/part_0.tar.gz"
        self.web.put(archive, gzip.compress(packed.getvalue(), 1))
        self.web.put(
            "400/val/k400_val_path.txt", f"https://s3.amazonaws.com/kinetics/{archive}\n".encode()
        )
        self.web.put("400/annotations/val.csv", (self.folder / "val.csv").read_bytes())

    def _write_tars(self) -> None:
        """tars/00000.tar and on with .mp4, .txt and .json members."""
        random = np.random.default_rng(4)
        drawn = self.folder / "drawn.mp4"
        for shard in range(2):
            target = self.folder / "tars" / f"{shard:05d}.tar"
            target.parent.mkdir(exist_ok=True)
            with tarfile.open(target, "w") as tar:
                for number in range(4):
                    direction = ("left", "up")[number % 2]
                    write_video(drawn, random_motion(direction, random), "libx264")
                    key = f"{shard:05d}{number:04d}"
                    texts = {"txt": direction.encode(), "json": json.dumps({"key": key}).encode()}
                    for extension, data in {"mp4": drawn.read_bytes(), **texts}.items():
                        member = tarfile.TarInfo(f"{key}.{extension}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))

    def give(self, wanted: str, folder: Path) -> None:
        """Put `NAME`, or `NAME as PLACE`, into a page's directory, the bucket or the web server."""
        name, _, place = wanted.partition(" as ")
        source = self.folder / name
        if place.startswith("s3://"):
            self.s3.upload(source, place.removeprefix("s3://kprep/"))
        elif place.startswith("{web}"):
            for path in (path for path in source.rglob("*") if path.is_file()):
                inner = path.relative_to(source).as_posix()
                self.web.put(f"{place.removeprefix('{web}/')}/{inner}", path.read_bytes())
        elif source.is_dir():
            shutil.copytree(source, folder / (place or name))
        else:
            shutil.copy(source, folder / (place or name))


@contextlib.contextmanager
def world(folder: Path, s3: S3Server) -> Iterator[World]:
    with mirror() as web:
        yield World(folder, s3, web)


def end_servers(servers: list[subprocess.Popen[bytes]], patience_seconds: float = 60) -> None:
    """End servers, the last one first; kill those that do not end by themselves."""
    for server in reversed(servers):
        server.terminate()
    for server in servers:
        try:
            server.wait(patience_seconds)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


class Typist:
    """Types the examples of one page, one after the other, in a directory of their own."""

    def __init__(self, page: Page, folder: Path, world: World) -> None:
        self.page, self.folder = page, folder
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = str(sock.getsockname()[1])
        self.addresses = {**world.addresses, "port": port, "repository": str(REPOSITORY)}
        path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
        self.environment = {**os.environ, **world.s3.environment, "PYTHONPATH": path}
        self.servers: list[subprocess.Popen[bytes]] = []

    def take(self, example: Example, part: str) -> None:
        """Run a part of an example: a command line, or a whole block that is not the shell's."""
        text = replaced(part, self.page, self.addresses)
        if example.language == "sh":
            self._type(shlex.split(text), example.where)
            return
        suffix = "py" if example.language == "python" else example.language
        named = re.match(r"# (\w+\.py)\n", text)  # a file that a later example imports
        file = self.folder / (named[1] if named else f"example_{example.line}.{suffix}")
        file.write_text(text)
        if example.language == "python":
            self._type(["python", file.name], example.where)
        else:
            load_profile(str(file))

    def _type(self, words: list[str], where: str) -> None:
        if words[0] == "export":
            self.environment.update(word.split("=", 1) for word in words[1:])
        elif words[0] == "dask":
            self._serve(words[1:], where)
        else:
            self._run(words, where)

    def _run(self, words: list[str], where: str) -> None:
        environment = dict(self.environment)
        while re.fullmatch(r"[A-Z_]+=.*", words[0]):
            name, _, value = words.pop(0).partition("=")
            environment[name] = value
        assert words[0] in _PROGRAMS, f"{where}: {words[0]} cannot be run here"
        done = subprocess.run(
            [*_PROGRAMS[words[0]], *words[1:]], cwd=self.folder, capture_output=True, text=True,
            timeout=_SECONDS, check=False, stdin=subprocess.DEVNULL, env=environment,
        )  # fmt: skip
        assert not done.returncode, (
            f"{where}: {words} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        )

    def _serve(self, words: list[str], where: str) -> None:
        """Start a program that stays, and wait until it says that it is ready."""
        log = self.folder / f"{words[0]}.log"
        with log.open("w") as file:
            self.servers.append(
                subprocess.Popen([sys.executable, "-m", "dask", *words], cwd=self.folder,
                                 env=self.environment, stdout=file, stderr=file)
            )  # fmt: skip
        until = time.monotonic() + _SECONDS
        while _READY[words[0]] not in log.read_text():
            running = self.servers[-1].poll() is None and time.monotonic() < until
            assert running, f"{where}: dask {words} did not start\n{log.read_text()[-3000:]}"
            time.sleep(0.1)

    def leave(self) -> None:
        """End what still runs."""
        end_servers(self.servers)
