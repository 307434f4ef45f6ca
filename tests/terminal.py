"""A real terminal: what a command writes to it, and what its screen shows in the end."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios

_PIECES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|.", re.DOTALL)


def run_in_terminal(command: list[str], columns: int) -> str:
    """Run a command in a terminal of so many columns; return what it wrote, escapes and all."""
    terminal, inside = pty.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    with subprocess.Popen(
        command,
        stdin=inside,
        stdout=inside,
        stderr=inside,
        env={**environment, "TERM": "xterm-256color"},
    ) as process:
        os.close(inside)
        written = b""
        try:
            while part := os.read(terminal, 65536):
                written += part
        except OSError:  # nobody is left who could write
            pass
        finally:
            os.close(terminal)
    text = written.decode()
    assert process.returncode == 0, text
    return text


def screen(written: str, columns: int) -> list[str]:
    """Return the lines that a terminal shows, of the escapes that Rich's bars use."""
    lines, row, column = [""], 0, 0
    for piece in _PIECES.findall(written):
        if piece == "\r":
            column = 0
        elif piece == "\n":
            row += 1
        elif piece == "\x1b[2K":
            lines[row] = ""
        elif piece == "\x1b[1A":
            row -= 1
        elif not piece.startswith("\x1b"):
            if column == columns:
                row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
            line = lines[row].ljust(column)
            lines[row] = line[:column] + piece + line[column + 1 :]
            column += 1
        lines += [""] * (row + 1 - len(lines))
    return [line.rstrip() for line in lines]
