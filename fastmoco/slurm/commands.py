"""`fastmoco slurm COMMAND`: what the scripts of slurm/ are filled by, and what they call."""

from __future__ import annotations

from fastmoco.commands import Command


def render(args: list[str]) -> int:
    """Write a script for sbatch: a pretraining, a study of several, or a measurement of speed."""
    from fastmoco.slurm.render import render_command

    return render_command(args)


def requeue(args: list[str]) -> int:
    """Decide whether a job that ended goes back into the queue; called by the scripts."""
    from fastmoco.slurm.requeue import requeue_command

    return requeue_command(args)


def speeds(args: list[str]) -> int:
    """Show the speeds that the script of a measurement found; called by it."""
    from fastmoco.slurm.speeds import speeds_command

    return speeds_command(args)


COMMANDS: dict[str, Command] = {"render": render, "requeue": requeue, "speeds": speeds}
