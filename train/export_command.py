"""The command `kprep export`. Importing this loads no torch, so that `--help` is quick."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("export")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(["state-dict", "torch-export", "onnx"]),
    required=True,
    help="state-dict loads in plain torchvision; onnx needs 'kprep[export]'.",
)
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), required=True, metavar="FILE"
)
@click.option(
    "--averaged/--raw",
    default=None,
    help="Moving average of the weights, or the weights.  [default: averaged, if there is one]",
)
@click.option(
    "--model", metavar="MODULE:FUNCTION", help="Allow this function, where the network is yours."
)
def export_command(
    checkpoint: Path, form: str, output: Path, averaged: bool | None, model: str | None
) -> None:
    """Write the network of CHECKPOINT (a file, or a run's directory) for other programs.

    \b
    Examples:
      kprep export runs/resnet --format state-dict --output r2plus1d.pt
      kprep export runs/resnet/checkpoints/best.pt --format onnx \\
        --output r2plus1d.onnx

    The file is read back and must give the same logits. Class names and preprocessing are written
    beside it, to FILE.json.
    """
    from train.export import export, load_trained, sidecar_path

    trained = load_trained(checkpoint, averaged=averaged, model_name=model)
    click.echo(str(trained))
    frames, height, width = trained.clip
    click.echo(f"takes normalised clips, float32 (N, 3, {frames}, {height}, {width}), for any N")
    parity = export(trained, form, output)
    click.echo(f"parity with {parity}")
    size = output.stat().st_size / 1e6
    click.echo(f"written: {output} ({size:.1f} MB)")
    click.echo(f"written: {sidecar_path(output)} (class names, preprocessing, protocol)")
